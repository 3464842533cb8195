// Rows whose streams are stored in forms of their own (form.h): included by step.h. What a stream is is found out as it
// is read, by branches that the processor foresees, so that one instantiation of a rule serves all forms.
#pragma once

#include <cstring>

#include "../codecs.h"
#include "gather.h"
#include "measure.h"

namespace fusedopt {
namespace {

// The most elements of a run whose streams lie where they are; kRun if they are copied, or statistics are wanted.
constexpr int64_t kFormRun = 1024;

// Some elements of a row, in streams of unit stride: whole lanes, and whole blocks of codes.
struct FormRun {
  // What statistics want to know of them.
  struct Seen {
    alignas(64) float grad[kRun], before[kRun], added[kRun];
  };

  const Form& form;
  std::byte* data[kNumSlots];
  float* scales;  // of codes: the blocks'
  // Draws of the elements from drawn_from on, the first of which is `ahead` before the run's; made as they are needed.
  uint16_t* draws;  // null if none are
  int64_t drawn_from, ahead;
  const Drawing* drawing;
  Ema ema;
  Seen* seen;  // null if they are not wanted
};

// A lane's elements of all slots, from the i-th of a run on: for codecs.h. `Count` is empty, or the elements left.
template <class... Count>
class LaneMemory {
 public:
  __attribute__((always_inline)) LaneMemory(const FormRun& run, int64_t i, Count... count)
      : run_(run), i_(i), count_{count...} {}

  template <class Lane>
  __attribute__((always_inline)) Lane load(int slot, DType dtype) const {
    if (dtype == DType::kFloat32) return load_as<Lane, float>(slot);
    if (dtype == DType::kBFloat16) return load_as<Lane, BFloat16>(slot);
    return load_as<Lane, Half>(slot);
  }
  template <class Bits>
  __attribute__((always_inline)) Bits load_words(int slot) const {
    return load_as<Bits, uint16_t>(slot);
  }
  template <class Bits>
  __attribute__((always_inline)) Bits load_codes(int slot) const {
    return load_as<Bits, uint8_t>(slot);
  }
  template <class Lane>
  __attribute__((always_inline)) void store(int slot, DType dtype, Lane x) const {
    if (dtype == DType::kFloat32) return x.store(at<float>(slot));
    if (dtype == DType::kBFloat16) return x.store(at<BFloat16>(slot));
    x.store(at<Half>(slot));
  }
  template <class Bits>
  __attribute__((always_inline)) void store_words(int slot, Bits bits) const {
    bits.store(at<uint16_t>(slot));
  }

 private:
  template <class S>
  __attribute__((always_inline)) S* at(int slot) const {
    return reinterpret_cast<S*>(run_.data[slot]) + i_;
  }
  template <class Lane, class S>
  __attribute__((always_inline)) Lane load_as(int slot) const {
    if constexpr (sizeof...(Count) > 0) return Lane::load(static_cast<const S*>(at<S>(slot)), count_[0]);
    return Lane::load(static_cast<const S*>(at<S>(slot)));
  }

