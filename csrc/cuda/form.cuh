// Rows whose streams are stored in forms of their own (form.h): included by step.cuh. What a stream is is a branch that
// is uniform over a block, so that one kernel a rule serves all forms.
#pragma once

#include "../codecs.h"

namespace fusedopt {
namespace cuda {

// As a storage type: each row's form says what its streams are.
struct Mixed {};

// N elements of all slots that lie one behind the other: for codecs.h. Four are read at once.
template <int N>
struct GroupMemory {
  std::byte* at[kNumSlots];

  template <class S>
  FUSEDOPT_DEVICE void read(int slot, S* values) const {
    struct alignas(N * sizeof(S)) Group {
      S values[N];
    };
    const Group group = *reinterpret_cast<const Group*>(global(at[slot]));
    std::memcpy(values, group.values, sizeof group.values);
  }
  template <class S>
  FUSEDOPT_DEVICE void write(int slot, const S* values) const {
    struct alignas(N * sizeof(S)) Group {
      S values[N];
    } group;
    std::memcpy(group.values, values, sizeof group.values);
    *reinterpret_cast<Group*>(global(at[slot])) = group;
  }

  template <class S, class Lane>
  FUSEDOPT_DEVICE Lane load_as(int slot) const {
    S values[N];
    read(slot, values);
    return Lane::each([&](int k) { return Lane::widen(values[k]); });
  }
  template <class S, class Lane>
  FUSEDOPT_DEVICE void store_as(int slot, const Lane& x) const {
    S values[N];
    for (int k = 0; k < N; ++k) values[k] = Lane::narrow(x.v[k], S{});
    write(slot, values);
  }
  template <class Lane>
  FUSEDOPT_DEVICE Lane load(int slot, DType dtype) const {
    if (dtype == DType::kFloat32) return load_as<float, Lane>(slot);
    if (dtype == DType::kBFloat16) return load_as<BFloat16, Lane>(slot);
    return load_as<Half, Lane>(slot);
  }
  template <class Lane>
  FUSEDOPT_DEVICE void store(int slot, DType dtype, const Lane& x) const {
    if (dtype == DType::kFloat32) return store_as<float>(slot, x);
    if (dtype == DType::kBFloat16) return store_as<BFloat16>(slot, x);
    store_as<Half>(slot, x);
  }
  template <class I, class Bits>
  FUSEDOPT_DEVICE Bits load_bits(int slot) const {
    I values[N];
    read(slot, values);
    return Bits::load(values);
  }
  template <class Bits>
  FUSEDOPT_DEVICE Bits load_upper(int slot) const {
    return load_bits<uint16_t, Bits>(slot).template left<16>();
  }
  template <class Bits>
  FUSEDOPT_DEVICE Bits load_signed(int slot) const {
    return load_bits<int16_t, Bits>(slot);
  }
  template <class Bits>
  FUSEDOPT_DEVICE Bits load_codes(int slot) const {
    return load_bits<uint8_t, Bits>(slot);
  }
  template <class Bits>
  FUSEDOPT_DEVICE void store_upper(int slot, const Bits& bits) const {
    store_lower(slot, bits.template right<16>());
  }
  template <class Bits>
  FUSEDOPT_DEVICE void store_lower(int slot, const Bits& bits) const {
    uint16_t values[N];
    bits.store(values);
    write(slot, values);
  }
  template <class Bits>
  FUSEDOPT_DEVICE void store_codes(int slot, const Bits& bits) const {
    uint8_t values[N];
    bits.store(values);
    write(slot, values);
  }
};

// The draws of N elements: of one, or of four that begin at a multiple of it.
template <int N>
struct Draws {
  portable::Bits<4> words;  // their counter's, from the first one's on
  int first;                // element of a group

