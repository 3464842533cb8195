// The chunk loop of one instruction set: included by step_*.cpp, each with its own `target` namespace of lanes.
// Everything here is a template over a Lane of one target, or has internal linkage.
#pragma once

#include <cstring>
#include <type_traits>

#include "../rules/rules.h"
#include "../table.h"
#include "form.h"
#include "gather.h"
#include "measure.h"
#include "target.h"

namespace fusedopt {
namespace {

// Elements [begin, end) of streams of unit stride, by one rule: the parameter and its state in storage type S, the
// gradient in G; opmath is the lane's. Everything around it is the same for all rules, and below.
template <class Rule, int variant, class Lane, class S, class G>
struct Dense {
  static constexpr int kNumStates = Rule::num_states(variant);
  static constexpr int kNumStreams = kState + kNumStates;
  static constexpr bool kIsSparse = variant == Rule::kSparseVariant;
  using T = typename Lane::Scalar;
  using Scalars = typename Rule::template Scalars<T>;

  // The tail is the same update on a padded lane: `Count` is empty, or the elements left. `see` is shown the gradient,
  // the parameter before and as it is stored, and what was added to it.
  template <class See, class... Count>
  __attribute__((always_inline)) static inline void block(const Scalars& scalars, std::byte* const* data, int64_t i,
                                                          See see, Count... count) {
    S* const param_at = reinterpret_cast<S*>(data[kParam]) + i;
    Lane param = Lane::load(static_cast<const S*>(param_at), count...);
    Lane grad(T(0));
    if constexpr (Rule::kReadsGrad) grad = Lane::load(reinterpret_cast<const G*>(data[kGrad]) + i, count...);
    Lane states[kNumStates + 1];
    for (int k = 0; k < kNumStates; ++k)
      states[k] = Lane::load(reinterpret_cast<const S*>(data[kState + k]) + i, count...);

    const Lane before = param;
    const Lane added = Rule::template update<variant>(scalars, param, grad, states);

    if constexpr (Rule::kWritesParam) param.store(param_at, count...);
    for (int k = 0; k < kNumStates; ++k) states[k].store(reinterpret_cast<S*>(data[kState + k]) + i, count...);
    see(grad, before, param, added);
  }

  __attribute__((always_inline)) static inline void fetch(std::byte* const* data, int64_t i, int64_t last) {
    const int64_t at = to_fetch(i, last);
    for (int k = 0; k < kNumStreams; ++k) {
      if (k != kGrad) __builtin_prefetch(data[k] + at * int64_t{sizeof(S)});
    }
    if (Rule::kReadsGrad) __builtin_prefetch(data[kGrad] + at * int64_t{sizeof(G)});
  }

  // `flags` are added to the scalars'. `last`: where the streams end.
  static void update(const void* scalars, uint32_t flags, std::byte* const* streams, int64_t begin, int64_t end,
                     int64_t last) {
    Scalars s = *static_cast<const Scalars*>(scalars);  // copies, which the stores cannot alias
    s.flags |= flags;
    std::byte* data[kNumStreams];
    for (int k = 0; k < kNumStreams; ++k) data[k] = streams[k];
    const auto see_nothing = [](auto...) {};
    int64_t i = begin;
    for (; i + Lane::kWidth <= end; i += Lane::kWidth) {
      fetch(data, i, last);
      block(s, data, i, see_nothing);
    }
    if (i < end) block(s, data, i, see_nothing, static_cast<int>(end - i));
  }

