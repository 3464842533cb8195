// What every rule does with a gradient before its own formula.
//
// The order of operations in all rules is that of torch.optim's for-loops, established by experiment; see
// ARCHITECTURE.md.
#pragma once

#include <cstdint>

#include "../lanes/lane.h"

namespace fusedopt {

struct Gradient {
  enum Flag : uint32_t {
    kUnscale = 1,     // multiply by inv_scale (automatic mixed precision)
    kMaximize = 2,    // ascend
    kL2Decay = 4,     // add decay * param
    kOneElement = 8,  // a sparse gradient that touches one element of all (where torch takes another way)
    kFirstOfRule = 16,
  };

  template <class T>
  struct Scalars {
    T inv_scale;
    T decay;  // weight_decay, for kL2Decay
    uint32_t flags;
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> scalars(bool unscale, double inv_scale, bool maximize, double l2_decay) {
    return {static_cast<T>(inv_scale), static_cast<T>(l2_decay),
            (unscale ? kUnscale : 0u) | (maximize ? kMaximize : 0u) | (l2_decay != 0 ? kL2Decay : 0u)};
  }

  // A value as it was computed by backward, unscaled and in the direction to descend. Of a sparse gradient, each of the
  // values that add up.
  template <class Lane>
  FUSEDOPT_HD static inline Lane value(const Scalars<typename Lane::Scalar>& s, Lane grad) {
    if (s.flags & kUnscale) grad = mul(grad, Lane(s.inv_scale));
    if (s.flags & kMaximize) grad = neg(grad);
    return grad;
  }

  // The same, with L2 decay.
  template <class Lane>
  FUSEDOPT_HD static inline Lane decayed(const Scalars<typename Lane::Scalar>& s, Lane grad, Lane param) {
    grad = value(s, grad);
    if (s.flags & kL2Decay) grad = fma(param, Lane(s.decay), grad);
    return grad;
  }
};

}  // namespace fusedopt
