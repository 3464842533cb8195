// The kernels: what one thread, or one warp, does. No launch syntax, no host code: tests/cuda_on_host compiles this
// very file for the host.
#pragma once

#include <cmath>
#include <type_traits>

#include "../lanes/scalar.h"
#include "../rules/rules.h"
#include "table.h"

namespace fusedopt {
namespace cuda {

#ifdef __CUDACC__
#define FUSEDOPT_DEVICE __device__ __forceinline__
#define FUSEDOPT_DEVICE_CALL __device__ __noinline__
#else
#define FUSEDOPT_DEVICE inline
#define FUSEDOPT_DEVICE_CALL inline
#endif

// An address read from memory could be of any kind to the compiler; this one is of global memory.
template <class T>
FUSEDOPT_DEVICE T* global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

struct alignas(16) Vector {
  uint32_t word[4];
};

// Element `first` and those behind it of a vector of storage type S as a lane of opmath values, and back.
template <class S, class Lane>
FUSEDOPT_DEVICE Lane unpack(const Vector& vector, int first) {
  S values[sizeof(Vector) / sizeof(S)];
  std::memcpy(values, &vector, sizeof vector);
  return Lane::each([&](int k) { return Lane::widen(values[first + k]); });
}
template <class S, class Lane>
FUSEDOPT_DEVICE void pack(const Lane& lane, Vector* vector, int first) {
  S values[sizeof(Vector) / sizeof(S)];
  std::memcpy(values, vector, sizeof *vector);
  for (int k = 0; k < Lane::kWidth; ++k) values[first + k] = Lane::narrow(lane.v[k], S{});
  std::memcpy(vector, values, sizeof *vector);
}

// A sum over the lanes of a warp, added up by halves: lane 0 has it. The host runs a warp as one thread.
template <class Part, class F>
FUSEDOPT_DEVICE Part warp_sum(int lane, F part_of_lane) {
#ifdef __CUDA_ARCH__
  Part mine = part_of_lane(lane);
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    uint32_t words[sizeof(Part) / 4];
    std::memcpy(words, &mine, sizeof mine);
#pragma unroll
    for (uint32_t& word : words) word = __shfl_down_sync(~0u, word, apart);
    Part other;
    std::memcpy(&other, words, sizeof other);
    mine = combine(mine, other);
  }
  return mine;
#else
  (void)lane;
  Part parts[32];
  for (int k = 0; k < 32; ++k) parts[k] = part_of_lane(k);
  for (int apart = 16; apart > 0; apart /= 2) {
    for (int k = 0; k < apart; ++k) parts[k] = combine(parts[k], parts[k + apart]);
  }
  return parts[0];
#endif
}

// What another block may just have written.
template <class Part>
FUSEDOPT_DEVICE Part fresh(const Part* at) {
#ifdef __CUDA_ARCH__
  uint64_t words[sizeof(Part) / 8];
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(Part) / 8); ++k)
    words[k] = *(reinterpret_cast<const volatile uint64_t*>(global(at)) + k);
  Part part;
  std::memcpy(&part, words, sizeof part);
  return part;
#else
  return *at;
#endif
}

// Where the first streams have element i of a row, or of a row of a sparse gradient.
template <int num_streams>
FUSEDOPT_DEVICE void find(const Row& row, const Layout::Dim* dims, int64_t i, int64_t* offset) {
#pragma unroll
  for (int k = 0; k < num_streams; ++k) offset[k] = row.ndim == 0 ? i : 0;
  for (int64_t d = row.layout + row.ndim - 1; d >= row.layout && row.ndim > 0; --d) {
    const Layout::Dim& dim = *global(dims + d);
    const int64_t index = i % dim.size;
    i /= dim.size;
#pragma unroll
    for (int k = 0; k < num_streams; ++k) offset[k] += index * dim.stride[k];
  }
}

