// From a rule's id and a dtype to a kernel's template arguments: every kernel there is, in one place.
#pragma once

#include <type_traits>

#include "../rules/rules.h"
#include "../table.h"
#include "step.cuh"

namespace fusedopt {
namespace cuda {

// Calls F<Rule, storage type, opmath, full>::call(args...).
template <template <class, class, class, bool> class F, class Rule, bool kFull, class... A>
void dispatch_dtype(DType dtype, A... args) {
  switch (dtype) {
    case DType::kFloat32: return F<Rule, float, float, kFull>::call(args...);
    case DType::kFloat64: return F<Rule, double, double, kFull>::call(args...);
    case DType::kBFloat16: return F<Rule, BFloat16, float, kFull>::call(args...);
    case DType::kFloat16: return F<Rule, Half, float, kFull>::call(args...);
    case DType::kMixed:
      if constexpr (kFull && !std::is_same_v<Rule, Scale>) return F<Rule, Mixed, float, kFull>::call(args...);
    default: break;
  }
}

// Rules that are no optimizer's have full kernels only, and so has kMixed; Pause is a part of others'.
template <template <class, class, class, bool> class F, class Rule, class... A>
void dispatch_rule(DType dtype, bool full, A... args) {
  if constexpr (Rule::kCountsSteps) {
    if (!full) return dispatch_dtype<F, Rule, false>(dtype, args...);
  }
  if constexpr (!std::is_same_v<Rule, Pause>) dispatch_dtype<F, Rule, true>(dtype, args...);
}

template <template <class, class, class, bool> class F, class... R, class... A>
void dispatch(RuleList<R...>, int rule, DType dtype, bool full, A... args) {
  int id = 0;
  ((id++ == rule ? dispatch_rule<F, R>(dtype, full, args...) : void()), ...);
}

// Calls F<storage type, opmath>::call(args...).
template <template <class, class> class F, class... A>
void dispatch_norm(DType dtype, A... args) {
  switch (dtype) {
    case DType::kFloat32: return F<float, float>::call(args...);
    case DType::kFloat64: return F<double, double>::call(args...);
    case DType::kBFloat16: return F<BFloat16, float>::call(args...);
    case DType::kFloat16: return F<Half, float>::call(args...);
    case DType::kMixed: return F<Mixed, float>::call(args...);
    default: break;
  }
}

}  // namespace cuda
}  // namespace fusedopt
