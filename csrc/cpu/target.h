// The instruction sets this build holds, and the choice among them.
#pragma once

#include <cstdint>

#include "../table.h"

namespace fusedopt {

struct Target {
  const char* name;
  // Is this target able to run on this processor?
  bool (*supported)();
  UpdateFn (*find)(int rule, int variant, DType dtype);
  MeasureFn (*find_norm)(DType dtype);
  // Updates what lies in [begin, end) of the rows' running total of cost; or, with options, measures it.
  void (*run)(const TensorRow* rows, int64_t num_rows, const NormOptions* norm, int64_t begin, int64_t end);
  // Units of work that this target's own code has run: shows that a forced target is the one in use.
  int64_t (*units_run)();
};

// A row's share of the running total: its elements, and a constant for the work around them.
constexpr int64_t kRowCost = 64;
// Pieces of a row begin at multiples of this many elements: whole cache lines, if the row begins at one.
constexpr int64_t kPieceAlignment = 128;

// Best first; ends with the portable one, which runs everywhere.
extern const Target* const kTargets[];
extern const int kNumTargets;

const Target& current_target();
// "default", "avx2" or "avx512"; false if this build or this processor does not have it.
bool set_current_target(const char* name);

}  // namespace fusedopt