// One element's part in the statistics.
template <class T>
FUSEDOPT_DEVICE void include(StatsPart* mine, T grad, T before, T after, T change) {
  using namespace portable;
  const double g = static_cast<double>(grad), now = static_cast<double>(after);
  const double difference = sub_one(now, static_cast<double>(before));
  mine->grad = fma_one(g, g, mine->grad);
  mine->param = fma_one(now, now, mine->param);
  mine->change = fma_one(difference, difference, mine->change);
  const T ratio =
      before == 0 || before - before != 0 ? T(0) : div_one(std::fabs(sub_one(after, before)), std::fabs(before));
  mine->ratio = combine(NormPart{0, mine->ratio}, NormPart{0, static_cast<double>(ratio)}).largest;
  mine->nonfinite += !(grad - grad == 0);
  mine->lost += change != 0 && difference == 0;
}

// Adds what each thread of a block has seen to the chunk's part, which the first thread writes.
FUSEDOPT_DEVICE void add_stats(const StatsPart& mine, StatsPart* part, int thread) {
#ifdef __CUDA_ARCH__
  __shared__ StatsPart warps[kThreads / 32];
  const StatsPart sum = warp_sum<StatsPart>(thread % 32, [&](int) { return mine; });
  if (thread % 32 == 0) warps[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    StatsPart all = *global(part);
    for (int w = 0; w < kThreads / 32; ++w) all = combine(all, warps[w]);
    *global(part) = all;
  }
  __syncthreads();
#else
  (void)thread;
  *part = combine(*part, mine);
#endif
}

}  // namespace cuda
}  // namespace fusedopt

#include "form.cuh"

namespace fusedopt {
namespace cuda {

// The parameter and its state in storage type S, the gradient in the same. kFull: with a moving average of the weights
// and statistics, where they are wanted.
template <class Rule, int variant, class S, class T, bool full>
struct Update {
  static constexpr bool kFull = full && Rule::kHasCompany;
  static constexpr int kNumStates = Rule::num_states(variant);
  static constexpr int kNumStreams = kState + kNumStates;
  static constexpr int kEma = kNumStreams;  // the stream behind them
  static constexpr bool kIsSparse = variant == Rule::kSparseVariant;
  using Scalars = typename Rule::template Scalars<T>;

  // A vector of each stream at a time: the loads of one iteration, times the threads that a multiprocessor holds, are
  // several times what must be in flight to use all of the memory's bandwidth.
  static constexpr int kWidth = sizeof(Vector) / sizeof(S);

  // The average moved towards a parameter as it is stored.
  template <class Lane>
  FUSEDOPT_DEVICE static Lane averaged(const Scalars& s, Ema mode, Lane ema, Lane param) {
    const Lane moved = Common::average(s, ema, param);
    ema = param;
    if (mode == Ema::kMove) ema = moved;
    return ema;
  }
  // As computed, not clipped: what statistics are about.
  template <class Lane>
  FUSEDOPT_DEVICE static Lane unclipped(Common::Scalars<T> s, Lane grad) {
    s.flags &= Common::kUnscale;
    return Common::value(s, grad);
  }