  FUSEDOPT_DEVICE portable::Bits<N> of(int tensor) const {
    const portable::Bits<4> sums = summed(words, sum_of(tensor, first));
    return portable::Bits<N>::each([&](int k) { return sums.v[k / 2] >> 16 * ((first + k) % 2) & 0xffffu; });
  }
};

template <int N>
FUSEDOPT_DEVICE Draws<N> draws_of(const Form& form, uint32_t step, int64_t first) {
  portable::Bits<1> words[4];
  first = form.whole(first);
  set_counters(form, step, counter_of(first), words);
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
    philox_round(words, round_key(form.seed, round, 0), round_key(form.seed, round, 1));
  const int at = static_cast<int>(first % 8) / 2;
  portable::Bits<4> turned;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    turned.v[k] = at < 2 ? (at == 0 ? words[k] : words[(k + 1) % 4]).v[0]
                         : (at == 2 ? words[(k + 2) % 4] : words[(k + 3) % 4]).v[0];
  return {turned, static_cast<int>(first % kDrawGroup)};
}

template <class Rule, int variant>
struct FormUpdate {
  static constexpr int kNumStates = Rule::num_states(variant);
  using Scalars = typename Rule::template Scalars<float>;

  using Lane4 = portable::Lane<float, 4>;
  using Lane1 = portable::Lane<float, 1>;
  // What four elements of a row with codes are until their block's scale is known.
  struct Four {
    Lane4 states[kNumStates + 1];
    Draws<4> draws;
    Draws<1> each[4];  // if they are not read at once
    int count;
    bool at_once;
  };

  // The update of N elements. coded: states are read with the scales, and left in `updated`.
  template <int N, bool coded>
  FUSEDOPT_DEVICE static void group(const Scalars& s, const Form& form, const GroupMemory<N>& memory,
                                    const Draws<N>& draws, Ema ema, bool stats, StatsPart* mine, const float* scales,
                                    portable::Lane<float, N>* updated) {
    using Lane = portable::Lane<float, N>;
    using Bits = portable::Bits<N>;
    Lane param = load_param<Lane>(form, memory), grad(0.0f);
    if (Rule::kReadsGrad || (N == 1 && stats)) grad = memory.template load<Lane>(kGrad, form.grad);
    Lane states[kNumStates + 1];
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) {
      if constexpr (coded) {
        const Bits codes = memory.template load_codes<Bits>(kState + k);
        states[k] = Rule::is_signed(k) ? SignedCode::decode<Lane>(codes, scales[k])
                                       : UnsignedCode::decode<Lane>(codes, scales[k]);
      } else {
        states[k] = memory.template load<Lane>(kState + k, form.state);
      }
    }
    const Lane before = param;
    const Lane change = Rule::template update<variant>(s, param, grad, states);
    if constexpr (Rule::kWritesParam) store_param(form, param, [&] { return draws.of(0); }, memory);
#pragma unroll
    for (int k = 0; k < kNumStates; ++k) {
      if constexpr (coded) {
        updated[k] = states[k];
      } else if (form.stochastic_state) {
        store_drawn(form.state, states[k], draws.of(1 + k), kState + k, memory);
      } else {
        memory.store(kState + k, form.state, states[k]);
      }
    }
    if (!Rule::kHasCompany) return;
    if (ema != Ema::kNone) {
      const Lane now = averaged(form, param, memory);
      Lane average = now;
      if (ema == Ema::kMove) average = Common::average(s, memory.template load<Lane>(kEmaSlot, form.ema), now);
      memory.store(kEmaSlot, form.ema, average);
    }
    if (N > 1 || !stats) return;  // they would need too many registers
    Common::Scalars<float> as_computed = s;
    as_computed.flags &= Common::kUnscale;
    const Lane g = Common::value(as_computed, grad), after = load_param<Lane>(form, memory);
    for (int k = 0; k < N; ++k) include(mine, g.v[k], before.v[k], after.v[k], change.v[k]);
  }