  // The same for a run, with statistics. `unclipped`: of a sparse gradient, the sums of its values as computed.
  static void measured(const void* scalars, uint32_t flags, std::byte* const* streams, int64_t count, int64_t last,
                       const T* unclipped, Stats<Lane>* stats) {
    Scalars s = *static_cast<const Scalars*>(scalars);
    s.flags |= flags;
    std::byte* data[kNumStreams];
    for (int k = 0; k < kNumStreams; ++k) data[k] = streams[k];
    Common::Scalars<T> as_computed = s;
    as_computed.flags &= kIsSparse ? 0u : Common::kUnscale;
    const S* const param_at = reinterpret_cast<const S*>(data[kParam]);
    const G* const grad_at = reinterpret_cast<const G*>(data[kGrad]);
    auto run = stats->begin_run();
    each_lane<Lane, Stats<Lane>::kLanes>(count, [&](int64_t i, int at, auto... n) __attribute__((always_inline)) {
      fetch(data, i, last);
      block(
          s, data, i,
          [&](Lane grad, Lane before, Lane after, Lane added) __attribute__((always_inline)) {
            if constexpr (!Rule::kReadsGrad) grad = Lane::load(grad_at + i, n...);
            if constexpr (kIsSparse) grad = Lane::load(unclipped + i, n...);
            // As it was rounded; and beyond a tail's end there is nothing to be seen.
            if constexpr (sizeof(S) != sizeof(T) || sizeof...(n) > 0) after = Lane::load(param_at + i, n...);
            if constexpr (sizeof...(n) > 0) added = head(added, n...);
            run.include(at, Common::value(as_computed, grad), before, after, added);
          },
          n...);
    });
    const auto seen = run;  // so that `run` itself need not lie in memory
    stats->end_run(
        seen, count,
        [&](int64_t i, auto... n) {
          if constexpr (kIsSparse) return Common::value(as_computed, Lane::load(unclipped + i, n...));
          return Common::value(as_computed, Lane::load(grad_at + i, n...));
        },
        [&](int64_t i, auto... n) { return Lane::load(param_at + i, n...); });
  }
};

// A piece of a row, of storage type S: brings its elements, wherever they lie, to Dense::update.
template <class Lane, class S>
class Walk {
 public:
  using T = typename Lane::Scalar;
  using Update = void (*)(const void*, uint32_t, std::byte* const*, int64_t, int64_t, int64_t);
  using Measured = void (*)(const void*, uint32_t, std::byte* const*, int64_t, int64_t, const T*, Stats<Lane>*);

  // `stats`: null unless the row wants them.
  Walk(const TensorRow& row, Update update, Measured measured, int num_streams, Stats<Lane>* stats)
      : row_(row),
        update_(update),
        measured_(measured),
        ema_(num_streams),
        num_streams_(num_streams + has_ema()),
        stats_(stats) {
    common_ = *static_cast<const Common::Scalars<T>*>(row.scalars);  // the first base of every rule's
  }

  // Of unit-stride streams, all of them.
  void dense(int64_t begin, int64_t end) {
    std::byte* data[kMaxStreams];
    for (int k = 0; k < num_streams_; ++k) data[k] = row_.data[k] + begin * int64_t{sizeof(S)};
    at_ = begin;
    update(data, end - begin);
    finish();
  }

  // Any layout: runs along the fastest dimension; a stream that is not dense there goes through a small buffer.
  void strided(int64_t begin, int64_t end) {
    alignas(64) std::byte buffer[kMaxStreams][kRun * sizeof(S)];
    const Layout& layout = *row_.layout;
    const Layout::Dim& inner = layout.dim[layout.ndim - 1];
    at_ = begin;
    while (begin < end) {
      int64_t offset[kMaxStreams];
      find(layout, begin, num_streams_, offset);
      int64_t run = inner.size - begin % inner.size;
      if (run > end - begin) run = end - begin;
      if (run > kRun) run = kRun;

      std::byte *data[kMaxStreams], *from[kMaxStreams];
      for (int k = 0; k < num_streams_; ++k) {
        data[k] = from[k] = row_.data[k] + offset[k] * int64_t{sizeof(S)};
        if (inner.stride[k] == 1) continue;
        data[k] = buffer[k];
        copy(data[k], sizeof(S), from[k], inner.stride[k] * int64_t{sizeof(S)}, run, sizeof(S));
      }
      update(data, run);
      for (int k = 0; k < num_streams_; ++k) {
        if (k == kGrad || data[k] == from[k]) continue;
        copy(from[k], inner.stride[k] * int64_t{sizeof(S)}, data[k], sizeof(S), run, sizeof(S));
      }
      begin += run;
    }
    finish();
  }

