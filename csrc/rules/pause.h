// A step that is skipped: nothing moves, and statistics can be had all the same.
#pragma once

#include "common.h"

namespace fusedopt {

struct Pause : Common {
  static constexpr bool kReadsGrad = false, kWritesParam = false, kCountsSteps = false;
  static constexpr int kNumVariants = 2, kSparseVariant = 1;
  static constexpr int num_states(int) { return 0; }

  template <int variant, class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane update(const Scalars<typename Lane::Scalar>&, Lane&, Lane, Lane*) {
    return Lane(0);
  }
};

}  // namespace fusedopt
