// Rows whose streams are stored in forms of their own (form.h): included by step.h. What a stream is is found out as it
// is read, by branches that the processor foresees, so that five instantiations of a rule serve all forms.
#pragma once

#include <cstring>
#include <utility>

#include "../codecs.h"
#include "gather.h"
#include "measure.h"

namespace fusedopt {
namespace {

// What the state is: of these each has its instantiations.
enum class States { kFloat32, kHalf, kCoded };

// The most elements of a run whose streams lie where they are; kRun if they are copied, or statistics are wanted.
constexpr int64_t kFormRun = 2048;

// Draws of a run, and of elements around it that were made with them: for the parameter and each state tensor.
struct Draws {
  alignas(64) uint16_t of[1 + kMaxStates][kFormRun + 3 * kDrawGroup];
};

// What all draws of a parameter have in common.
struct Drawing {
  const Form& form;
  uint32_t step;
  int num_tensors;
  uint32_t keys[kRounds][2];

  Drawing(const Form& drawn_form, uint32_t at_step)
      : form(drawn_form),
        step(at_step),
        num_tensors(form.stochastic_state || form.is_coded() ? 1 + form.num_states : 1) {
    for (int round = 0; round < kRounds; ++round) {
      for (int which = 0; which < 2; ++which) keys[round][which] = round_key(form.seed, round, which);
    }
  }
};

// Some elements of a row, in streams of unit stride: whole lanes, and whole blocks of codes.
struct FormRun {
  // What statistics want to know of them.
  struct Seen {
    alignas(64) float grad[kRun], before[kRun], added[kRun];
  };

  const Form& form;
  std::byte* data[kNumSlots];
  int64_t size[kNumSlots];  // of an element
  int64_t left;             // elements that lie in a row, the run's and those behind it
  float* scales;            // of codes: the blocks'
  // Of the elements from drawn_from on, the first of which is `ahead` before the run's; made as they are needed.
  Draws* draws;  // null if none are
  int64_t drawn_from, ahead;
  const Drawing* drawing;
  Ema ema;
  Seen* seen;  // null if they are not wanted
};

// Makes draws, of a lane's counters at once: in 8 steps, two beside every four of the 16 lanes that use as many. Their
// divisions leave the time for it.
template <class Bits>
class Drawer {
 public:
  static_assert(kRounds + 1 == 8 && kDrawGroup % (16 * Bits::kWidth) == 0, "");

  // `element`: a multiple of kDrawGroup.
  __attribute__((always_inline)) Drawer(const Drawing& drawing, int64_t element, Draws* draws)
      : drawing_(drawing), first_(counter_of(element)), draws_(draws) {
    begin();
  }

  // Those of whole groups.
  int64_t made() const { return done_ / (kDrawGroup / 16) * kDrawGroup; }
  void make_until(int64_t wanted) {
    while (made() < wanted) make_some();
  }
  // Not inlined: what is around it needs the registers.
  __attribute__((noinline)) void make_some() {
    for (int some = 0; some < 2; ++some) {
      if (FUSEDOPT_MOSTLY(round_ < kRounds)) {
        philox_round(words_, drawing_.keys[round_][0], drawing_.keys[round_][1]);
        ++round_;
      } else {
        finish();
        done_ += Bits::kWidth;
        begin();
      }
    }
  }

 private:
  __attribute__((always_inline)) void begin() {
    set_counters(drawing_.form, drawing_.step, first_ + done_, words_);
    round_ = 0;
  }
  __attribute__((always_inline)) void finish() {
    constexpr int kWords = 4 * Bits::kWidth;
    alignas(64) uint32_t words[kWords];
    store_in_turn(words_[0], words_[1], words_[2], words_[3], words);
    const int64_t at = done_ / (kDrawGroup / 16) * kDrawGroup + done_ % (kDrawGroup / 16) * 8;
    for (int i = 0; i < kWords; i += Bits::kWidth) {
      const Bits of_counters = Bits::load(static_cast<const uint32_t*>(words + i));
#pragma GCC unroll 4
      for (int tensor = 0; tensor <= kMaxStates; ++tensor) {
        if (tensor == drawing_.num_tensors) break;
        uint16_t* const to = draws_->of[tensor] + at + 2 * i;
        summed(of_counters, sum_of(tensor, 0)).store(reinterpret_cast<uint32_t*>(to));
        summed(of_counters, sum_of(tensor, kDrawGroup / 2)).store(reinterpret_cast<uint32_t*>(to + kDrawGroup / 2));
      }
    }
  }