  // The rows that a sparse gradient touches. Its values go through a buffer, in opmath, where they are added up.
  void sparse(int64_t begin, int64_t end) {
    grad_size_ = sizeof(T);
    flags_ = row_.layout->sparse->is_one_element ? Common::kOneElement : 0u;
    at_ = begin;
    if (row_.layout->ndim == 0 && row_.layout->sparse->row_numel >= Lane::kWidth) {
      whole_rows(begin, end);
    } else {
      single_elements(begin, end);
    }
    finish();
  }

 private:
  Ema ema() const { return row_.beside ? row_.beside->ema : Ema::kNone; }
  bool has_ema() const { return ema() != Ema::kNone; }

  // Rows that are dense in all streams: updated where they lie.
  void whole_rows(int64_t begin, int64_t end) {
    alignas(64) T buffer[kRun], unclipped[kRun];
    const SparseGrad& sparse = *row_.layout->sparse;
    while (begin < end) {
      const int64_t r = begin / sparse.row_numel, from = begin % sparse.row_numel;
      int64_t run = sparse.row_numel - from;
      if (run > end - begin) run = end - begin;
      if (run > kRun) run = kRun;
      if (from == 0) prefetch(r + kRowsAhead, (end - 1) / sparse.row_numel);
      add_up_values<Lane, S>(common_, row_, r, from, run, buffer);
      if (stats_) add_up_values<Lane, S>(as_computed(), row_, r, from, run, unclipped);
      std::byte* data[kMaxStreams];
      locate(r, data);
      for (int k = 0; k < num_streams_; ++k) data[k] += from * int64_t{sizeof(S)};
      data[kGrad] = reinterpret_cast<std::byte*>(buffer);
      update(data, run, unclipped);
      begin += run;
    }
  }

  // Any rows: an element at a time into buffers, and back.
  void single_elements(int64_t begin, int64_t end) {
    alignas(64) std::byte buffer[kMaxStreams][kRun * sizeof(T)];
    alignas(64) T unclipped[kRun];
    std::byte* at[kRun][kMaxStreams];
    std::byte* data[kMaxStreams];
    for (int k = 0; k < num_streams_; ++k) data[k] = buffer[k];
    const Layout& layout = *row_.layout;
    const SparseGrad& sparse = *layout.sparse;
    while (begin < end) {
      const int64_t run = end - begin < kRun ? end - begin : kRun;
      for (int64_t i = 0; i < run; ++i) {
        const int64_t r = (begin + i) / sparse.row_numel;
        int64_t offset[kMaxStreams];
        find(layout, (begin + i) % sparse.row_numel, num_streams_, offset);
        locate(r, at[i]);
        add_up_values<Lane, S>(common_, row_, r, offset[kGrad], 1, reinterpret_cast<T*>(buffer[kGrad]) + i);
        if (stats_) add_up_values<Lane, S>(as_computed(), row_, r, offset[kGrad], 1, unclipped + i);
        for (int k = 0; k < num_streams_; ++k) {
          if (k == kGrad) continue;
          at[i][k] += offset[k] * int64_t{sizeof(S)};
          std::memcpy(buffer[k] + i * sizeof(S), at[i][k], sizeof(S));
        }
      }
      update(data, run, unclipped);
      for (int64_t i = 0; i < run; ++i) {
        for (int k = 0; k < num_streams_; ++k) {
          if (k != kGrad) std::memcpy(at[i][k], buffer[k] + i * sizeof(S), sizeof(S));
        }
      }
      begin += run;
    }
  }

