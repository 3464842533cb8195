// Adam (Kingma and Ba 2014), with all that moments.h has.
#pragma once

#include "moments.h"

namespace fusedopt {

struct Adam : Moments {
  static constexpr const char* kName = "adam";
  static constexpr int kNumKeys = kFirstKeyOfRule;
  static constexpr const char* kKeys[kNumKeys] = {
      "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"};

  static const char* sparse_problem(const Options&) {
    return "Adam does not support sparse gradients, please consider SparseAdam instead";
  }

  template <class T>
  struct Scalars : Moments::Scalars<T> {
    T neg_step_size, eps;
  };

  // What a step count comes to, in double and in torch's order.
  struct Corrections {
    double bias_correction1, bias_correction2_sqrt;
  };
  FUSEDOPT_HD static Corrections corrections(const Options& options, double step) {
    return {1 - power(options.beta1, step),
            power(1 - power(options.beta2, step), 0.5)};  // Python's **: not always sqrt's bits
  }
  // They need the host's pow: a device gets a table of them, up to the step count from which on they stay what they
  // are: 1, since beta ** step is less than half an ulp of it.
  static constexpr bool kTabulated = true;
  static double last_step(const Options& options) { return step_of_power(options, 54); }
  static const char* problem(const Corrections& c) {
    return c.bias_correction1 > 0 && c.bias_correction2_sqrt >= 0 ? nullptr : kBadStep;
  }

  template <class T, class Lr>
  FUSEDOPT_HD static Scalars<T> scalars(const Options& options, Lr lr, const Corrections& at_step,
                                        const Context& context) {
    Scalars<T> s;
    static_cast<Moments::Scalars<T>&>(s) = Moments::scalars<T>(options, lr, at_step.bias_correction2_sqrt, context);
    s.neg_step_size = static_cast<T>(-(lr / at_step.bias_correction1));
    s.eps = static_cast<T>(Common::eps(options.eps, static_cast<double>(lr)));
    return s;
  }

  // Returns what is added to the parameter at the end; that it may be rounded away is of interest to statistics.
  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane grad,
                                                 Lane* states) {
    const Lane second_moment = move<variant>(s, param, grad, states);
    const Lane denom = add(corrected(s, sqrt(second_moment)), Lane(s.eps));
    const Lane change = div(mul(Lane(s.neg_step_size), states[kExpAvg]), denom);
    param = add(param, change);
    flush(s, states);
    return change;
  }
};

}  // namespace fusedopt
