// What every rule shares: what happens to a gradient before the formula, and to the moving average of the weights
// behind it.
//
// The order of operations in all rules is that of torch.optim's for-loops, established by experiment; see
// ARCHITECTURE.md.
#pragma once

#include <cstdint>

#include "../lanes/lane.h"

namespace fusedopt {

// What a step's scalars depend on beside the rule's own options.
struct Context {
  double inv_scale = 1, ema_decay = 0;
  uint32_t unscale = false;  // gradients are multiplied by inv_scale (automatic mixed precision)
  uint32_t has_ema = false;  // no padding: compared byte by byte
};

// A step count as draws know it.
FUSEDOPT_HD inline uint32_t step_of_draws(double step) {
  return step >= 0 && step < 0x1p62 ? static_cast<uint32_t>(static_cast<int64_t>(step)) : 0;
}

struct Common {
  enum Flag : uint32_t {
    kUnscale = 1,            // multiply by inv_scale
    kClip = 2,               // then by clip
    kMaximize = 4,           // ascend
    kL2Decay = 8,            // add decay * param
    kOneElement = 16,        // a sparse gradient that touches one element of all (where torch takes another way)
    kAverageFromParam = 32,  // 1 - ema_decay >= 0.5: torch's lerp then starts from the other end
    kAverageStarts = 64,     // it is what the parameter is
    kFirstOfRule = 128,
  };

  // A rule that is no optimizer's says otherwise.
  static constexpr bool kReadsGrad = true, kWritesParam = true;
  static constexpr bool kCountsSteps = true;  // and has options of its own
  static constexpr bool kHasCompany = true;   // a moving average and statistics may be wanted beside it

  // Can a state tensor be negative? It has other codes then (codecs.h).
  FUSEDOPT_HD static constexpr bool is_signed(int) { return false; }

  template <class T>
  struct Scalars {
    T inv_scale;
    T clip;   // known when all gradients have been read
    T decay;  // weight_decay, for kL2Decay
    T ema_weight;
    uint32_t flags;
    uint32_t step;  // the count, for draws
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> scalars(const Context& context, bool maximize, double l2_decay) {
    const T one_minus_decay = static_cast<T>(1 - context.ema_decay);
    const bool from_param = context.has_ema && !(one_minus_decay < T(0.5));
    return {static_cast<T>(context.inv_scale),
            T(1),
            static_cast<T>(l2_decay),
            from_param ? one_minus_decay - 1 : one_minus_decay,
            (context.unscale ? kUnscale : 0u) | (maximize ? kMaximize : 0u) | (l2_decay != 0 ? kL2Decay : 0u) |
                (from_param ? kAverageFromParam : 0u),
            0};
  }

  // eps as a step uses it. One with lr = 0 is to change nothing, not even a 0 / 0 to a NaN: torch's checkpointing makes
  // such a step, with gradients of zero, to see what state there is.
  FUSEDOPT_HD static inline double eps(double given, double lr) { return given == 0 && lr == 0 ? 1.0 : given; }

  // A value as it was computed by backward, unscaled, clipped and in the direction to descend. Of a sparse gradient,
  // each of the values that add up.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane value(const Scalars<typename Lane::Scalar>& s, Lane grad) {
    if (FUSEDOPT_RARELY(s.flags & kUnscale)) grad = mul(grad, Lane(s.inv_scale));
    if (FUSEDOPT_RARELY(s.flags & kClip)) grad = mul(grad, Lane(s.clip));
    if (FUSEDOPT_RARELY(s.flags & kMaximize)) grad = neg(grad);
    return grad;
  }

  // The same, with L2 decay.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane decayed(const Scalars<typename Lane::Scalar>& s, Lane grad, Lane param) {
    grad = value(s, grad);
    if (FUSEDOPT_RARELY(s.flags & kL2Decay)) grad = fma(param, Lane(s.decay), grad);
    return grad;
  }

  // The exponential moving average of the weights, moved towards a parameter that has been updated.
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane average(const Scalars<typename Lane::Scalar>& s, Lane ema, Lane param) {
    const Lane difference = sub(param, ema);
    if (FUSEDOPT_RARELY(s.flags & kAverageFromParam)) ema = param;
    return fma(Lane(s.ema_weight), difference, ema);
  }
};

}  // namespace fusedopt
