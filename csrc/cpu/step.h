// The chunk loop of one instruction set: included by step_*.cpp, each with its own `target` namespace of lanes.
// Everything here is a template over a Lane of one target, or has internal linkage.
#pragma once

#include <cstring>
#include <type_traits>

#include "../rules/rules.h"
#include "../table.h"
#include "target.h"

namespace fusedopt {
namespace {

// The storage type S of the parameter and its state, the gradient's storage type G; opmath is the lane's.
template <class Rule, int variant, class Lane, class S, class G>
struct Step {
  static constexpr int kNumStates = Rule::num_states(variant);
  static constexpr int kNumStreams = kState + kNumStates;
  using Scalars = typename Rule::template Scalars<typename Lane::Scalar>;

  static constexpr int64_t itemsize(int stream) { return stream == kGrad ? sizeof(G) : sizeof(S); }

  // Unit-stride streams. The tail is the same update on a padded lane: `Count` is empty, or the elements left.
  template <class... Count>
  static inline void block(const Scalars& scalars, std::byte* const* data, int64_t i, Count... count) {
    S* const param_at = reinterpret_cast<S*>(data[kParam]) + i;
    Lane param = Lane::load(static_cast<const S*>(param_at), count...);
    const Lane grad = Lane::load(reinterpret_cast<const G*>(data[kGrad]) + i, count...);
    Lane states[kNumStates];
    for (int k = 0; k < kNumStates; ++k)
      states[k] = Lane::load(reinterpret_cast<const S*>(data[kState + k]) + i, count...);

    Rule::template update<variant>(scalars, param, grad, states);

    param.store(param_at, count...);
    for (int k = 0; k < kNumStates; ++k) states[k].store(reinterpret_cast<S*>(data[kState + k]) + i, count...);
  }

  static void dense(const Scalars& scalars, std::byte* const* data, int64_t begin, int64_t end) {
    const Scalars s = scalars;  // a copy the stores cannot alias
    int64_t i = begin;
    for (; i + Lane::kWidth <= end; i += Lane::kWidth) block(s, data, i);
    if (i < end) block(s, data, i, static_cast<int>(end - i));
  }

  // Where the streams have an element, counted in the order of their layout.
  static void find(const Layout& layout, int64_t element, int64_t* offset) {
    for (int k = 0; k < kNumStreams; ++k) offset[k] = layout.ndim == 0 ? element : 0;
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const int64_t index = element % layout.dim[d].size;
      element /= layout.dim[d].size;
      for (int k = 0; k < kNumStreams; ++k) offset[k] += index * layout.dim[d].stride[k];
    }
  }

  // Any layout: runs along the fastest dimension; a stream that is not dense there goes through a small buffer.
  static void strided(const TensorRow& row, int64_t begin, int64_t end) {
    constexpr int64_t kRun = 256;
    alignas(64) std::byte buffer[kNumStreams][kRun * sizeof(typename Lane::Scalar)];
    const Scalars& scalars = *static_cast<const Scalars*>(row.scalars);
    const Layout& layout = *row.layout;
    const Layout::Dim& inner = layout.dim[layout.ndim - 1];

    while (begin < end) {
      int64_t offset[kNumStreams];
      find(layout, begin, offset);
      int64_t run = inner.size - begin % inner.size;
      if (run > end - begin) run = end - begin;
      if (run > kRun) run = kRun;

      std::byte* data[kNumStreams];
      for (int k = 0; k < kNumStreams; ++k) {
        data[k] = row.data[k] + offset[k] * itemsize(k);
        if (inner.stride[k] == 1) continue;
        copy(buffer[k], itemsize(k), data[k], inner.stride[k] * itemsize(k), run, itemsize(k));
        data[k] = buffer[k];
      }
      dense(scalars, data, 0, run);
      for (int k = 0; k < kNumStreams; ++k) {
        if (k == kGrad || data[k] != buffer[k]) continue;
        copy(row.data[k] + offset[k] * itemsize(k), inner.stride[k] * itemsize(k), buffer[k], itemsize(k), run,
             itemsize(k));
      }
      begin += run;
    }
  }

  // The rows that a sparse gradient touches. Its values go through a buffer, in opmath, where they are added up.
  static void sparse(const TensorRow& row, int64_t begin, int64_t end) {
    if (row.layout->ndim == 0 && row.layout->sparse->row_numel >= Lane::kWidth) return whole_rows(row, begin, end);
    single_elements(row, begin, end);
  }

