#include "run.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "float_mode.h"
#include "target.h"

// torch's own OpenMP runtime: torch is imported first and makes it global, and every OpenMP runtime that torch ships
// with (GNU's, LLVM's, Intel's) exports this entry point of GNU's. So there is one pool of threads in the process, and
// this library neither links a runtime nor needs a compiler that has one.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads,
                                                    unsigned flags);

namespace fusedopt {

// The smallest unit: large enough that taking one costs nothing beside it.
static int64_t chunk = 16384;
// With less than this many of them for each, waking a thread takes longer than it saves.
static constexpr int64_t kUnitsPerThread = 2;
// A thread that stays in one place for longer is up to a fifth faster where memory is; so units grow with the step, to
// this many of the smallest, as long as there are enough of them to share out evenly.
static constexpr int64_t kLargestUnit = 16;
static constexpr int64_t kEnoughUnits = 8;

static std::atomic<bool> forked{false};
// A parallel region in a child would wait for ever for threads that fork did not copy.
[[maybe_unused]] static const int atfork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t chunk_size() { return chunk; }
void set_chunk_size(int64_t elements) { chunk = elements; }
bool can_use_threads() { return GOMP_parallel != nullptr && !forked; }

namespace {

struct Work {
  int64_t count, unit;
  const std::function<void(int64_t, int64_t)>& body;
  std::atomic<int64_t> next{0};

  static void run(void* self) {
    Work& work = *static_cast<Work*>(self);
    FloatMode mode;
    for (;;) {
      const int64_t begin = work.next.fetch_add(work.unit, std::memory_order_relaxed);
      if (begin >= work.count) return;
      work.body(begin, begin + work.unit < work.count ? begin + work.unit : work.count);
    }
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t unit, int max_threads, const std::function<void(int64_t, int64_t)>& body) {
  Work work{count, unit, body};
  if (max_threads <= 1 || count <= unit || !can_use_threads()) return Work::run(&work);
  GOMP_parallel(Work::run, &work, static_cast<unsigned>(max_threads), 0);
}

int useful_threads(int64_t cost, int max_threads) {
  const int64_t useful = cost / (chunk * kUnitsPerThread);
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(useful, 1), max_threads));
}

static void run(const TensorRow* rows, int64_t num_rows, const NormOptions* norm, int64_t cost, int max_threads) {
  if (num_rows == 0) return;
  const Target& target = current_target();
  const int threads = useful_threads(cost, max_threads);
  const int64_t unit = std::min(std::max(cost / (threads * kEnoughUnits), chunk), chunk * kLargestUnit);
  parallel_for(cost, unit, threads, [&](int64_t begin, int64_t end) { target.run(rows, num_rows, norm, begin, end); });
}

void run_rows(const TensorRow* rows, int64_t num_rows, int64_t cost, int max_threads) {
  run(rows, num_rows, nullptr, cost, max_threads);
}

void measure_rows(const TensorRow* rows, int64_t num_rows, const NormOptions& options, int64_t cost, int max_threads) {
  run(rows, num_rows, &options, cost, max_threads);
}

}  // namespace fusedopt
