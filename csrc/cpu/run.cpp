#include "run.h"

#include <pthread.h>

#include <atomic>

#include "float_mode.h"
#include "target.h"

// torch's own OpenMP runtime: torch is imported first and makes it global, and every OpenMP runtime that torch ships
// with (GNU's, LLVM's, Intel's) exports this entry point of GNU's. So there is one pool of threads in the process, and
// this library neither links a runtime nor needs a compiler that has one.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads,
                                                    unsigned flags);

namespace fusedopt {

// Large enough that taking a unit costs nothing beside it, small enough to balance two threads.
static int64_t chunk = 16384;
// With fewer units than this for each, waking a thread takes longer than it saves.
static constexpr int64_t kUnitsPerThread = 4;

static std::atomic<bool> forked{false};
// A parallel region in a child would wait for ever for threads that fork did not copy.
[[maybe_unused]] static const int atfork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t chunk_size() { return chunk; }
void set_chunk_size(int64_t elements) { chunk = elements; }
bool can_use_threads() { return GOMP_parallel != nullptr && !forked; }

namespace {

struct Work {
  const Target& target;
  const TensorRow* rows;
  int64_t num_rows, cost, chunk;
  std::atomic<int64_t> next{0};

  static void run(void* self) {
    Work& work = *static_cast<Work*>(self);
    FloatMode mode;
    for (;;) {
      const int64_t begin = work.next.fetch_add(work.chunk, std::memory_order_relaxed);
      if (begin >= work.cost) return;
      const int64_t end = begin + work.chunk < work.cost ? begin + work.chunk : work.cost;
      work.target.run(work.rows, work.num_rows, begin, end);
    }
  }
};

}  // namespace

void run_rows(const TensorRow* rows, int64_t num_rows, int64_t cost, int max_threads) {
  if (num_rows == 0) return;
  Work work{current_target(), rows, num_rows, cost, chunk};
  const int64_t useful = cost / (chunk * kUnitsPerThread);
  const int64_t threads = useful < max_threads ? useful : max_threads;
  if (threads <= 1 || !can_use_threads()) return Work::run(&work);
  GOMP_parallel(Work::run, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace fusedopt
