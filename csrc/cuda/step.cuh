// The kernel: what one thread does. No launch syntax, no host code, no shared memory: tests/cuda_on_host compiles this
// very file for the host.
#pragma once

#include <cmath>

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

// The parameter and its state in storage type S, the gradient in the same.
template <class Rule, int variant, class S, class T>
struct Update {
  static constexpr int kNumStates = Rule::num_states(variant);
  static constexpr int kNumStreams = kState + kNumStates;
  static constexpr bool kIsSparse = variant == Rule::kSparseVariant;
  using Scalars = typename Rule::template Scalars<T>;

  // A vector of each stream at a time: the loads of one iteration, times the threads that a multiprocessor holds, are
  // several times what must be in flight to use all of the memory's bandwidth.
  static constexpr int kWidth = sizeof(Vector) / sizeof(S);

  FUSEDOPT_DEVICE static void vectors(const Scalars& s, std::byte* const* data, int64_t begin, int64_t end,
                                      int thread) {
    // No more than four elements are worked on at once: more would need too many registers.
    using Lane = portable::Lane<T, (kWidth < 4 ? kWidth : 4)>;
    for (int64_t i = begin + thread * kWidth; i < end; i += kThreads * kWidth) {
      Vector vector[kNumStreams];
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k)
        vector[k] = reinterpret_cast<const Vector*>(global(data[k]) + i * sizeof(S))[0];
#pragma unroll
      for (int first = 0; first < kWidth; first += Lane::kWidth) {
        Lane param = unpack<S, Lane>(vector[kParam], first);
        Lane states[kNumStates];
#pragma unroll
        for (int k = 0; k < kNumStates; ++k) states[k] = unpack<S, Lane>(vector[kState + k], first);
        Rule::template update<variant>(s, param, unpack<S, Lane>(vector[kGrad], first), states);
        pack<S>(param, &vector[kParam], first);
#pragma unroll
        for (int k = 0; k < kNumStates; ++k) pack<S>(states[k], &vector[kState + k], first);
      }
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) {
        if (k != kGrad) reinterpret_cast<Vector*>(global(data[k]) + i * sizeof(S))[0] = vector[k];
      }
    }
  }

  FUSEDOPT_DEVICE static void element(const Scalars& s, S* const* at) {
    using Lane = portable::Lane<T, 1>;
    Lane param(Lane::widen(*global(at[kParam])));
    Lane grad(Lane::widen(*global(at[kGrad])));
    if constexpr (kIsSparse) grad = Gradient::value(s, grad);
    Lane states[kNumStates];
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) states[k] = Lane(Lane::widen(*global(at[kState + k])));
    Rule::template update<variant>(s, param, grad, states);
    *global(at[kParam]) = Lane::narrow(param.v[0], S{});
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) *global(at[kState + k]) = Lane::narrow(states[k].v[0], S{});
  }

  // One element a thread: strided or misaligned streams, and what is left of a row behind its last whole vector. Not
  // inlined: its registers would count for the rest.
  FUSEDOPT_DEVICE_CALL static void elements(const Scalars s, const Row* row_at, std::byte* grad,
                                            const Layout::Dim* dims, int64_t begin, int64_t end, int thread) {
    const Row& row = *global(row_at);
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      int64_t offset[kNumStreams];
      find(row, dims, i, offset);
      element_at(s, row, grad, offset);
    }
  }

  // The same for a sparse gradient, whose indices are in order, each but once. One that is out of range cannot be told
  // to the host, and is left out.
  FUSEDOPT_DEVICE_CALL static void sparse(Scalars s, const Row* row_at, std::byte* grad, const SparseGrad* sparse_at,
                                          const Layout::Dim* dims, int64_t begin, int64_t end, int thread) {
    const Row& row = *global(row_at);
    const SparseGrad& sparse = *global(sparse_at);
    if (sparse.is_one_element) s.flags |= Gradient::kOneElement;
    const Layout::Dim* outer = dims + row.layout - sparse.num_dims;
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      const int64_t value = i / sparse.row_numel;
      int64_t offset[kNumStreams];
      find(row, dims, i % sparse.row_numel, offset);
      offset[kGrad] += value * sparse.grad_stride;
      bool is_inside = true;
      for (int d = 0; d < sparse.num_dims; ++d) {
        const Layout::Dim& dim = *global(outer + d);
        const int64_t index = *global(sparse.indices + d * sparse.dim_stride + value * sparse.value_stride);
        is_inside &= index >= 0 && index < dim.size;
#pragma unroll
        for (int k = 0; k < kNumStreams; ++k) offset[k] += index * dim.stride[k];
      }
      if (is_inside) element_at(s, row, grad, offset);
    }
  }

  // Where the streams have element i of a row, or of a row of a sparse gradient.
  FUSEDOPT_DEVICE static void find(const Row& row, const Layout::Dim* dims, int64_t i, int64_t* offset) {
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) offset[k] = row.ndim == 0 ? i : 0;
    for (int64_t d = row.layout + row.ndim - 1; d >= row.layout && row.ndim > 0; --d) {
      const Layout::Dim& dim = *global(dims + d);
      const int64_t index = i % dim.size;
      i /= dim.size;
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) offset[k] += index * dim.stride[k];
    }
  }

  FUSEDOPT_DEVICE static void element_at(const Scalars& s, const Row& row, std::byte* grad, const int64_t* offset) {
    S* at[kNumStreams];
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) at[k] = reinterpret_cast<S*>(k == kGrad ? grad : row.data[k]) + offset[k];
    element(s, at);
  }

  // Elements [begin, end) of a row.
  FUSEDOPT_DEVICE static void run(const Scalars& s, const Row& row, std::byte* grad, const Where& table, int64_t begin,
                                  int64_t end, int thread) {
    if constexpr (kIsSparse) return sparse(s, &row, grad, table.sparse + row.sparse, table.dims, begin, end, thread);
    std::byte* data[kNumStreams];
    uintptr_t bits = 0;
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) {
      data[k] = k == kGrad ? grad : row.data[k];
      bits |= reinterpret_cast<uintptr_t>(data[k]);
    }
    if (row.layout < 0 && bits % sizeof(Vector) == 0) {
      const int64_t whole = begin + (end - begin) / kWidth * kWidth;
      vectors(s, data, begin, whole, thread);
      begin = whole;
    }
    if (begin < end) elements(s, &row, grad, table.dims, begin, end, thread);
  }
};

