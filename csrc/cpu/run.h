#pragma once

#include <cstdint>
#include <functional>

#include "../table.h"

namespace fusedopt {

// Calls body(begin, end) for every piece of `unit` of [0, count), in any order, on at most max_threads threads.
// The body must not throw.
void parallel_for(int64_t count, int64_t unit, int max_threads, const std::function<void(int64_t, int64_t)>& body);

// How many threads it pays to wake for a step of this cost.
int useful_threads(int64_t cost, int max_threads);

// Updates all rows in one parallel region of at most max_threads threads. `cost` is the rows' running total; the
// bits of the result depend on none of the numbers here.
void run_rows(const TensorRow* rows, int64_t num_rows, int64_t cost, int max_threads);
// The same, but measures them, for their norm, as the options say.
void measure_rows(const TensorRow* rows, int64_t num_rows, const NormOptions& options, int64_t cost, int max_threads);

// The size of the smallest unit of work, in elements of cost.
int64_t chunk_size();
void set_chunk_size(int64_t elements);

// False where no OpenMP runtime is loaded, or in a forked child, whose parent's threads are gone: steps are serial.
bool can_use_threads();

}  // namespace fusedopt