  const Drawing& drawing_;
  const int64_t first_;
  int64_t done_ = 0;  // counters
  Draws* draws_;
  int round_;
  Bits words_[4];
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
  __attribute__((always_inline)) Bits load_upper(int slot) const {
    if constexpr (sizeof...(Count) > 0)
      return Bits::load_upper(static_cast<const uint16_t*>(at<uint16_t>(slot)), count_[0]);
    return Bits::load_upper(static_cast<const uint16_t*>(at<uint16_t>(slot)));
  }
  template <class Bits>
  __attribute__((always_inline)) Bits load_signed(int slot) const {
    return load_as<Bits, int16_t>(slot);
  }
  template <class Lane>
  __attribute__((always_inline)) void store(int slot, DType dtype, Lane x) const {
    if (dtype == DType::kFloat32) return x.store(at<float>(slot));
    if (dtype == DType::kBFloat16) return x.store(at<BFloat16>(slot));
    x.store(at<Half>(slot));
  }
  template <class Bits>
  __attribute__((always_inline)) void store_upper(int slot, Bits bits) const {
    bits.store_upper(at<uint16_t>(slot));
  }
  template <class Bits>
  __attribute__((always_inline)) void store_lower(int slot, Bits bits) const {
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

template <int... k, class F>
__attribute__((always_inline)) inline void each_of(std::integer_sequence<int, k...>, [[maybe_unused]] F f) {
  (f(std::integral_constant<int, k>{}), ...);
}
// Compile-time loop: only elements of arrays whose indices are constants stay in registers.
template <int n, class F>
__attribute__((always_inline)) inline void each(F f) {
  each_of(std::make_integer_sequence<int, n>{}, f);
}

// State of a block to codes, four lanes of each tensor. Not inlined, as make_some().
template <class Rule, int num_states, class Base>
__attribute__((noinline)) void encode_some(const float (*values)[kCodeBlock], const float* inverses, const Draws& draws,
                                           int64_t drawn, std::byte* const* codes, int64_t at) {
  using Bits = typename Base::Bits;
  each<num_states>([&](auto k) __attribute__((always_inline)) {
    const Base inverse(inverses[k]);
    Bits code[4];
    each<4>([&](auto n) __attribute__((always_inline)) {
      constexpr int i = n * Base::kWidth;
      const Bits noise = Bits::load_noise(draws.of[1 + k] + drawn + i);
      code[n] = Code<Rule::is_signed(k)>::encode(Base::load(values[k] + i), inverse, noise);
    });
    Bits::store_highest(code[0], code[1], code[2], code[3], reinterpret_cast<uint8_t*>(codes[k]) + at);
  });
}

// The rule's part: all that is compiled for each.
// is_bfloat16: all that has 16 bits is known to be; most often it is, and branches are saved.
template <class Rule, int variant, class Base, States kind, bool is_bfloat16>
void update_run(const void* scalars, const FormRun& where, int64_t count) {
  constexpr int kNumStates = Rule::num_states(variant);
  constexpr bool kCoded = kind == States::kCoded;
  constexpr int64_t kStep = 4 * Base::kWidth;
  using Lane = typename Base::Pair;
  using Bits = typename Lane::Bits;
  const auto s = *static_cast<const typename Rule::template Scalars<float>*>(scalars);
  const FormRun run = where;  // copies, which the stores cannot alias
  Form form = where.form;
  if (is_bfloat16) form.param = form.grad = DType::kBFloat16;
  if (is_bfloat16 && kind == States::kHalf) form.state = DType::kBFloat16;

  // Of a block of codes: its state as it is updated, whose scales are known when all of it is. So it is encoded
  // together with the next block's update, whose divisions leave the time for that.
  alignas(64) float values[2][kNumStates + 1][kCodeBlock];
  Lane scale[kNumStates + 1];
  Bits most[kNumStates + 1];
  float inverse[kNumStates + 1];
  const auto draws_at = [&](int tensor, int64_t i) __attribute__((always_inline)) {
    return static_cast<const uint16_t*>(run.draws->of[tensor]) + run.ahead + i;
  };
  const auto encode = [&](int64_t begin, int64_t at, int half) __attribute__((always_inline)) {
    if constexpr (kCoded) {
      const auto* const of_block = reinterpret_cast<const float (*)[kCodeBlock]>(&values[half][0][at]);
      encode_some<Rule, kNumStates, Base>(of_block, inverse, *run.draws, run.ahead + begin + at, run.data + kState,
                                          begin + at);
    }
  };
  const auto end_encoding = [&](int64_t begin, int64_t size) {
    for (int k = 0; k < kNumStates; ++k) {
      if (inverse[k] == 0) std::memset(run.data[kState + k] + begin, 0, size);
    }
  };

  Drawer<typename Base::Bits> drawer(*where.drawing, run.drawn_from, run.draws);
  const bool draws = Rule::kWritesParam && run.draws;  // a pause, which has only to be measured, does not
  if (draws) drawer.make_until(run.ahead + (count < kDrawGroup ? count : kDrawGroup));
  const int64_t piece = kCoded ? kCodeBlock : count;
  const int companion = form.companion != Companion::kNone ? kCompanionSlot : kParam;
  int half = 0;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t end = begin + piece < count ? begin + piece : count;
    float* const scales = run.scales + begin / kCodeBlock * kNumStates;
    if constexpr (kCoded) {
      each<kNumStates>([&](auto k) __attribute__((always_inline)) {
        scale[k] = Lane(Code<Rule::is_signed(k)>::factor(scales[k]));
        most[k] = Bits(0);
      });
    }
    for (int64_t at = begin; at < end; at += kStep) {
      const int64_t next = to_fetch(at, run.left);
      const auto fetch = [&](int slot, int64_t size) __attribute__((always_inline)) {
        for (int64_t line = 0; line < kStep * size; line += 64) __builtin_prefetch(run.data[slot] + next * size + line);
      };
      const int64_t size = is_bfloat16 ? 2 : run.size[kParam];
      fetch(kParam, size);
      if (Rule::kReadsGrad) fetch(kGrad, is_bfloat16 ? 2 : run.size[kGrad]);
      for (int k = 0; k < kNumStates; ++k) fetch(kState + k, kCoded ? 1 : kind == States::kHalf ? 2 : 4);
      if (companion != kParam) fetch(companion, run.size[companion]);
      if (draws) drawer.make_some();
      if (kCoded && begin > 0) encode(begin - kCodeBlock, at - begin, 1 - half);
#pragma GCC unroll 1
      for (int64_t i = at; i < at + kStep; i += Lane::kWidth) {
        const LaneMemory<> memory(run, i);
        Lane param = load_param<Lane>(form, memory), grad(0.0f);
        if constexpr (Rule::kReadsGrad) grad = memory.template load<Lane>(kGrad, form.grad);
        Lane states[kNumStates + 1];
        each<kNumStates>([&](auto k) __attribute__((always_inline)) {
          if constexpr (kCoded) {
            const auto* const codes = reinterpret_cast<const uint8_t*>(run.data[kState + k]) + i;
            states[k] = mul(Lane::template load_codes<Rule::is_signed(k)>(codes), scale[k]);
          } else if constexpr (kind == States::kFloat32) {
            states[k] = memory.template load<Lane>(kState + k, DType::kFloat32);
          } else {
            states[k] = memory.template load<Lane>(kState + k, form.state);
          }
        });

        const Lane before = param;
        const Lane added = Rule::template update<variant>(s, param, grad, states);

        if constexpr (Rule::kWritesParam) {
          const auto drawn = [&]() __attribute__((always_inline)) { return Bits::load(draws_at(0, i)); };
          store_param(form, param, drawn, memory);
        }
        each<kNumStates>([&](auto k) __attribute__((always_inline)) {
          if constexpr (kCoded) {
            states[k].store(values[half][k] + (i - begin));
            const Bits bits = bits_of(states[k]);
            most[k] = max(most[k], Rule::is_signed(k) ? without_sign(bits) : bits);
          } else if constexpr (kind == States::kFloat32) {
            memory.store(kState + k, DType::kFloat32, states[k]);
          } else if (FUSEDOPT_RARELY(!form.stochastic_state)) {  // a moving average
            memory.store(kState + k, form.state, states[k]);
          } else {
            store_drawn(form.state, states[k], Bits::load(draws_at(1 + k, i)), kState + k, memory);
          }
        });
        if (FUSEDOPT_RARELY(Rule::kHasCompany && run.ema != Ema::kNone)) {
          const Lane now = averaged(form, param, memory);
          Lane average = now;
          if (run.ema == Ema::kMove) average = Common::average(s, memory.template load<Lane>(kEmaSlot, form.ema), now);
          memory.store(kEmaSlot, form.ema, average);
        }
        if (FUSEDOPT_RARELY(run.seen)) {
          if constexpr (!Rule::kReadsGrad) grad = memory.template load<Lane>(kGrad, form.grad);
          grad.store(run.seen->grad + i);
          before.store(run.seen->before + i);
          added.store(run.seen->added + i);
        }
      }
    }
    if constexpr (kCoded) {
      if (begin > 0) end_encoding(begin - kCodeBlock, kCodeBlock);
      each<kNumStates>([&](auto k) __attribute__((always_inline)) {
        const BlockScale found = block_scale<Code<Rule::is_signed(k)>>(bits_to_float(largest(most[k])));
        scales[k] = found.scale;
        inverse[k] = found.inverse;
      });
      half = 1 - half;
      if (end < count) continue;
      for (int64_t at = 0; at < end - begin; at += kStep) encode(begin, at, 1 - half);
      end_encoding(begin, end - begin);
    }
  }
}

// A piece of such a row: brings its elements, wherever they lie, to update_run. Compiled once for all rules.
template <class Lane, int kStep>
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
             {},
             0,
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
      if (stream_[slot] >= 0) run_.size[slot] = itemsize(form_.dtype(k));
    }
  }