FUSEDOPT_DEVICE double number_at(const void* at, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return *global(static_cast<const double*>(at));
    case DType::kFloat32: return *global(static_cast<const float*>(at));
    case DType::kBFloat16: return to_float(*global(static_cast<const BFloat16*>(at)));
    case DType::kFloat16: return to_float(*global(static_cast<const Half*>(at)));
  }
  return 0;
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

template <class Rule, class T>
FUSEDOPT_DEVICE double inv_scale(const Args<Rule, T>& args) {
  // As GradScaler.unscale_: the reciprocal in double, rounded to float, and a multiplication by it.
  return args.at.grad_scale ? static_cast<float>(1.0 / static_cast<double>(*global(args.at.grad_scale))) : 1.0;
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
  const bool unscale = args.at.grad_scale != nullptr;
  return group.lr_is_tensor
             ? Rule::template scalars<T>(options, TensorLr{lr, group.lr_dtype}, corrections, unscale, inv_scale(args))
             : Rule::template scalars<T>(options, lr, corrections, unscale, inv_scale(args));
}

template <class Rule, class S, class T, int variant = 0>
FUSEDOPT_DEVICE void run_variant(const typename Rule::template Scalars<T>& s, const Row& row, std::byte* grad,
                                 const Where& table, int64_t begin, int64_t end, int thread) {
  if constexpr (variant + 1 < Rule::kNumVariants) {
    if (row.variant != variant) return run_variant<Rule, S, T, variant + 1>(s, row, grad, table, begin, end, thread);
  }
  Update<Rule, variant, S, T>::run(s, row, grad, table, begin, end, thread);
}

// All chunks of one thread of one block. kOnDevice: there are step counts on the device.
template <class Rule, class S, class T, bool kOnDevice>
FUSEDOPT_DEVICE void step_thread(const Args<Rule, T>& args, int64_t block, int64_t num_blocks, int thread) {
  using Scalars = typename Rule::template Scalars<T>;
  if (kOnDevice && args.at.found_inf && *global(args.at.found_inf) != 0) return;
  Scalars s;
  int32_t scalars_of = -1;
  double scalars_at = 0;
  for (int64_t chunk = block; chunk < args.at.num_chunks; chunk += num_blocks) {
    const int32_t n = *global(args.at.row_of_chunk + chunk);
    const Row& row = *global(args.at.rows + n);
    if (kOnDevice && row.step) {
      const double step = next_step_count(row);
      if (scalars_of != row.scalars || scalars_at != step)
        s = device_scalars<Rule, T>(args, static_cast<const Group<Rule>*>(args.at.groups) + row.scalars, step);
      scalars_of = row.scalars;
      scalars_at = step;
    } else {
      s = args.at.more_scalars ? *global(static_cast<const Scalars*>(args.at.more_scalars) + row.scalars)
                               : args.scalars[row.scalars];
      scalars_of = -1;
    }
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
    run_variant<Rule, S, T>(s, row, *global(args.at.grads + n), args.at, begin, end, thread);
  }
}

// Counts the step of every row whose count lives on the device: by one block, when all blocks have read them.
template <class Rule, class T>
FUSEDOPT_DEVICE void count_steps(const Args<Rule, T>& args, int thread) {
  if (args.at.found_inf && *global(args.at.found_inf) != 0) return;
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

}  // namespace cuda
}  // namespace fusedopt