  // Where a row's streams have N elements from `first` on, which must lie together.
  template <int N>
  FUSEDOPT_DEVICE static GroupMemory<N> find_group(const Row& row, std::byte* grad, const Layout::Dim* dims, Ema ema,
                                                   int64_t first) {
    GroupMemory<N> memory;
#pragma unroll
    for (int slot = 0; slot < kNumSlots; ++slot) {
      const int k = stream_of(row, ema, slot);
      memory.at[slot] = nullptr;
      if (k < 0) continue;
      int64_t offset = first;
      if (N == 1 && row.layout >= 0) offset = element_offset(row, dims, first, k);
      memory.at[slot] = (slot == kGrad ? grad : row.data[k]) + offset * size_of(row.form.dtype(k));
    }
    return memory;
  }
  FUSEDOPT_DEVICE static int stream_of(const Row& row, Ema ema, int slot) {
    if (slot >= kState + kNumStates && slot < kCompanionSlot) return -1;
    if (slot == kEmaSlot && (ema == Ema::kNone || !Rule::kHasCompany)) return -1;
    return row.form.stream(slot);
  }
  FUSEDOPT_DEVICE static int64_t element_offset(const Row& row, const Layout::Dim* dims, int64_t i, int k) {
    int64_t offset = 0;
    for (int64_t d = row.layout + row.ndim - 1; d >= row.layout; --d) {
      const Layout::Dim& dim = *global(dims + d);
      offset += i % dim.size * dim.stride[k];
      i /= dim.size;
    }
    return offset;
  }
  FUSEDOPT_DEVICE static int64_t size_of(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : dtype == DType::kCode ? 1 : 2;
  }

  // Can four elements be read at once, of a group that begins at a multiple of four?
  FUSEDOPT_DEVICE static bool has_groups(const Row& row, std::byte* grad, Ema ema) {
    if (row.layout >= 0 || !row.form.keeps_fours()) return false;
    bool aligned = true;
    for (int slot = 0; slot < kNumSlots; ++slot) {
      const int k = stream_of(row, ema, slot);
      if (k < 0) continue;
      const auto at = reinterpret_cast<uintptr_t>(slot == kGrad ? grad : row.data[k]);
      aligned &= at % (4 * size_of(row.form.dtype(k))) == 0;
    }
    return aligned;
  }

  // `stats`: the chunk's part, null if they are not wanted.
  FUSEDOPT_DEVICE static void run(const Scalars& s, const Row& row, std::byte* grad, const Where& table, Ema ema,
                                  StatsPart* stats, int64_t begin, int64_t end, int thread) {
    if (kNumStates > 0 && row.form.is_coded()) return blocks(s, &row, grad, table.dims, ema, stats, begin, end, thread);
    if (!stats && has_groups(row, grad, ema)) {
      const int64_t whole = begin + (end - begin) / 4 * 4;
      groups(s, &row, grad, ema, begin, whole, thread);
      begin = whole;
    }
    if (begin < end) elements(s, &row, grad, table.dims, ema, stats, begin, end, thread);
  }

  template <int N>
  FUSEDOPT_DEVICE static void one_group(const Scalars& s, const Row& row, std::byte* grad, const Layout::Dim* dims,
                                        Ema ema, bool stats, StatsPart* mine, int64_t i) {
    Draws<N> draws{};
    if (row.form.draws()) draws = draws_of<N>(row.form, s.step, i);
    group<N, false>(s, row.form, find_group<N>(row, grad, dims, ema, i), draws, ema, stats, mine, nullptr, nullptr);
  }

  // Four elements a thread. Not inlined, like the other ways: each has the registers for itself.
  FUSEDOPT_DEVICE_CALL static void groups(const Scalars s, const Row* row_at, std::byte* grad, Ema ema, int64_t begin,
                                          int64_t end, int thread) {
    const Row& row = *global(row_at);
    for (int64_t i = begin + 4 * thread; i < end; i += 4 * kThreads)
      one_group<4>(s, row, grad, nullptr, ema, false, nullptr, i);
  }

  // One element a thread.
  FUSEDOPT_DEVICE_CALL static void elements(const Scalars s, const Row* row_at, std::byte* grad,
                                            const Layout::Dim* dims, Ema ema, StatsPart* stats, int64_t begin,
                                            int64_t end, int thread) {
    const Row& row = *global(row_at);
    StatsPart mine{};
    for (int64_t i = begin + thread; i < end; i += kThreads)
      one_group<1>(s, row, grad, dims, ema, stats != nullptr, &mine, i);
    if (stats) add_stats(mine, stats, thread);
  }

