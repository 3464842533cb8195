// Gradients multiplied by the coefficient that clips their norm, in place: the "parameter" is a gradient.
#pragma once

#include "common.h"

namespace fusedopt {

struct Scale : Common {
  static constexpr bool kReadsGrad = false, kCountsSteps = false, kHasCompany = false;
  static constexpr int kNumVariants = 1, kSparseVariant = -1;
  static constexpr int num_states(int) { return 0; }

  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>& s, Lane& grad, Lane, Lane*) {
    return grad = mul(grad, Lane(s.clip));
  }
};

}  // namespace fusedopt
