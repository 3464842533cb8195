// Adagrad (Duchi et al. 2011).
#pragma once

#include "common.h"

namespace fusedopt {

struct Adagrad : Common {
  static constexpr const char* kName = "adagrad";
  static constexpr int kNumStates = 1;
  static constexpr const char* kStateNames[kNumStates] = {"sum"};
  static constexpr int kSum = 0;

  // Of a sparse gradient only the rows that it has values for are walked; and torch rounds differently then.
  enum Variant { kDense, kSparse, kNumVariants };
  static constexpr int num_states(int) { return kNumStates; }
  static constexpr int kSparseVariant = kSparse;

  enum Flag : uint32_t {
    kEpsInsideSqrt = Common::kFirstOfRule,
  };

  template <class T>
  struct Scalars : Common::Scalars<T> {
    T neg_lr, eps;
  };

  enum Key { kLr, kLrDecay, kEps, kWeightDecay, kMaximizeKey, kEpsInsideKey, kNumKeys };
  static constexpr const char* kKeys[kNumKeys] = {"lr",           "lr_decay", "eps",
                                                  "weight_decay", "maximize", "eps_inside_sqrt"};

  template <class Group>
  static int variant(const Group&) {
    return kDense;
  }

  struct Options {
    double lr_decay, eps, weight_decay;
    uint32_t maximize, eps_inside_sqrt;  // no padding: options are compared byte by byte
  };

  template <class Group>
  static Options options(const Group& group) {
    return {group.number(kLrDecay), group.number(kEps), group.number(kWeightDecay), group.flag(kMaximizeKey),
            group.flag(kEpsInsideKey)};
  }

  static const char* sparse_problem(const Options& options) {
    return options.weight_decay != 0 ? "weight_decay option is not compatible with sparse gradients" : nullptr;
  }

  // What a step count comes to, in double and in torch's order: exact operations, the same on every device.
  struct Corrections {
    double lr_divisor;
  };
  FUSEDOPT_HD static Corrections corrections(const Options& options, double step) {
    return {1 + (step - 1) * options.lr_decay};
  }
  static constexpr bool kTabulated = false;
  struct Powers {};  // of a table
  static const char* problem(const Corrections& c) {
    return c.lr_divisor == 0 ? "1 + (step - 1) * lr_decay is 0, so the step size is infinite" : nullptr;
  }

  template <class T, class Lr>
  FUSEDOPT_HD static Scalars<T> scalars(const Options& options, Lr lr, const Corrections& at_step,
                                        const Context& context) {
    Scalars<T> s;
    static_cast<Common::Scalars<T>&>(s) = Common::scalars<T>(context, options.maximize, options.weight_decay);
    s.neg_lr = static_cast<T>(-(lr / at_step.lr_divisor));
    s.eps = static_cast<T>(Common::eps(options.eps, static_cast<double>(lr)));
    s.flags |= options.eps_inside_sqrt ? kEpsInsideSqrt : 0u;
    return s;
  }

  // grad: of a sparse gradient, the sum of its Common::value.
  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane grad,
                                                 Lane* states) {
    const Lane neg_lr(s.neg_lr), eps(s.eps);
    Lane& sum = states[kSum];

    if constexpr (variant == kDense) grad = decayed(s, grad, param);
    sum = variant == kSparse ? add(sum, mul(grad, grad)) : fma(grad, grad, sum);
    const Lane denom = s.flags & kEpsInsideSqrt ? sqrt(add(sum, eps)) : add(sqrt(sum), eps);
    if constexpr (variant == kSparse) {
      const Lane quotient = div(grad, denom), change = mul(neg_lr, quotient);
      param = s.flags & kOneElement ? add(param, change) : fma(neg_lr, quotient, param);
      return change;
    } else {
      const Lane change = div(mul(neg_lr, grad), denom);
      param = add(param, change);
      return change;
    }
  }
};

}  // namespace fusedopt