  // Blocks of codes that begin in [begin, end): each a warp's, four elements a lane. The host runs a warp as one
  // thread, lane after lane.
#ifdef __CUDA_ARCH__
  static constexpr int kLanes = 1;
#else
  static constexpr int kLanes = 32;
#endif
  FUSEDOPT_DEVICE_CALL static void blocks(const Scalars s, const Row* row_at, std::byte* grad, const Layout::Dim* dims,
                                          Ema ema, StatsPart* stats, int64_t begin, int64_t end, int thread) {
    static_assert(kCodeBlock == 4 * 32, "four elements a lane of a warp");
    const Row& row = *global(row_at);
    const Form& form = row.form;
    const bool grouped = has_groups(row, grad, ema);
    StatsPart mine{};
    // Those that begin in [begin, end).
    const int64_t last = form.block_of(end - 1);
    int64_t index = form.block_of(begin);
    if (form.block(index).begin < begin) ++index;
    if (kLanes > 1 && thread % 32 != 0) index = last + 1;
    for (index += thread / 32; index <= last; index += kThreads / 32) {
      const Form::Block block = form.block(index);
      float* const scales = global(reinterpret_cast<float*>(row.data[form.scales()])) + index * kNumStates;
      float old[kNumStates + 1], largest[kNumStates + 1] = {};
      for (int k = 0; k < kNumStates; ++k) old[k] = scales[k];

      Four four[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t i = block.begin + 4 * (kLanes > 1 ? lane : thread % 32);
        Four& here = four[lane];
        here.count = block.end - i < 0 ? 0 : block.end - i < 4 ? static_cast<int>(block.end - i) : 4;
        here.at_once = grouped && !stats && i % 4 == 0 && here.count == 4;
        for (int k = 0; k < kNumStates; ++k) here.states[k] = Lane4(0.0f);
        if (here.at_once) {
          here.draws = draws_of<4>(form, s.step, i);
          group<4, true>(s, form, find_group<4>(row, grad, dims, ema, i), here.draws, ema, false, nullptr, old,
                         here.states);
        } else {
          for (int e = 0; e < here.count; ++e) {
            Lane1 states[kNumStates + 1];
            here.each[e] = draws_of<1>(form, s.step, i + e);
            group<1, true>(s, form, find_group<1>(row, grad, dims, ema, i + e), here.each[e], ema, stats != nullptr,
                           &mine, old, states);
            for (int k = 0; k < kNumStates; ++k) here.states[k].v[e] = states[k].v[0];
          }
        }
        for (int k = 0; k < kNumStates; ++k) {
          for (int e = 0; e < 4; ++e) largest[k] = larger(largest[k], std::fabs(here.states[k].v[e]));
        }
      }
      for (int k = 0; k < kNumStates; ++k) {
        const float most = largest_of_warp(largest[k]);
        const BlockScale found = Rule::is_signed(k) ? block_scale<SignedCode>(most) : block_scale<UnsignedCode>(most);
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t i = block.begin + 4 * (kLanes > 1 ? lane : thread % 32);
          const Four& here = four[lane];
          if (here.at_once) {
            find_group<4>(row, grad, dims, ema, i)
                .store_codes(kState + k, encode(k, here.states[k], found, here.draws.of(1 + k)));
          } else {
            for (int e = 0; e < here.count; ++e) {
              const Lane1 x(here.states[k].v[e]);
              find_group<1>(row, grad, dims, ema, i + e)
                  .store_codes(kState + k, encode(k, x, found, here.each[e].of(1 + k)));
            }
          }
        }
        if (thread % 32 == 0) scales[k] = found.scale;
      }
    }
    if (stats) add_stats(mine, stats, thread);
  }

  template <int N>
  FUSEDOPT_DEVICE static portable::Bits<N> encode(int k, const portable::Lane<float, N>& x, const BlockScale& scale,
                                                  const portable::Bits<N>& draws) {
    const portable::Lane<float, N> inverse(scale.inverse);
    if (scale.inverse == 0) return portable::Bits<N>(0);
    const auto noise = portable::Bits<N>::noise(draws);
    const auto codes =
        Rule::is_signed(k) ? SignedCode::encode(x, inverse, noise) : UnsignedCode::encode(x, inverse, noise);
    return codes.template right<24>();
  }

  // The larger, NaN if one is.
  FUSEDOPT_DEVICE static float larger(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
  FUSEDOPT_DEVICE static float largest_of_warp(float mine) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) mine = larger(mine, __shfl_xor_sync(~0u, mine, apart));
#endif
    return mine;
  }
};

}  // namespace cuda
}  // namespace fusedopt