  const FormRun& run_;
  int64_t i_;
  int count_[sizeof...(Count) + 1];
};

// State tensor k of the blocks, as codes. magnitudes: the largest of each block, NaN above infinity.
template <class C, class Lane>
__attribute__((noinline)) void encode(const FormRun& run, const float* values, const typename Lane::Bits* magnitudes,
                                      int k, int64_t count) {
  using Bits = typename Lane::Bits;
  auto* const out = reinterpret_cast<uint8_t*>(run.data[kState + k]);
  for (int64_t begin = 0, b = 0; begin < count; begin += kCodeBlock, ++b) {
    const int64_t end = begin + kCodeBlock < count ? begin + kCodeBlock : count;
    const BlockScale found = block_scale<C>(bits_to_float(largest(magnitudes[b])));
    run.scales[b * run.form.num_states + k] = found.scale;
    if (found.inverse == 0) {
      std::memset(out + begin, 0, end - begin);
      continue;
    }
    const Lane inverse(found.inverse);
    for (int64_t i = begin; i < end; i += Lane::kWidth)
      C::encode(Lane::load(values + i), inverse,
                state_draw(Bits::load(static_cast<const uint16_t*>(run.draws) + run.ahead + i), k))
          .store(out + i);
  }
}

// The rule's part: all that is compiled for each.
template <class Rule, int variant, class Lane>
void update_run(const void* scalars, const FormRun& where, int64_t count) {
  constexpr int kNumStates = Rule::num_states(variant);
  using Bits = typename Lane::Bits;
  const auto s = *static_cast<const typename Rule::template Scalars<float>*>(scalars);
  const FormRun run = where;
  const Form form = run.form;
  const bool coded = kNumStates > 0 && form.is_coded();
  // States of blocks as they are updated: what the scales will be is known when all of a block are.
  alignas(64) float values[kNumStates + 1][kFormRun];
  Bits magnitudes[kNumStates + 1][kFormRun / kCodeBlock];

  // Made among the updates, whose divisions leave the time for it.
  constexpr int64_t kAtOnce = 8 * Lane::kWidth;
  int64_t drawn = 0;

  const int64_t block = coded ? kCodeBlock : count;
  for (int64_t begin = 0, b = 0; begin < count; begin += block, ++b) {
    const int64_t end = begin + block < count ? begin + block : count;
    Lane scale[kNumStates + 1];
    Bits largest[kNumStates + 1];
    for (int k = 0; k < kNumStates; ++k) {
      scale[k] = Lane(coded ? run.scales[b * kNumStates + k] : 0.0f);
      largest[k] = Bits(0);
    }
    for (int64_t i = begin; i < end; i += Lane::kWidth) {
      const LaneMemory<> memory(run, i);
      Bits draws(0);
      if (run.draws) {
        for (; drawn < run.ahead + count && drawn < run.ahead + i + 2 * kAtOnce; drawn += kAtOnce)
          draw_more<Bits>(form, *run.drawing, run.drawn_from + drawn, run.draws + drawn);
        draws = Bits::load(static_cast<const uint16_t*>(run.draws) + run.ahead + i);
      }
      Lane param = load_param<Lane>(form, memory), grad(0.0f);
      if constexpr (Rule::kReadsGrad) grad = memory.template load<Lane>(kGrad, form.grad);
      Lane states[kNumStates + 1];
      for (int k = 0; k < kNumStates; ++k) {
        if (coded) {
          const Bits code = memory.template load_codes<Bits>(kState + k);
          states[k] = Rule::is_signed(k) ? SignedCode::decode(code, scale[k]) : UnsignedCode::decode(code, scale[k]);
        } else {
          states[k] = memory.template load<Lane>(kState + k, form.state);
        }
      }

      const Lane before = param;
      const Lane added = Rule::template update<variant>(s, param, grad, states);

      if constexpr (Rule::kWritesParam) store_param(form, param, draws, memory);
      for (int k = 0; k < kNumStates; ++k) {
        if (coded) {
          states[k].store(values[k] + i);
          largest[k] = max(largest[k], without_sign(bits_of(states[k])));
        } else if (form.stochastic_state) {
          store_drawn(form.state, states[k], state_draw(draws, k), kState + k, memory);
        } else {
          memory.store(kState + k, form.state, states[k]);
        }
      }
      if (Rule::kHasCompany && run.ema != Ema::kNone) {
        const Lane now = averaged(form, param, memory);
        Lane average = now;
        if (run.ema == Ema::kMove) average = Common::average(s, memory.template load<Lane>(kEmaSlot, form.ema), now);
        memory.store(kEmaSlot, form.ema, average);
      }
      if (run.seen) {
        if constexpr (!Rule::kReadsGrad) grad = memory.template load<Lane>(kGrad, form.grad);
        grad.store(run.seen->grad + i);
        before.store(run.seen->before + i);
        added.store(run.seen->added + i);
      }
    }
    for (int k = 0; k < kNumStates && coded; ++k) magnitudes[k][b] = largest[k];
  }

  for (int k = 0; k < kNumStates && coded; ++k) {
    if (Rule::is_signed(k)) {
      encode<SignedCode, Lane>(run, values[k], magnitudes[k], k, count);
    } else {
      encode<UnsignedCode, Lane>(run, values[k], magnitudes[k], k, count);
    }
  }
}

// A piece of such a row: brings its elements, wherever they lie, to update_run. Compiled once for all rules.
template <class Lane>
class FormWalk {
 public:
  using Update = void (*)(const void*, const FormRun&, int64_t);

  FormWalk(const TensorRow& row, Update update, Stats<Lane>* stats)
      : row_(row),
        form_(*row.form),
        update_(update),
        stats_(stats),
        num_streams_(form_.ema_stream() + (row.beside && row.beside->ema != Ema::kNone)),
        common_(*static_cast<const Common::Scalars<float>*>(row.scalars)),  // the first base of every rule's
        drawing_(form_, common_.step),
        run_{form_,
             {},
             nullptr,
             nullptr,
             0,
             0,
             &drawing_,
             row.beside ? row.beside->ema : Ema::kNone,
             stats ? &seen_ : nullptr} {
    for (int slot = 0; slot < kNumSlots; ++slot) {
      const int k = form_.stream(slot);
      stream_[slot] = k < num_streams_ ? k : -1;
      if (stream_[slot] >= 0) size_[slot] = itemsize(form_.dtype(k));
    }
  }