  // Of a gradient neither clipped nor negated: what statistics are about.
  Common::Scalars<T> as_computed() const {
    Common::Scalars<T> scalars = common_;
    scalars.flags &= Common::kUnscale;
    return scalars;
  }

  // Where row r of a sparse gradient begins in the parameter and its state.
  void locate(int64_t r, std::byte** at) const {
    const SparseGrad& sparse = *row_.layout->sparse;
    const int64_t value = sparse.order ? sparse.order[sparse.first[r]] : r;
    for (int k = 0; k < num_streams_; ++k) at[k] = row_.data[k];
    for (int d = 0; d < sparse.num_dims; ++d) {
      const int64_t index = sparse.indices[d * sparse.dim_stride + value * sparse.value_stride];
      for (int k = 0; k < num_streams_; ++k) at[k] += index * sparse.dims[d].stride[k] * int64_t{sizeof(S)};
    }
  }

  // Rows lie anywhere: the processor cannot foresee the next ones. (Inlined, for GCC drops calls of a function that
  // only prefetches, since it has no effect.)
  static constexpr int64_t kRowsAhead = 4;
  __attribute__((always_inline)) inline void prefetch(int64_t r, int64_t last) const {
    constexpr int64_t kLine = 64, kMost = 1024;
    if (r > last) return;
    std::byte* at[kMaxStreams];
    locate(r, at);
    const int64_t bytes = row_.layout->sparse->row_numel * int64_t{sizeof(S)};
    for (int64_t i = 0; i < bytes && i < kMost; i += kLine) {
      for (int k = 0; k < num_streams_; ++k) {
        if (k != kGrad) __builtin_prefetch(at[k] + i, 1);
      }
    }
  }

  // The next `count` elements of the piece, which lie in streams of unit stride here. `unclipped`: those of a sparse
  // gradient as computed.
  void update(std::byte* const* data, int64_t count, const T* unclipped = nullptr) {
    if (!has_ema() && !stats_) return update_(row_.scalars, flags_, data, 0, count, count);
    // Run by run, while it is in the cache, comes what is beside the update.
    for (int64_t done = 0; done < count;) {
      int64_t run = count - done;
      if (run > kLongRun) run = kLongRun;
      if (stats_ && run > kPart - at_ % kPart) run = kPart - at_ % kPart;
      std::byte* here[kMaxStreams];
      for (int k = 0; k < num_streams_; ++k) here[k] = data[k] + done * (k == kGrad ? grad_size_ : int64_t{sizeof(S)});
      update_run(here, run, count - done, unclipped ? unclipped + done : nullptr);
      done += run;
      at_ += run;
      if (stats_ && at_ % kPart == 0) finish();
    }
  }

  void update_run(std::byte* const* data, int64_t count, int64_t last, const T* unclipped) {
    if (stats_) {
      measured_(row_.scalars, flags_, data, count, last, unclipped, stats_);
    } else {
      update_(row_.scalars, flags_, data, 0, count, last);
    }
    if (ema() == Ema::kCopy) std::memcpy(data[ema_], data[kParam], count * sizeof(S));
    if (ema() == Ema::kMove) {
      std::byte* const average[] = {data[kParam], nullptr, data[ema_]};
      Dense<Average, 0, Lane, S, S>::update(&common_, 0, average, 0, count, last);
    }
  }

  // Behind the last element of a part, or of the piece.
  void finish() {
    if (stats_ && stats_->num_elements > 0) row_.beside->stats[(at_ - 1) / kPart] = stats_->end_part();
  }