  // Rows that are dense in all streams: updated where they lie.
  static void whole_rows(const TensorRow& row, int64_t begin, int64_t end) {
    constexpr int64_t kRun = 256;
    alignas(64) G buffer[kRun];
    const SparseGrad& sparse = *row.layout->sparse;
    const Scalars scalars = scalars_of(row);
    while (begin < end) {
      const int64_t r = begin / sparse.row_numel, from = begin % sparse.row_numel;
      int64_t run = sparse.row_numel - from;
      if (run > end - begin) run = end - begin;
      if (run > kRun) run = kRun;
      if (from == 0) prefetch(row, r + kRowsAhead, (end - 1) / sparse.row_numel);
      add_up(scalars, row, r, from, run, buffer);
      std::byte* data[kNumStreams];
      locate(row, r, data);
      for (int k = 0; k < kNumStreams; ++k) data[k] += from * sizeof(S);
      data[kGrad] = reinterpret_cast<std::byte*>(buffer);
      dense(scalars, data, 0, run);
      begin += run;
    }
  }

  // Any rows: an element at a time into buffers, and back.
  static void single_elements(const TensorRow& row, int64_t begin, int64_t end) {
    constexpr int64_t kRun = 256;
    alignas(64) std::byte buffer[kNumStreams][kRun * sizeof(typename Lane::Scalar)];
    std::byte* at[kRun][kNumStreams];
    std::byte* data[kNumStreams];
    for (int k = 0; k < kNumStreams; ++k) data[k] = buffer[k];
    const Layout& layout = *row.layout;
    const SparseGrad& sparse = *layout.sparse;
    const Scalars scalars = scalars_of(row);
    while (begin < end) {
      const int64_t run = end - begin < kRun ? end - begin : kRun;
      for (int64_t i = 0; i < run; ++i) {
        const int64_t r = (begin + i) / sparse.row_numel;
        int64_t offset[kNumStreams];
        find(layout, (begin + i) % sparse.row_numel, offset);
        locate(row, r, at[i]);
        add_up(scalars, row, r, offset[kGrad], 1, reinterpret_cast<G*>(buffer[kGrad]) + i);
        for (int k = 0; k < kNumStreams; ++k) {
          if (k == kGrad) continue;
          at[i][k] += offset[k] * sizeof(S);
          std::memcpy(buffer[k] + i * sizeof(S), at[i][k], sizeof(S));
        }
      }
      dense(scalars, data, 0, run);
      for (int64_t i = 0; i < run; ++i) {
        for (int k = 0; k < kNumStreams; ++k) {
          if (k != kGrad) std::memcpy(at[i][k], buffer[k] + i * sizeof(S), sizeof(S));
        }
      }
      begin += run;
    }
  }

  static Scalars scalars_of(const TensorRow& row) {
    Scalars scalars = *static_cast<const Scalars*>(row.scalars);
    if (row.layout->sparse->is_one_element) scalars.flags |= Gradient::kOneElement;
    return scalars;
  }

  // Where row r of a sparse gradient begins in the parameter and its state.
  static void locate(const TensorRow& row, int64_t r, std::byte** at) {
    const SparseGrad& sparse = *row.layout->sparse;
    const int64_t value = sparse.order ? sparse.order[sparse.first[r]] : r;
    for (int k = 0; k < kNumStreams; ++k) at[k] = row.data[k];
    for (int d = 0; d < sparse.num_dims; ++d) {
      const int64_t index = sparse.indices[d * sparse.dim_stride + value * sparse.value_stride];
      for (int k = 0; k < kNumStreams; ++k) at[k] += index * sparse.dims[d].stride[k] * int64_t{sizeof(S)};
    }
  }

  // Rows lie anywhere: the processor cannot foresee the next ones. (Inlined, for GCC drops calls of a function that
  // only prefetches, since it has no effect.)
  static constexpr int64_t kRowsAhead = 4;
  __attribute__((always_inline)) static inline void prefetch(const TensorRow& row, int64_t r, int64_t last) {
    constexpr int64_t kLine = 64, kMost = 1024;
    if (r > last) return;
    std::byte* at[kNumStreams];
    locate(row, r, at);
    const int64_t bytes = row.layout->sparse->row_numel * int64_t{sizeof(S)};
    for (int64_t i = 0; i < bytes && i < kMost; i += kLine) {
      for (int k = 0; k < kNumStreams; ++k) {
        if (k != kGrad) __builtin_prefetch(at[k] + i, 1);
      }
    }
  }

