// The registry: one line an algorithm. A rule's index here is its id in the kernels' tables.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "average.h"
#include "pause.h"
#include "radam.h"
#include "scale.h"

namespace fusedopt {

template <class... R>
struct RuleList {
  static constexpr int kSize = sizeof...(R);
};

// The optimizers' first, then those that are parts of a step.
using Rules = RuleList<Adam, RAdam, Adagrad, Average, Scale, Pause>;
constexpr int kAverageRule = 3, kScaleRule = 4, kPauseRule = 5;

}  // namespace fusedopt
