// What Adam and RAdam share: the exponential moving averages of the gradient and of its square (Kingma and Ba 2014),
// the latter's running maximum (AMSGrad, Reddi et al. 2018), and weight decay, L2 or decoupled (Loshchilov and Hutter
// 2017).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "common.h"
#include "quotient.h"

namespace fusedopt {

struct Moments : Common {
  static constexpr int kNumStates = 3;
  static constexpr const char* kStateNames[kNumStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kExpAvg = 0, kExpAvgSq = 1, kMaxExpAvgSq = 2;

  FUSEDOPT_HD static constexpr bool is_signed(int state) { return state == kExpAvg; }

  // The sets of memory streams. Everything else about a group is a branch on its flags.
  enum Variant { kPlain, kAmsgrad, kNumVariants };
  static constexpr int num_states(int variant) { return variant == kAmsgrad ? 3 : 2; }
  static constexpr int kSparseVariant = -1;  // none for sparse gradients

  enum Flag : uint32_t {
    kDecoupledDecay = Common::kFirstOfRule,  // param *= decay, which is then 1 - lr * weight_decay
    kLerpFromGrad = kDecoupledDecay * 2,     // 1 - beta1 >= 0.5: torch's lerp then starts from the other end
    kFlushSubnormals = kLerpFromGrad * 2,    // moments below the smallest normal number are stored as zero
    kHasReciprocal = kFlushSubnormals * 2,   // of bias_correction2_sqrt, for who multiplies faster
    kFirstOfRule = kHasReciprocal * 2,
  };

  template <class T>
  struct Scalars : Common::Scalars<T> {
    T lerp_weight, beta2, one_minus_beta2, bias_correction2_sqrt;
    Reciprocal reciprocal;
  };

  // A parameter group's options, read once a step.
  enum Key { kLr, kBetas, kEps, kWeightDecay, kAmsgradKey, kMaximizeKey, kDecoupledKey, kFirstKeyOfRule };

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

  static constexpr const char* kBadStep =
      "beta1 ** step or beta2 ** step is not below 1, so the step size is not finite: a parameter's state['step'] must "
      "be 0 or more";

  // What the corrections for a step count depend on.
  using Powers = std::array<double, 2>;
  static Powers powers(const Options& options) { return {options.beta1, options.beta2}; }

  // Python's **. One function on a GPU: inlined everywhere it would be most of the kernel.
#ifdef __CUDA_ARCH__
  __device__ __noinline__
#endif
      static double power(double base, double exponent) {
    return std::pow(base, exponent);
  }

  // The step count from which on beta ** step is below 2 ** -bits, for both betas.
  static double step_of_power(const Options& options, double bits) {
    return std::ceil(-bits / std::log2(std::max(options.beta1, options.beta2)));
  }

  // In double and in torch's order; each scalar is rounded once, here, to opmath T.
  // `Lr` is double, or a type that rounds every operation as torch does for an lr that is a tensor of some dtype.
  template <class T, class Lr>
  FUSEDOPT_HD static Scalars<T> scalars(const Options& options, Lr lr, double bias_correction2_sqrt,
                                        const Context& context) {
    const T one_minus_beta1 = static_cast<T>(1 - options.beta1);
    const bool decoupled = options.decoupled_weight_decay;

    Scalars<T> s;
    static_cast<Common::Scalars<T>&>(s) =
        Common::scalars<T>(context, options.maximize, decoupled ? 0 : options.weight_decay);
    if (decoupled) s.decay = static_cast<T>(1 - lr * options.weight_decay);
    const bool from_grad = !(one_minus_beta1 < T(0.5));
    s.lerp_weight = from_grad ? one_minus_beta1 - 1 : one_minus_beta1;
    s.beta2 = static_cast<T>(options.beta2);
    s.one_minus_beta2 = static_cast<T>(1 - options.beta2);
    s.flags |= (decoupled && options.weight_decay != 0 ? kDecoupledDecay : 0u) | (from_grad ? kLerpFromGrad : 0u) |
               (options.eps < 1e-10 ? 0u : kFlushSubnormals);
    s.bias_correction2_sqrt = static_cast<T>(bias_correction2_sqrt);
    s.reciprocal = {};
#ifndef __CUDACC__
    if constexpr (std::is_same_v<T, float>) {
      if (find_reciprocal(s.bias_correction2_sqrt, &s.reciprocal)) s.flags |= kHasReciprocal;
    }
#endif
    return s;
  }

  // sqrt(exp_avg_sq), or of its maximum, without the bias.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane corrected(const Scalars<typename Lane::Scalar>& s, Lane root) {
    if (Lane::kPrefersFma && FUSEDOPT_MOSTLY(s.flags & kHasReciprocal))
      return fma(root, Lane(s.reciprocal.high), mul(root, Lane(s.reciprocal.low)));
    return div(root, Lane(s.bias_correction2_sqrt));
  }

  // Decays the parameter and moves the averages. Returns what belongs under the root: exp_avg_sq or its maximum.
  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane move(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane grad,
                                               Lane* states) {
    Lane& exp_avg = states[kExpAvg];
    Lane& exp_avg_sq = states[kExpAvgSq];

    grad = decayed(s, grad, param);
    if (FUSEDOPT_MOSTLY(s.flags & kDecoupledDecay)) param = mul(param, Lane(s.decay));

    const Lane difference = sub(grad, exp_avg);
    if (FUSEDOPT_RARELY(s.flags & kLerpFromGrad)) exp_avg = grad;
    exp_avg = fma(Lane(s.lerp_weight), difference, exp_avg);
    // Not grad * grad first: that overflows from |grad| > 1.8e19.
    exp_avg_sq = fma(mul(Lane(s.one_minus_beta2), grad), grad, mul(exp_avg_sq, Lane(s.beta2)));

    if constexpr (variant == kAmsgrad) {
      return states[kMaxExpAvgSq] = maximum(states[kMaxExpAvgSq], exp_avg_sq);
    }
    return exp_avg_sq;
  }

  // When the parameter has been updated from them.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE void flush(const Scalars<typename Lane::Scalar>& s, Lane* states) {
    if (FUSEDOPT_MOSTLY(s.flags & kFlushSubnormals)) {
      states[kExpAvg] = flush_subnormal(states[kExpAvg]);
      states[kExpAvgSq] = flush_subnormal(states[kExpAvgSq]);
    }
  }
};

}  // namespace fusedopt
