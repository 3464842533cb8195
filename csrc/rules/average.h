// The moving average of the weights alone: of parameters that sit a step out, and of those with sparse gradients.
#pragma once

#include "common.h"

namespace fusedopt {

struct Average : Common {
  static constexpr bool kReadsGrad = false, kWritesParam = false, kCountsSteps = false, kHasCompany = false;
  static constexpr int kNumVariants = 1, kSparseVariant = -1;
  static constexpr int num_states(int) { return 1; }

  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>& s, Lane& param, Lane,
                                                 Lane* ema) {
    const Lane moved = average(s, *ema, param);
    *ema = param;
    if (!(s.flags & kAverageStarts)) *ema = moved;
    return param;
  }
};

}  // namespace fusedopt