  const TensorRow& row_;
  Update update_;
  Measured measured_;
  int ema_, num_streams_;  // the average's stream, where there is one; with it
  int64_t grad_size_ = sizeof(S);
  uint32_t flags_ = 0;
  Common::Scalars<T> common_;
  int64_t at_ = 0;  // the element that comes next
  Stats<Lane>* stats_;
};

template <class Rule, int variant, class Lane, class S>
void update(const TensorRow& row, int64_t begin, int64_t end) {
  // The sum of a sparse gradient's values is not rounded to their storage type.
  constexpr bool kIsSparse = variant == Rule::kSparseVariant;
  using Rows = Dense<Rule, variant, Lane, S, std::conditional_t<kIsSparse, typename Lane::Scalar, S>>;
  if (!kIsSparse && !row.layout && !row.beside)
    return Rows::update(row.scalars, 0, row.data, begin, end, end);  // the usual case
  const auto walk = [&](Stats<Lane>* stats) {
    Walk<Lane, S> walk(row, Rows::update, Rows::measured, kState + Rows::kNumStates, stats);
    if constexpr (kIsSparse) return walk.sparse(begin, end);
    row.layout ? walk.strided(begin, end) : walk.dense(begin, end);
  };
  if (!row.beside || !row.beside->stats) return walk(nullptr);
  Stats<Lane> stats;
  walk(&stats);
}

// Finds update() for a rule's id, a variant and a dtype among the instantiations of this target.
template <class F32, class F64>
struct Kernels {
  template <class Rule, int variant>
  static UpdateFn by_dtype(DType dtype) {
    switch (dtype) {
      case DType::kFloat32: return update<Rule, variant, F32, float>;
      case DType::kFloat64: return update<Rule, variant, F64, double>;
      case DType::kBFloat16: return update<Rule, variant, F32, BFloat16>;
      case DType::kFloat16: return update<Rule, variant, F32, Half>;
      case DType::kMixed:
        if constexpr (variant != Rule::kSparseVariant && !std::is_same_v<Rule, Scale>)
          return update_form<Rule, variant, F32>;
        break;
      default: break;
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

  static MeasureFn find_norm(DType dtype) {
    switch (dtype) {
      case DType::kFloat32: return Norm<F32, float>::measure;
      case DType::kFloat64: return Norm<F64, double>::measure;
      case DType::kBFloat16: return Norm<F32, BFloat16>::measure;
      case DType::kFloat16: return Norm<F32, Half>::measure;
      default: return nullptr;
    }
  }
};

int64_t units = 0;

int64_t units_run() { return __atomic_load_n(&units, __ATOMIC_RELAXED); }

// `blocks`: of a row whose state is codes, a piece has all of the blocks that begin in it.
int64_t piece_boundary(const TensorRow& row, int64_t cost, int64_t alignment, bool blocks) {
  const int64_t element = cost - row.start;
  if (element <= 0) return 0;
  if (element >= row.numel) return row.numel;
  const int64_t boundary = element - element % alignment;
  return blocks ? row.form->next_block(boundary) : boundary;
}

// Updates what of the rows lies in [begin, end) of their running total of cost; or, with options, measures it.
void run(const TensorRow* rows, int64_t num_rows, const NormOptions* norm, int64_t begin, int64_t end) {
  __atomic_fetch_add(&units, 1, __ATOMIC_RELAXED);
  int64_t low = 0, high = num_rows;  // the last row that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (rows[middle].start <= begin ? low : high) = middle;
  }
  for (const TensorRow* row = rows + low; row != rows + num_rows && row->start < end; ++row) {
    if (!row->scalars) continue;
    const int64_t alignment = norm || (row->beside && row->beside->stats) ? kPart : kPieceAlignment;
    const bool blocks = !norm && row->form && row->form->is_coded();
    const int64_t from = piece_boundary(*row, begin, alignment, blocks);
    const int64_t to = piece_boundary(*row, end, alignment, blocks);
    if (from >= to) continue;
    if (norm) {
      if (row->beside->measure) row->beside->measure(*row, *norm, from, to);
    } else {
      row->update(*row, from, to);
    }
  }
}

}  // namespace
}  // namespace fusedopt