  void walk(int64_t begin, int64_t end) {
    if (form_.draws()) run_.draws = &draws_;
    const bool copies = row_.layout || stats_;
    for (int64_t at = begin; at < end;) {
      const int64_t most = copies ? kRun : kFormRun;
      int64_t stop = at + most < end ? at + most : end;
      if (form_.run > 0 && stop - at > form_.run - at % form_.run) stop = at + form_.run - at % form_.run;
      if (form_.is_coded()) {
        if (form_.row_numel % kCodeBlock != 0) stop = form_.block_end(at);
      } else if (!copies && stop - at > kStep) {
        stop -= (stop - at) % kStep;  // what is left is copied
      }
      const int64_t whole = form_.whole(at);
      run_.ahead = whole % kDrawGroup;
      run_.drawn_from = whole - run_.ahead;
      if (form_.is_coded()) {
        auto* const scales = reinterpret_cast<float*>(row_.data[form_.scales()]);
        run_.scales = scales + form_.block_of(at) * form_.num_states;
      }
      row_.layout || (stop - at) % kStep != 0 ? buffered(at, stop) : direct(at, stop, end);
      if (stats_ && (stop >= end || stop / kPart != at / kPart)) row_.beside->stats[at / kPart] = stats_->end_part();
      // The last block may reach into a part that no other begins in.
      if (stats_ && stop == row_.numel && (stop - 1) / kPart != at / kPart) row_.beside->stats[(stop - 1) / kPart] = {};
      at = stop;
    }
  }

