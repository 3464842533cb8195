// The registry: one line an algorithm. A rule's index here is its id in the kernels' tables.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "radam.h"

namespace fusedopt {

template <class... R>
struct RuleList {
  static constexpr int kSize = sizeof...(R);
};

using Rules = RuleList<Adam, RAdam, Adagrad>;

}  // namespace fusedopt