  // `stats`: the chunk's part, null if they are not wanted.
  FUSEDOPT_DEVICE static void vectors(const Scalars& s, std::byte* const* data, Ema ema, StatsPart* stats,
                                      int64_t begin, int64_t end, int thread) {
    StatsPart mine{};
    // No more than four elements are worked on at once: more would need too many registers.
    using Lane = portable::Lane<T, (kWidth < 4 ? kWidth : 4)>;
    for (int64_t i = begin + thread * kWidth; i < end; i += kThreads * kWidth) {
      Vector vector[kNumStreams + kFull];
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) {
        if (k == kGrad && !Rule::kReadsGrad && !kFull) continue;
        vector[k] = reinterpret_cast<const Vector*>(global(data[k]) + i * sizeof(S))[0];
      }
      const bool has_ema = kFull && ema != Ema::kNone;
      if (has_ema) vector[kEma] = reinterpret_cast<const Vector*>(global(data[kEma]) + i * sizeof(S))[0];
#pragma unroll
      for (int first = 0; first < kWidth; first += Lane::kWidth) {
        Lane param = unpack<S, Lane>(vector[kParam], first);
        Lane states[kNumStates + 1];
#pragma unroll
        for (int k = 0; k < kNumStates; ++k) states[k] = unpack<S, Lane>(vector[kState + k], first);
        const Lane before = param, grad = unpack<S, Lane>(vector[kGrad], first);
        const Lane change = Rule::template update<variant>(s, param, grad, states);
        pack<S>(param, &vector[kParam], first);
#pragma unroll
        for (int k = 0; k < kNumStates; ++k) pack<S>(states[k], &vector[kState + k], first);
        if constexpr (kFull) {
          const Lane after = unpack<S, Lane>(vector[kParam], first);
          if (has_ema) pack<S>(averaged(s, ema, unpack<S, Lane>(vector[kEma], first), after), &vector[kEma], first);
          if (stats) {
            const Lane g = unclipped(s, grad);
#pragma unroll
            for (int k = 0; k < Lane::kWidth; ++k) include(&mine, g.v[k], before.v[k], after.v[k], change.v[k]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) {
        if (k == kGrad || (k == kParam && !Rule::kWritesParam)) continue;
        reinterpret_cast<Vector*>(global(data[k]) + i * sizeof(S))[0] = vector[k];
      }
      if (has_ema) reinterpret_cast<Vector*>(global(data[kEma]) + i * sizeof(S))[0] = vector[kEma];
    }
    if (kFull && stats) add_stats(mine, stats, thread);
  }

  // `at`: where each stream has it.
  FUSEDOPT_DEVICE static void element(const Scalars& s, S* const* at, Ema ema, bool stats, StatsPart* mine) {
    using Lane = portable::Lane<T, 1>;
    Lane param(Lane::widen(*global(at[kParam])));
    Lane grad(T(0));
    if (Rule::kReadsGrad || kFull) grad = Lane(Lane::widen(*global(at[kGrad])));
    const Lane before = param, computed = grad;
    if constexpr (kIsSparse) grad = Common::value(s, grad);
    Lane states[kNumStates + 1];
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) states[k] = Lane(Lane::widen(*global(at[kState + k])));
    const Lane change = Rule::template update<variant>(s, param, grad, states);
    const S stored = Lane::narrow(param.v[0], S{});
    if constexpr (Rule::kWritesParam) *global(at[kParam]) = stored;
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) *global(at[kState + k]) = Lane::narrow(states[k].v[0], S{});
    if constexpr (kFull) {
      const Lane after(Lane::widen(stored));
      if (ema != Ema::kNone) {
        const Lane old(Lane::widen(*global(at[kEma])));
        *global(at[kEma]) = Lane::narrow(averaged(s, ema, old, after).v[0], S{});
      }
      if (stats) include(mine, unclipped(s, computed).v[0], before.v[0], after.v[0], change.v[0]);
    }
  }

  // One element a thread: strided or misaligned streams, and what is left of a row behind its last whole vector. Not
  // inlined: its registers would count for the rest.
  FUSEDOPT_DEVICE_CALL static void elements(const Scalars s, const Row* row_at, std::byte* grad,
                                            const Layout::Dim* dims, Ema ema, StatsPart* stats, int64_t begin,
                                            int64_t end, int thread) {
    const Row& row = *global(row_at);
    StatsPart mine{};
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      int64_t offset[kNumStreams + kFull];
      find<kNumStreams + kFull>(row, dims, i, offset);
      element_at(s, row, grad, offset, ema, stats != nullptr, &mine);
    }
    if (kFull && stats) add_stats(mine, stats, thread);
  }