 private:
  static int64_t itemsize(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kCode ? 1 : 2; }

  void direct(int64_t begin, int64_t end, int64_t row_end) {
    for (int slot = 0; slot < kNumSlots; ++slot) {
      if (stream_[slot] >= 0) run_.data[slot] = row_.data[stream_[slot]] + begin * run_.size[slot];
    }
    run_.left = row_end - begin;
    update_(row_.scalars, run_, end - begin);
    if (stats_) measure(end - begin);
  }

  // Strided streams, and what fills no whole lane.
  void buffered(int64_t begin, int64_t end) {
    alignas(64) std::byte buffer[kNumSlots][kRun * sizeof(float)];
    const int64_t count = end - begin, whole = (count + kStep - 1) / kStep * kStep;
    for (int slot = 0; slot < kNumSlots; ++slot) {
      run_.data[slot] = buffer[slot];
      if (stream_[slot] >= 0) std::memset(buffer[slot] + count * run_.size[slot], 0, (whole - count) * run_.size[slot]);
    }
    move(begin, end, true);
    run_.left = count;
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
        const int64_t size = run_.size[slot], stride = inner ? inner->stride[k] * size : size;
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
  const Common::Scalars<float> common_;
  const Drawing drawing_;
  Draws draws_;
  FormRun::Seen seen_;
  FormRun run_;
};

template <class Rule, int variant, class Lane>
void update_form(const TensorRow& row, int64_t begin, int64_t end) {
  Stats<Lane> stats;
  const bool measures = Rule::kHasCompany && row.beside && row.beside->stats;
  const Form& form = *row.form;
  constexpr DType kBFloat16 = DType::kBFloat16;
  const bool is_bfloat16 = form.param == kBFloat16 && form.grad == kBFloat16;
  auto update = update_run<Rule, variant, Lane, States::kFloat32, false>;
  if (form.is_coded()) {
    update = update_run<Rule, variant, Lane, States::kCoded, false>;
  } else if (form.state == DType::kFloat32) {
    if (is_bfloat16) update = update_run<Rule, variant, Lane, States::kFloat32, true>;
  } else if (is_bfloat16 && form.state == kBFloat16) {
    update = update_run<Rule, variant, Lane, States::kHalf, true>;
  } else {
    update = update_run<Rule, variant, Lane, States::kHalf, false>;
  }
  FormWalk<Lane, 4 * Lane::kWidth>(row, update, measures ? &stats : nullptr).walk(begin, end);
}

}  // namespace
}  // namespace fusedopt