  void walk(int64_t begin, int64_t end) {
    alignas(64) uint16_t draws[kFormRun + 3 * kDraws];
    if (form_.draws()) run_.draws = draws;
    const bool copies = row_.layout || stats_;
    for (int64_t at = begin; at < end;) {
      const int64_t most = copies ? kRun : kFormRun;
      int64_t stop = at + most < end ? at + most : end;
      if (form_.is_coded()) {
        if (form_.row_numel % kCodeBlock != 0) stop = form_.block_end(at);
      } else if (!copies && stop - at > Lane::kWidth) {
        stop -= (stop - at) % Lane::kWidth;  // what is left is copied
      }
      run_.ahead = at % kDraws;
      run_.drawn_from = at - run_.ahead;
      if (form_.is_coded()) {
        auto* const scales = reinterpret_cast<float*>(row_.data[form_.scales()]);
        run_.scales = scales + form_.block_of(at) * form_.num_states;
      }
      row_.layout || (stop - at) % Lane::kWidth != 0 ? buffered(at, stop) : direct(at, stop);
      if (stats_ && (stop >= end || stop / kPart != at / kPart)) row_.beside->stats[at / kPart] = stats_->end_part();
      // The last block may reach into a part that no other begins in.
      if (stats_ && stop == row_.numel && (stop - 1) / kPart != at / kPart) row_.beside->stats[(stop - 1) / kPart] = {};
      at = stop;
    }
  }

 private:
  static int64_t itemsize(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kCode ? 1 : 2; }

  void direct(int64_t begin, int64_t end) {
    for (int slot = 0; slot < kNumSlots; ++slot) {
      if (stream_[slot] >= 0) run_.data[slot] = row_.data[stream_[slot]] + begin * size_[slot];
    }
    update_(row_.scalars, run_, end - begin);
    if (stats_) measure(end - begin);
  }

  // Strided streams, and what fills no whole lane.
  void buffered(int64_t begin, int64_t end) {
    alignas(64) std::byte buffer[kNumSlots][kRun * sizeof(float)];
    const int64_t count = end - begin, whole = (count + Lane::kWidth - 1) / Lane::kWidth * Lane::kWidth;
    for (int slot = 0; slot < kNumSlots; ++slot) {
      run_.data[slot] = buffer[slot];
      if (stream_[slot] >= 0) std::memset(buffer[slot] + count * size_[slot], 0, (whole - count) * size_[slot]);
    }
    move(begin, end, true);
    update_(row_.scalars, run_, whole);
    if (stats_) measure(count);
    move(begin, end, false);
  }

  // Elements from where they lie to the buffers, or, of what is written, back.
  void move(int64_t begin, int64_t end, bool to_buffers) {
    for (int64_t at = begin; at < end;) {
      int64_t offset[kMaxStreams], run = end - at;
      const Layout::Dim* inner = nullptr;
      if (row_.layout) {
        inner = &row_.layout->dim[row_.layout->ndim - 1];
        if (run > inner->size - at % inner->size) run = inner->size - at % inner->size;
        find(*row_.layout, at, num_streams_, offset);
      }
      for (int slot = 0; slot < kNumSlots; ++slot) {
        const int k = stream_[slot];
        if (k < 0 || (k == kGrad && !to_buffers)) continue;
        const int64_t size = size_[slot], stride = inner ? inner->stride[k] * size : size;
        std::byte* const here = row_.data[k] + (inner ? offset[k] : at) * size;
        std::byte* const there = run_.data[slot] + (at - begin) * size;
        to_buffers ? copy(there, size, here, stride, run, size) : copy(here, stride, there, size, run, size);
      }
      at += run;
    }
  }

  void measure(int64_t count) {
    Common::Scalars<float> as_computed = common_;
    as_computed.flags &= Common::kUnscale;
    const FormRun& run = run_;
    const auto grad_at = [&](int64_t i, auto... n) {
      const float* grad = seen_.grad + i;
      return Common::value(as_computed, Lane::load(grad, n...));
    };
    const auto param_at = [&](int64_t i, auto... n) {
      return load_param<Lane>(run.form, LaneMemory<decltype(n)...>(run, i, n...));
    };
    auto seen = stats_->begin_run();
    each_lane<Lane, Stats<Lane>::kLanes>(count, [&](int64_t i, int at, auto... n) __attribute__((always_inline)) {
      const float *before = seen_.before + i, *added = seen_.added + i;
      seen.include(at, grad_at(i, n...), Lane::load(before, n...), param_at(i, n...), Lane::load(added, n...));
    });
    stats_->end_run(seen, count, grad_at, param_at);
  }

  const TensorRow& row_;
  const Form& form_;
  Update update_;
  Stats<Lane>* stats_;
  int num_streams_;
  int stream_[kNumSlots];  // -1: the row has none
  int64_t size_[kNumSlots] = {};
  const Common::Scalars<float> common_;
  const Drawing drawing_;
  FormRun::Seen seen_;
  FormRun run_;
};

template <class Rule, int variant, class Lane>
void update_form(const TensorRow& row, int64_t begin, int64_t end) {
  Stats<Lane> stats;
  const bool measures = Rule::kHasCompany && row.beside && row.beside->stats;
  FormWalk<Lane>(row, update_run<Rule, variant, Lane>, measures ? &stats : nullptr).walk(begin, end);
}

}  // namespace
}  // namespace fusedopt