  // The same for a sparse gradient, whose indices are in order, each but once. One that is out of range cannot be told
  // to the host, and is left out.
  FUSEDOPT_DEVICE_CALL static void sparse(Scalars s, const Row* row_at, std::byte* grad, const SparseGrad* sparse_at,
                                          const Layout::Dim* dims, StatsPart* stats, int64_t begin, int64_t end,
                                          int thread) {
    const Row& row = *global(row_at);
    const SparseGrad& sparse = *global(sparse_at);
    if (sparse.is_one_element) s.flags |= Common::kOneElement;
    const Layout::Dim* outer = dims + row.layout - sparse.num_dims;
    StatsPart mine{};
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      const int64_t value = i / sparse.row_numel;
      int64_t offset[kNumStreams + kFull];
      find<kNumStreams + kFull>(row, dims, i % sparse.row_numel, offset);
      offset[kGrad] += value * sparse.grad_stride;
      bool is_inside = true;
      for (int d = 0; d < sparse.num_dims; ++d) {
        const Layout::Dim& dim = *global(outer + d);
        const int64_t index = *global(sparse.indices + d * sparse.dim_stride + value * sparse.value_stride);
        is_inside &= index >= 0 && index < dim.size;
#pragma unroll
        for (int k = 0; k < kNumStreams; ++k) offset[k] += index * dim.stride[k];
      }
      if (is_inside) element_at(s, row, grad, offset, Ema::kNone, stats != nullptr, &mine);
    }
    if (kFull && stats) add_stats(mine, stats, thread);
  }

  FUSEDOPT_DEVICE static void element_at(const Scalars& s, const Row& row, std::byte* grad, const int64_t* offset,
                                         Ema ema, bool stats, StatsPart* mine) {
    S* at[kNumStreams + kFull];
#pragma unroll
    for (int k = 0; k < kNumStreams + kFull; ++k)
      at[k] = reinterpret_cast<S*>(k == kGrad ? grad : row.data[k]) + offset[k];
    element(s, at, ema, stats, mine);
  }

  // Elements [begin, end) of a row.
  FUSEDOPT_DEVICE static void run(const Scalars& s, const Row& row, std::byte* grad, const Where& table, Ema ema,
                                  StatsPart* stats, int64_t begin, int64_t end, int thread) {
    if constexpr (kIsSparse)
      return sparse(s, &row, grad, table.sparse + row.sparse, table.dims, stats, begin, end, thread);
    std::byte* data[kNumStreams + kFull];
    uintptr_t bits = 0;
#pragma unroll
    for (int k = 0; k < kNumStreams + kFull; ++k) {
      data[k] = k == kGrad ? grad : row.data[k];
      if (k != kEma || ema != Ema::kNone) bits |= reinterpret_cast<uintptr_t>(data[k]);
    }
    if (row.layout < 0 && bits % sizeof(Vector) == 0) {
      const int64_t whole = begin + (end - begin) / kWidth * kWidth;
      vectors(s, data, ema, stats, begin, whole, thread);
      begin = whole;
    }
    if (begin < end) elements(s, &row, grad, table.dims, ema, stats, begin, end, thread);
  }
};

FUSEDOPT_DEVICE double number_at(const void* at, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return *global(static_cast<const double*>(at));
    case DType::kFloat32: return *global(static_cast<const float*>(at));
    case DType::kBFloat16: return to_float(*global(static_cast<const BFloat16*>(at)));
    case DType::kFloat16: return to_float(*global(static_cast<const Half*>(at)));
    default: return 0;
  }
}

FUSEDOPT_DEVICE double step_count(const Row& row) {
  return row.step_is_double ? *global(static_cast<const double*>(row.step))
                            : static_cast<double>(*global(static_cast<const float*>(row.step)));
}
// In the dtype that holds it, as torch's `step += 1`.
FUSEDOPT_DEVICE double next_step_count(const Row& row) {
  const double count = step_count(row);
  return row.step_is_double ? count + 1 : static_cast<double>(static_cast<float>(count) + 1.0f);
}

