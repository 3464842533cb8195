// The chunk loop of one instruction set: included by step_*.cpp, each with its own `target` namespace of lanes.
// Everything here is a template over a Lane of one target, or has internal linkage.
#pragma once

#include <cstring>

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

  // Any layout: runs along the fastest dimension; a stream that is not dense there goes through a small buffer.
  static void strided(const TensorRow& row, int64_t begin, int64_t end) {
    constexpr int64_t kRun = 256;
    alignas(64) std::byte buffer[kNumStreams][kRun * sizeof(typename Lane::Scalar)];
    const Scalars& scalars = *static_cast<const Scalars*>(row.scalars);
    const Layout& layout = *row.layout;
    const Layout::Dim& inner = layout.dim[layout.ndim - 1];

    while (begin < end) {
      int64_t offset[kNumStreams] = {};
      int64_t rest = begin;
      for (int d = layout.ndim - 1; d >= 0; --d) {
        const int64_t index = rest % layout.dim[d].size;
        rest /= layout.dim[d].size;
        for (int k = 0; k < kNumStreams; ++k) offset[k] += index * layout.dim[d].stride[k];
      }
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

  static void copy(std::byte* to, int64_t to_stride, const std::byte* from, int64_t from_stride, int64_t count,
                   int64_t size) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, size);
  }

  static void update(const TensorRow& row, int64_t begin, int64_t end) {
    if (row.layout) return strided(row, begin, end);
    dense(*static_cast<const Scalars*>(row.scalars), row.data, begin, end);
  }
};

// Finds Step::update for a rule's id, a variant and a dtype among the instantiations of this target.
template <class F32, class F64>
struct Kernels {
  template <class Rule, int variant>
  static UpdateFn by_dtype(DType dtype) {
    switch (dtype) {
      case DType::kFloat32: return Step<Rule, variant, F32, float, float>::update;
      case DType::kFloat64: return Step<Rule, variant, F64, double, double>::update;
      case DType::kBFloat16: return Step<Rule, variant, F32, BFloat16, BFloat16>::update;
      case DType::kFloat16: return Step<Rule, variant, F32, Half, Half>::update;
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
