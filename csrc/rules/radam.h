// RAdam (Liu et al. 2019), with all that moments.h has.
#pragma once

#include "moments.h"

namespace fusedopt {

struct RAdam : Moments {
  static constexpr const char* kName = "radam";
  enum Key { kDegenerateKey = kFirstKeyOfRule, kOptimizedKey, kNumKeys };
  static constexpr const char* kKeys[kNumKeys] = {"lr",
                                                  "betas",
                                                  "eps",
                                                  "weight_decay",
                                                  "amsgrad",
                                                  "maximize",
                                                  "decoupled_weight_decay",
                                                  "degenerate_to_sgd",
                                                  "optimized_update"};

  static const char* sparse_problem(const Moments::Options&) { return "RAdam does not support sparse gradients"; }

  enum Flag : uint32_t {
    kRectified = Moments::kFirstOfRule,    // the variance is tractable
    kStill = kRectified * 2,               // it is not, and then the parameter stays where it is
    kEpsAfterCorrection = kStill * 2,      // eps is added to the bias-corrected root
    kCorrected = kEpsAfterCorrection * 2,  // bias_correction1 is not 1 yet: a division less for most of a training
  };

  template <class T>
  struct Scalars : Moments::Scalars<T> {
    T lr, bias_correction1, rect, eps;
  };

  struct Options : Moments::Options {
    uint32_t degenerate_to_sgd, optimized_update;
  };

  template <class Group>
  static Options options(const Group& group) {
    return {Moments::options(group), group.flag(kDegenerateKey), group.flag(kOptimizedKey)};
  }

  // What a step count comes to, in double and in torch's order.
  struct Corrections {
    double bias_correction1, bias_correction2_sqrt;
    double rect;  // r_t; 0 while the variance is not tractable
  };
  FUSEDOPT_HD static Corrections corrections(const Options& options, double step) {
    const double beta2_power = power(options.beta2, step);
    const double bias_correction2 = 1 - beta2_power;
    const double rho_inf = 2 / (1 - options.beta2) - 1;
    const double rho = rho_inf - 2 * step * beta2_power / bias_correction2;
    // rho_inf - 4 is not 0 then: rho_inf >= rho.
    const double rect_squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho);
    return {1 - power(options.beta1, step), power(bias_correction2, 0.5), rho > 5 ? power(rect_squared, 0.5) : 0};
  }
  // As Adam's; but rho's distance to rho_inf is 2 * step times as large as the power.
  static constexpr bool kTabulated = true;
  static double last_step(const Options& options) { return step_of_power(options, 90); }
  static const char* problem(const Corrections& c) {
    return c.bias_correction1 > 0 && c.bias_correction2_sqrt > 0 ? nullptr : kBadStep;
  }

  template <class T, class Lr>
  FUSEDOPT_HD static Scalars<T> scalars(const Options& options, Lr lr, const Corrections& at_step,
                                        const Context& context) {
    Scalars<T> s;
    static_cast<Moments::Scalars<T>&>(s) = Moments::scalars<T>(options, lr, at_step.bias_correction2_sqrt, context);
    s.lr = static_cast<T>(lr);
    s.bias_correction1 = static_cast<T>(at_step.bias_correction1);
    s.rect = static_cast<T>(at_step.rect);
    s.eps = static_cast<T>(Common::eps(options.eps, static_cast<double>(lr)));
    const bool rectified = at_step.rect != 0;
    s.flags |= (rectified ? kRectified : 0u) | (rectified || options.degenerate_to_sgd ? 0u : kStill) |
               (options.optimized_update ? 0u : kEpsAfterCorrection) | (s.bias_correction1 != 1 ? kCorrected : 0u);
    return s;
  }

  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane grad,
                                                 Lane* states) {
    const Lane second_moment = move<variant>(s, param, grad, states);
    Lane change = states[kExpAvg];
    if (s.flags & kCorrected) change = div(change, Lane(s.bias_correction1));
    change = mul(change, Lane(s.lr));
    if (s.flags & kRectified) change = mul(mul(change, adaptive(s, sqrt(second_moment))), Lane(s.rect));
    if (s.flags & kStill) change = Lane(0);
    if (!(s.flags & kStill)) param = sub(param, change);
    flush(s, states);
    return change;
  }

 private:
  // What Adam's step size has beyond lr: the bias correction over the root.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane adaptive(const Scalars<typename Lane::Scalar>& s, Lane root) {
    const Lane one(1), correction(s.bias_correction2_sqrt), eps(s.eps);
    if (s.flags & kEpsAfterCorrection) return div(one, add(corrected(s, root), eps));
    return mul(div(one, add(root, eps)), correction);
  }
};

}  // namespace fusedopt