FUSEDOPT_DEVICE double inv_scale(const Where& at) {
  // As GradScaler.unscale_: the reciprocal in double, rounded to float, and a multiplication by it.
  return static_cast<float>(1.0 / static_cast<double>(*global(at.grad_scale)));
}

// The scalars of a group at a step count, which the host would otherwise compute. Not inlined: it is seldom run.
template <class Rule, class T>
FUSEDOPT_DEVICE_CALL typename Rule::template Scalars<T> device_scalars(const Args<Rule, T>& args, const Group<Rule>* at,
                                                                       double step) {
  const Group<Rule>& group = *global(at);
  typename Rule::Options options = group.options;
  for (int i = 0; i < group.num_numbers; ++i) {
    const double value = number_at(group.number_at[i], group.number_dtype[i]);
    std::memcpy(reinterpret_cast<char*>(&options) + group.number_offset[i], &value, sizeof value);
  }
  typename Rule::Corrections corrections;
  const int64_t last = group.num_corrections - 1;
  if (last >= 0 && step >= 0 && (step <= last || group.final) && step == floor(step)) {
    corrections = *global(group.corrections + (step < last ? static_cast<int64_t>(step) : last));
  } else {
    corrections = Rule::corrections(options, step);  // the device's own pow
  }
  const double lr = group.lr_at ? number_at(group.lr_at, group.lr_dtype) : group.lr;
  Context context = group.context;
  if (args.at.grad_scale) {
    context.unscale = true;
    context.inv_scale = inv_scale(args.at);
  }
  typename Rule::template Scalars<T> s =
      group.lr_is_tensor ? Rule::template scalars<T>(options, TensorLr{lr, group.lr_dtype}, corrections, context)
                         : Rule::template scalars<T>(options, lr, corrections, context);
  s.step = step_of_draws(step);
  return s;
}

template <class Rule, class S, class T, bool kFull, int variant = 0>
FUSEDOPT_DEVICE void run_variant(const typename Rule::template Scalars<T>& s, const Row& row, std::byte* grad,
                                 const Where& table, Ema ema, StatsPart* stats, int64_t begin, int64_t end,
                                 int thread) {
  if constexpr (variant + 1 < Rule::kNumVariants) {
    if (row.variant != variant)
      return run_variant<Rule, S, T, kFull, variant + 1>(s, row, grad, table, ema, stats, begin, end, thread);
  }
  if constexpr (!std::is_same_v<S, Mixed>) {
    Update<Rule, variant, S, T, kFull>::run(s, row, grad, table, ema, stats, begin, end, thread);
  } else if constexpr (variant != Rule::kSparseVariant) {
    FormUpdate<Rule, variant>::run(s, row, grad, table, ema, stats, begin, end, thread);
  }
}

template <class S, class T>
FUSEDOPT_DEVICE void run_paused(const Common::Scalars<T>& s, const Row& row, std::byte* grad, const Where& table,
                                StatsPart* stats, int64_t begin, int64_t end, int thread) {
  if constexpr (std::is_same_v<S, Mixed>) {
    FormUpdate<Pause, 0>::run(s, row, grad, table, Ema::kNone, stats, begin, end, thread);
  } else if (row.sparse >= 0) {
    Update<Pause, 1, S, T, true>::run(s, row, grad, table, Ema::kNone, stats, begin, end, thread);
  } else {
    Update<Pause, 0, S, T, true>::run(s, row, grad, table, Ema::kNone, stats, begin, end, thread);
  }
}

// Is nothing to move, because the gradients, or GradScaler, say so?
FUSEDOPT_DEVICE bool is_skipped(const Where& at) {
  if (at.norm_parts && *global(at.answer + kSkip) != 0) return true;
  return at.found_inf && *global(at.found_inf) != 0;
}