  // The sum of the values of row r, from one of their elements on.
  static void add_up(const Scalars& s, const TensorRow& row, int64_t r, int64_t from, int64_t count, G* sum) {
    const SparseGrad& sparse = *row.layout->sparse;
    const int64_t first = sparse.order ? sparse.first[r] : r, last = sparse.order ? sparse.first[r + 1] : r + 1;
    for (int64_t v = first; v < last; ++v) {
      const int64_t value = sparse.order ? sparse.order[v] : v;
      const S* at = reinterpret_cast<const S*>(row.data[kGrad]) + value * sparse.grad_stride + from;
      const auto add_block = [&](int64_t i, auto... n) {
        Lane x = Gradient::value(s, Lane::load(at + i, n...));
        if (v != first) x = add(Lane::load(static_cast<const G*>(sum) + i, n...), x);
        x.store(sum + i, n...);
      };
      int64_t i = 0;
      for (; i + Lane::kWidth <= count; i += Lane::kWidth) add_block(i);
      if (i < count) add_block(i, static_cast<int>(count - i));
    }
  }

  static void copy(std::byte* to, int64_t to_stride, const std::byte* from, int64_t from_stride, int64_t count,
                   int64_t size) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, size);
  }

  static void update(const TensorRow& row, int64_t begin, int64_t end) {
    if constexpr (variant == Rule::kSparseVariant) {
      sparse(row, begin, end);
    } else if (row.layout) {
      strided(row, begin, end);
    } else {
      dense(*static_cast<const Scalars*>(row.scalars), row.data, begin, end);
    }
  }
};

// Finds Step::update for a rule's id, a variant and a dtype among the instantiations of this target.
template <class F32, class F64>
struct Kernels {
  template <class Rule, int variant, class Lane, class S>
  static UpdateFn find() {
    // The sum of a sparse gradient's values is not rounded to their storage type.
    using G = std::conditional_t<variant == Rule::kSparseVariant, typename Lane::Scalar, S>;
    return Step<Rule, variant, Lane, S, G>::update;
  }

  template <class Rule, int variant>
  static UpdateFn by_dtype(DType dtype) {
    switch (dtype) {
      case DType::kFloat32: return find<Rule, variant, F32, float>();
      case DType::kFloat64: return find<Rule, variant, F64, double>();
      case DType::kBFloat16: return find<Rule, variant, F32, BFloat16>();
      case DType::kFloat16: return find<Rule, variant, F32, Half>();
    }
    return nullptr;
  }

  template <class Rule, int variant = 0>
  static UpdateFn by_variant(int wanted, DType dtype) {
    if constexpr (variant < Rule::kNumVariants) {
      return wanted == variant ? by_dtype<Rule, variant>(dtype) : by_variant<Rule, variant + 1>(wanted, dtype);
    }
    return nullptr;
  }

  template <class... R>
  static UpdateFn by_rule(RuleList<R...>, int rule, int variant, DType dtype) {
    UpdateFn found = nullptr;
    int id = 0;
    ((id++ == rule ? void(found = by_variant<R>(variant, dtype)) : void()), ...);
    return found;
  }

  static UpdateFn find(int rule, int variant, DType dtype) { return by_rule(Rules{}, rule, variant, dtype); }
};

int64_t units = 0;

int64_t units_run() { return __atomic_load_n(&units, __ATOMIC_RELAXED); }

int64_t piece_boundary(const TensorRow& row, int64_t cost) {
  const int64_t element = cost - row.start;
  if (element <= 0) return 0;
  if (element >= row.numel) return row.numel;
  return element & ~(kPieceAlignment - 1);
}

void run(const TensorRow* rows, int64_t num_rows, int64_t begin, int64_t end) {
  __atomic_fetch_add(&units, 1, __ATOMIC_RELAXED);
  int64_t low = 0, high = num_rows;  // the last row that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (rows[middle].start <= begin ? low : high) = middle;
  }
  for (const TensorRow* row = rows + low; row != rows + num_rows && row->start < end; ++row) {
    if (!row->scalars) continue;
    const int64_t from = piece_boundary(*row, begin), to = piece_boundary(*row, end);
    if (from < to) row->update(*row, from, to);
  }
}

}  // namespace
}  // namespace fusedopt
