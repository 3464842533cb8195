#pragma once

#include <cstdint>

#include "../table.h"

namespace fusedopt {

// Updates all rows in one parallel region of at most max_threads threads. `cost` is the rows' running total; the
// bits of the result depend on none of the numbers here.
void run_rows(const TensorRow* rows, int64_t num_rows, int64_t cost, int max_threads);

// The size of a unit of work, in elements of cost.
int64_t chunk_size();
void set_chunk_size(int64_t elements);

// False where no OpenMP runtime is loaded, or in a forked child, whose parent's threads are gone: steps are serial.
bool can_use_threads();

}  // namespace fusedopt