// All chunks of one thread of one block. kFull: there are step counts on the device, or what measures.h has, or a
// moving average.
template <class Rule, class S, class T, bool kFull>
FUSEDOPT_DEVICE void step_thread(const Args<Rule, T>& args, int64_t block, int64_t num_blocks, int thread) {
  using Scalars = typename Rule::template Scalars<T>;
  const bool skips = kFull && is_skipped(args.at);
  if (skips && !(Rule::kHasCompany && args.at.stats)) return;
  Scalars s;
  int32_t scalars_of = -1;
  double scalars_at = 0;
  for (int64_t chunk = block; chunk < args.at.num_chunks; chunk += num_blocks) {
    const int32_t n = *global(args.at.row_of_chunk + chunk);
    const Row& row = *global(args.at.rows + n);
    Ema ema = kFull ? row.ema : Ema::kNone;
    // The averages begin with what the first step leaves that is not skipped.
    if (ema == Ema::kMove && args.at.answer && *global(args.at.answer + kAveragedSteps) == 0) ema = Ema::kCopy;
    bool is_known = false;
    if constexpr (kFull && Rule::kCountsSteps) {
      if (row.step) {
        const double step = next_step_count(row);
        if (scalars_of != row.scalars || scalars_at != step)
          s = device_scalars<Rule, T>(args, static_cast<const Group<Rule>*>(args.at.groups) + row.scalars, step);
        scalars_of = row.scalars;
        scalars_at = step;
        is_known = true;
      }
    }
    if (!is_known) {
      s = args.at.more_scalars ? *global(static_cast<const Scalars*>(args.at.more_scalars) + row.scalars)
                               : args.scalars[row.scalars];
      scalars_of = -1;
    }
    if constexpr (std::is_same_v<Rule, Average>) s.flags |= ema == Ema::kCopy ? Common::kAverageStarts : 0u;
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
    std::byte* const grad = *global(args.at.grads + n);
    if constexpr (kFull) {
      if (args.at.norm_parts && global(args.at.options)->question.clip) {
        s.clip = static_cast<T>(*global(args.at.answer + kClip));
        s.flags |= Common::kClip;
      }
      StatsPart* const stats = args.at.stats ? args.at.stats_parts + chunk : nullptr;
      if (stats && thread == 0) *global(stats) = {};
      if (Rule::kHasCompany && skips) {
        run_paused<S, T>(s, row, grad, args.at, stats, begin, end, thread);
      } else {
        run_variant<Rule, S, T, true>(s, row, grad, args.at, ema, stats, begin, end, thread);
      }
    } else {
      run_variant<Rule, S, T, false>(s, row, grad, args.at, ema, nullptr, begin, end, thread);
    }
  }
}

// Counts the step of every row whose count lives on the device: by one block, when all blocks have read them.
template <class Rule, class T>
FUSEDOPT_DEVICE void count_steps(const Args<Rule, T>& args, int thread) {
  if (is_skipped(args.at)) {
    if (args.at.counts_skips && thread == 0) *global(args.at.answer + kSkippedSteps) += 1;
    return;
  }
  if (args.at.counts_averages && thread == 0) *global(args.at.answer + kAveragedSteps) += 1;
  for (int64_t n = thread; n < args.at.num_rows; n += kThreads) {
    const Row& row = *global(args.at.rows + n);
    if (!row.step) continue;
    const double next = next_step_count(row);
    if (row.step_is_double) {
      *global(static_cast<double*>(row.step)) = next;
    } else {
      *global(static_cast<float*>(row.step)) = static_cast<float>(next);
    }
  }
}

