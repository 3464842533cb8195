// Adam (Kingma and Ba 2014), decoupled weight decay (Loshchilov and Hutter 2017), AMSGrad (Reddi et al. 2018).
//
// The order of operations is that of torch.optim.Adam's for-loop, established by experiment; see ARCHITECTURE.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../lanes/lane.h"

namespace fusedopt {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kNoSparse = "Adam does not support sparse gradients, please consider SparseAdam instead";
  static constexpr int kNumStates = 3;
  static constexpr const char* kStateNames[kNumStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kExpAvg = 0, kExpAvgSq = 1, kMaxExpAvgSq = 2;

  // The sets of memory streams this rule comes in. Everything else about a group is a branch on its flags.
  enum Variant { kPlain, kAmsgrad, kNumVariants };
  static constexpr int num_states(int variant) { return variant == kAmsgrad ? 3 : 2; }

  enum Flag : uint32_t {
    kUnscale = 1,           // multiply the gradient by inv_scale first (automatic mixed precision)
    kMaximize = 2,          // ascend
    kL2Decay = 4,           // grad += weight_decay * param
    kDecoupledDecay = 8,    // param *= 1 - lr * weight_decay
    kLerpFromGrad = 16,     // 1 - beta1 >= 0.5: torch's lerp then starts from the other end
    kFlushSubnormals = 32,  // moments below the smallest normal number are stored as zero
  };

  template <class T>
  struct Scalars {
    T inv_scale, weight_decay, decay, one_minus_beta1, neg_lerp_rest, beta2, one_minus_beta2;
    T neg_step_size, bias_correction2_sqrt, eps;
    uint32_t flags;
  };

  // A parameter group's options, read once a step.
  enum Key { kLr, kBetas, kEps, kWeightDecay, kAmsgradKey, kMaximizeKey, kDecoupledKey, kNumKeys };
  static constexpr const char* kKeys[kNumKeys] = {
      "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"};

  template <class Group>
  static int variant(const Group& group) {
    return group.flag(kAmsgradKey) ? kAmsgrad : kPlain;
  }

  struct Options {
    double beta1, beta2, eps, weight_decay;
    uint32_t maximize, decoupled_weight_decay;  // no padding: options are compared byte by byte
  };

  template <class Group>
  static Options options(const Group& group) {
    return {group.number(kBetas, 0),    group.number(kBetas, 1),  group.number(kEps),
            group.number(kWeightDecay), group.flag(kMaximizeKey), group.flag(kDecoupledKey)};
  }

  // What a step count comes to, in double and in torch's order.
  struct Corrections {
    double bias_correction1, bias_correction2_sqrt;
  };
  FUSEDOPT_HD static Corrections corrections(const Options& options, double step) {
    return {1 - std::pow(options.beta1, step),
            std::pow(1 - std::pow(options.beta2, step), 0.5)};  // Python's **: not always sqrt's bits
  }
  // From this step count on the corrections stay what they are: 1, since beta ** step is below 2 ** -54.
  static double last_step(const Options& options) {
    return std::ceil(-54 / std::log2(std::max(options.beta1, options.beta2)));
  }
  static const char* problem(const Corrections& c) {
    return c.bias_correction1 == 0 ? "Adam: beta1 ** step is 1, so the step size is infinite" : nullptr;
  }

  // In double and in torch's order; each scalar is rounded once, here, to opmath T.
  // `Lr` is double, or a type that rounds every operation as torch does for an lr that is a tensor of some dtype.
  template <class T, class Lr>
  FUSEDOPT_HD static Scalars<T> scalars(const Options& options, Lr lr, const Corrections& at_step, bool unscale,
                                        double inv_scale) {
    const double one_minus_beta1 = 1 - options.beta1;
    const bool decays = options.weight_decay != 0;

    Scalars<T> s;
    s.inv_scale = static_cast<T>(inv_scale);
    s.weight_decay = static_cast<T>(options.weight_decay);
    s.decay = static_cast<T>(1 - lr * options.weight_decay);
    s.one_minus_beta1 = static_cast<T>(one_minus_beta1);
    s.neg_lerp_rest = s.one_minus_beta1 - 1;
    s.beta2 = static_cast<T>(options.beta2);
    s.one_minus_beta2 = static_cast<T>(1 - options.beta2);
    s.neg_step_size = static_cast<T>(-(lr / at_step.bias_correction1));
    s.bias_correction2_sqrt = static_cast<T>(at_step.bias_correction2_sqrt);
    s.eps = static_cast<T>(options.eps);
    s.flags = (unscale ? kUnscale : 0u) | (options.maximize ? kMaximize : 0u) |
              (decays && !options.decoupled_weight_decay ? kL2Decay : 0u) |
              (decays && options.decoupled_weight_decay ? kDecoupledDecay : 0u) |
              (s.one_minus_beta1 < T(0.5) ? 0u : kLerpFromGrad) | (options.eps < 1e-10 ? 0u : kFlushSubnormals);
    return s;
  }

  // The update of one lane. states: exp_avg, exp_avg_sq and, in the AMSGrad variant, max_exp_avg_sq.
  template <int variant, class Lane>
  FUSEDOPT_HD static inline void update(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane grad, Lane* states) {
    Lane& exp_avg = states[kExpAvg];
    Lane& exp_avg_sq = states[kExpAvgSq];

    if (s.flags & kUnscale) grad = mul(grad, Lane(s.inv_scale));
    if (s.flags & kMaximize) grad = neg(grad);
    if (s.flags & kL2Decay) grad = fma(param, Lane(s.weight_decay), grad);
    if (s.flags & kDecoupledDecay) param = mul(param, Lane(s.decay));

    const Lane difference = sub(grad, exp_avg);
    exp_avg = s.flags & kLerpFromGrad ? fma(Lane(s.neg_lerp_rest), difference, grad)
                                      : fma(Lane(s.one_minus_beta1), difference, exp_avg);
    // Not grad * grad first: that overflows from |grad| > 1.8e19.
    exp_avg_sq = fma(mul(Lane(s.one_minus_beta2), grad), grad, mul(exp_avg_sq, Lane(s.beta2)));

    Lane second_moment = exp_avg_sq;
    if constexpr (variant == kAmsgrad) {
      second_moment = states[kMaxExpAvgSq] = maximum(states[kMaxExpAvgSq], exp_avg_sq);
    }
    const Lane denom = add(div(sqrt(second_moment), Lane(s.bias_correction2_sqrt)), Lane(s.eps));
    param = add(param, div(mul(Lane(s.neg_step_size), exp_avg), denom));

    if (s.flags & kFlushSubnormals) {
      exp_avg = flush_subnormal(exp_avg);
      exp_avg_sq = flush_subnormal(exp_avg_sq);
    }
  }
};

}  // namespace fusedopt
