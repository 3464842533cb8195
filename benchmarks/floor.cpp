// The memory streams of a step with no arithmetic worth the name: what any kernel must at least take.
//
// `streams` is a row of num_streams pointers for each tensor: the gradient, which is only read, then the param and its
// state, which are read and written back. They keep their values (`mask` is 0, which the compiler cannot know), so the
// floor may run on the memory of the optimizers that it is compared with. Threads come from torch's own OpenMP pool.
#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

namespace {

// A cache line of each stream in turn, as an optimizer's kernel goes; the compiler takes its widest registers.
typedef uint32_t Line __attribute__((vector_size(64), aligned(4), may_alias));

struct Work {
  uint32_t* const* streams;
  const int64_t* sizes;
  int64_t num_tensors, total, chunk;
  int num_streams;
  uint32_t mask;
  std::atomic<int64_t> next{0};

  template <int kWritten>
  void span(uint32_t* const* streams, int64_t begin, int64_t end) const {
    uint32_t* stream[kWritten + 1];
    for (int k = 0; k <= kWritten; ++k) stream[k] = streams[k];
    constexpr int64_t kWidth = sizeof(Line) / sizeof(uint32_t);
    const uint32_t mask = this->mask;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const Line read = *reinterpret_cast<const Line*>(stream[0] + i) & mask;
      Line written[kWritten];
      for (int k = 0; k < kWritten; ++k) written[k] = *reinterpret_cast<const Line*>(stream[k + 1] + i) ^ read;
      for (int k = 0; k < kWritten; ++k) *reinterpret_cast<Line*>(stream[k + 1] + i) = written[k];
    }
    for (; i < end; ++i)
      for (int k = 0; k < kWritten; ++k) stream[k + 1][i] ^= stream[0][i] & mask;
  }

  // Reads only, in four places by turns, which is a tenth faster than in one. What is read under the mask, which is
  // nothing, would be written.
  void read(uint32_t* const* streams, int64_t begin, int64_t end) const {
    constexpr int64_t kWidth = sizeof(Line) / sizeof(uint32_t);
    constexpr int kPlaces = 4;
    uint32_t* const from = streams[0] + begin;
    const int64_t apart = (end - begin) / kPlaces / kWidth * kWidth;
    Line lines[kPlaces] = {};
    for (int64_t i = 0; i < apart; i += kWidth)
      for (int k = 0; k < kPlaces; ++k) lines[k] |= *reinterpret_cast<const Line*>(from + k * apart + i);
    const Line all = lines[0] | lines[1] | lines[2] | lines[3];
    uint32_t seen = 0;
    for (int64_t k = 0; k < kWidth; ++k) seen |= all[k];
    for (int64_t i = kPlaces * apart; i < end - begin; ++i) seen |= from[i];
    if (seen & mask) *from = seen;
  }

  void run(int64_t begin, int64_t end) const {
    int64_t start = 0;
    for (int64_t t = 0; t < num_tensors && start < end; start += sizes[t++]) {
      const int64_t from = begin > start ? begin - start : 0;
      const int64_t to = end - start < sizes[t] ? end - start : sizes[t];
      if (from >= to) continue;
      uint32_t* const* at = streams + t * num_streams;
      if (num_streams == 1) {
        read(at, from, to);
        continue;
      }
      num_streams == 3 ? span<2>(at, from, to) : num_streams == 4 ? span<3>(at, from, to) : span<4>(at, from, to);
    }
  }

  static void body(void* self) {
    Work& work = *static_cast<Work*>(self);
    for (;;) {
      const int64_t begin = work.next.fetch_add(work.chunk, std::memory_order_relaxed);
      if (begin >= work.total) return;
      work.run(begin, begin + work.chunk < work.total ? begin + work.chunk : work.total);
    }
  }
};

}  // namespace

// num_streams is 1 (gradients alone), 3 (Adagrad), 4 (Adam) or 5 (AMSGrad).
extern "C" void fusedopt_floor(uint32_t* const* streams, const int64_t* sizes, int64_t num_tensors, int num_streams,
                               int64_t chunk, int num_threads, uint32_t mask) {
  Work work{streams, sizes, num_tensors, 0, chunk, num_streams, mask};
  for (int64_t t = 0; t < num_tensors; ++t) work.total += sizes[t];
  GOMP_parallel(Work::body, &work, static_cast<unsigned>(num_threads), 0);
}

// The arithmetic of Adam's formula as it stands, two divisions and a square root, of values that stay in the caches.
extern "C" void fusedopt_arithmetic(float* values, int64_t count, float numerator, float divisor) {
  for (int64_t i = 0; i < count; ++i) values[i] = numerator / (__builtin_sqrtf(values[i]) / divisor);
}