// Statistics of every row, from its chunks': by the same block, a row a warp.
FUSEDOPT_DEVICE void finish_stats(const Where& at, bool is_double, int thread) {
  if (!at.stats) return;
  for (int64_t n = thread / 32; n < at.num_rows; n += kThreads / 32) {
    const Row& row = *global(at.rows + n);
    const StatsPart* const parts = at.stats_parts + row.first_chunk;
    const int64_t num_parts = (row.numel + kChunk - 1) / kChunk;
    const StatsPart all = warp_sum<StatsPart>(thread % 32, [&](int lane) {
      StatsPart sum{};
      for (int64_t i = lane; i < num_parts; i += 32) sum = combine(sum, fresh(parts + i));
      return sum;
    });
    if (thread % 32 == 0) write_stats(all, is_double, global(at.stats) + row.entry * kStatsSize);
  }
}

// Element i of a gradient.
template <class S, class T>
FUSEDOPT_DEVICE T grad_at(const Row& row, const std::byte* grad, int64_t i) {
  if constexpr (std::is_same_v<S, Mixed>) {
    return static_cast<T>(number_at(grad + i * (row.form.grad == DType::kFloat32 ? 4 : 2), row.form.grad));
  } else {
    return portable::Lane<T, 1>::widen(*global(reinterpret_cast<const S*>(grad) + i));
  }
}

// The norm's parts: a chunk a warp, an element a lane.
template <class S, class T>
FUSEDOPT_DEVICE void norm_warp(const NormArgs& args, int64_t warp, int64_t num_warps, int thread) {
  const Where& at = args.at;
  const bool unscale = args.how.unscale || at.grad_scale;
  const T scale = static_cast<T>(at.grad_scale ? inv_scale(at) : args.how.inv_scale);
  for (int64_t chunk = warp; chunk < at.num_chunks; chunk += num_warps) {
    const int32_t n = *global(at.row_of_chunk + chunk);
    const Row& row = *global(at.rows + n);
    const std::byte* const grad = *global(at.grads + n);
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t end = row.elsewhere ? begin : begin + kChunk < row.numel ? begin + kChunk : row.numel;
    const auto add = [&](NormPart* sum, int64_t element) {
      T g = grad_at<S, T>(row, grad, element);
      if (unscale) g = portable::mul_one(g, scale);
      const double x = static_cast<double>(g);
      if (args.how.largest) sum->largest = combine(*sum, NormPart{0, std::fabs(x)}).largest;
      sum->sum = portable::fma_one(x, x, sum->sum);
    };
    const NormPart part = warp_sum<NormPart>(thread % 32, [&](int lane) {
      NormPart sum = {0, 0};
      if (row.layout < 0) {
        constexpr int kAtOnce = std::is_same_v<S, Mixed> ? 4 : 16;
#pragma unroll kAtOnce
        for (int64_t i = begin + lane; i < end; i += kPartLanes) add(&sum, i);
        return sum;
      }
      for (int64_t i = begin + lane; i < end; i += kPartLanes) {
        int64_t offset[kGrad + 1], value = 0, stride = 0, element = i;
        if (row.sparse >= 0) {
          const SparseGrad& sparse = *global(at.sparse + row.sparse);
          value = i / sparse.row_numel;
          element = i % sparse.row_numel;
          stride = sparse.grad_stride;
        }
        find<kGrad + 1>(row, at.dims, element, offset);
        add(&sum, offset[kGrad] + value * stride);
      }
      return sum;
    });
    if (thread % 32 == 0) *global(at.norm_parts + chunk) = part;
  }
}

// When all parts of all dtypes so far are there.
FUSEDOPT_DEVICE void finish_norm(const NormArgs& args, NormPart all) {
  double* const answer = global(args.at.answer);
  if (!args.is_first) all = combine(NormPart{answer[kSum], answer[kLargest]}, all);
  answer[kSum] = all.sum;
  answer[kLargest] = all.largest;
  const bool found_inf = args.at.found_inf && *global(args.at.found_inf) != 0;
  if (args.is_last) decide(global(args.at.options)->question, found_inf, answer, args.report_inf);
}

}  // namespace cuda
}  // namespace fusedopt
