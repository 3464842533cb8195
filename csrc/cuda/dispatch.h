// From a rule's id and a dtype to the kernel's template arguments: every kernel there is, in one place.
#pragma once

#include "../rules/rules.h"
#include "../table.h"

namespace fusedopt {
namespace cuda {

// Calls F<Rule, storage type, opmath, on_device>::call(args...).
template <template <class, class, class, bool> class F, class Rule, bool kOnDevice, class... A>
void dispatch_dtype(DType dtype, A... args) {
  switch (dtype) {
    case DType::kFloat32: return F<Rule, float, float, kOnDevice>::call(args...);
    case DType::kFloat64: return F<Rule, double, double, kOnDevice>::call(args...);
    case DType::kBFloat16: return F<Rule, BFloat16, float, kOnDevice>::call(args...);
    case DType::kFloat16: return F<Rule, Half, float, kOnDevice>::call(args...);
  }
}

template <template <class, class, class, bool> class F, class... R, class... A>
void dispatch(RuleList<R...>, int rule, DType dtype, bool on_device, A... args) {
  int id = 0;
  ((id++ == rule
        ? (on_device ? dispatch_dtype<F, R, true>(dtype, args...) : dispatch_dtype<F, R, false>(dtype, args...))
        : void()),
   ...);
}

}  // namespace cuda
}  // namespace fusedopt
