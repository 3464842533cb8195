// How float32 values are stored in fewer bits and come back: stochastic rounding and the draws it needs, a float32 in
// two halves, the 8-bit codes. Integer operations over a Lane: the same on every target. docs/precision.md has the
// definitions.
#pragma once

#include <cstdint>

#include "form.h"
#include "lanes/scalar.h"

namespace fusedopt {
namespace {

// --- draws -----------------------------------------------------------------------------------------------------------

// Philox4x32-7 (Salmon et al. 2011): four words of random bits for each counter of four. Seven rounds are the fewest
// that passed all their tests.
constexpr int kRounds = 7;
template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE void philox_round(Bits* words, uint32_t key0, uint32_t key1) {
  Bits high0, low0, high2, low2;
  mul_wide(words[0], 0xD2511F53u, &high0, &low0);
  mul_wide(words[2], 0xCD9E8D57u, &high2, &low2);
  words[0] = bit_xor(bit_xor(high2, words[1]), Bits(key0));
  words[2] = bit_xor(bit_xor(high0, words[3]), Bits(key1));
  words[1] = low2;
  words[3] = low0;
}
FUSEDOPT_HD FUSEDOPT_INLINE uint32_t round_key(uint64_t seed, int round, int which) {
  const auto from = static_cast<uint32_t>(seed >> 32 * which), more = static_cast<uint32_t>(round);
  return from + more * (which == 0 ? 0x9E3779B9u : 0xBB67AE85u);
}

// A counter's 128 bits are eight draws of 16, u[0] to u[7]. Sums of different ones, modulo 2, are as random, and any
// two such sums independent of each other. So a counter is for 16 elements: 8 that lie together, and the 8 that are 128
// further on, in each group of 256.
constexpr int64_t kDrawGroup = 256;
FUSEDOPT_HD FUSEDOPT_INLINE int64_t counter_of(int64_t element) {
  return element / kDrawGroup * (kDrawGroup / 16) + element % (kDrawGroup / 2) / 8;
}
// Which sum is an element's, for tensor 0, the parameter, or a state tensor, from 1 on: the draw j = element % 8 and,
// for each bit b of this, the draw (j + b + 1) % 8.
FUSEDOPT_HD FUSEDOPT_INLINE int sum_of(int tensor, int64_t element) {
  return 2 * tensor + (element % kDrawGroup >= kDrawGroup / 2);
}
// draws: the words of counters, one behind the other; the sums which `sum` says.
template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits summed(Bits draws, int sum) {
  Bits result = draws;
  if (sum & 1) result = bit_xor(result, draws.template next_words<1>());
  if (sum & 2) result = bit_xor(result, draws.template next_words<2>());
  if (sum & 4) result = bit_xor(result, draws.template next_words<3>());
  return result;
}

template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE void set_counters(const Form& form, uint32_t step, int64_t first, Bits* words) {
  words[0] = Bits::count_from(static_cast<uint32_t>(first));
  words[1] = Bits(static_cast<uint32_t>(first >> 32));
  words[2] = Bits(step);
  words[3] = Bits(form.position);
}

// --- 16 bits ---------------------------------------------------------------------------------------------------------

template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits without_sign(Bits bits) {
  return bit_and(bits, Bits(0x7fffffffu));
}

// What is rounded to bfloat16 is in the upper halves of Bits, the lower have anything.

// Up or down with the probabilities that make it x on average. NaN (which is quiet: a result of arithmetic, or loaded
// from 16 bits) stays as it is.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits stochastic(Lane x, Bits draws, BFloat16) {
  const Bits bits = bits_of(x);
  return if_ordered(x, add(bits, draws), bits);
}
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits stochastic(Lane x, Bits draws, Half) {
  const Bits bits = bits_of(x), magnitude = without_sign(bits);
  // A subnormal half is rounded as what is above the smallest normal one.
  const Bits above = bits_of(add(Lane::float_of(magnitude), Lane(0x1p-14f)));
  const Bits z = max(magnitude, sub(above, Bits(1u << 23)));
  const Bits sum = sub(add(z, draws.template right<3>()), Bits(0x38000000u));
  const Bits nan = bit_or(Bits(0x7e00), bit_and(magnitude.template right<13>(), Bits(0x1ff)));
  const Bits half = if_ordered(x, min(sum.template right<13>(), Bits(0x7c00)), nan);
  return bit_or(half.template left<16>(), bit_and(bits, Bits(0x80000000u)));
}

// To nearest, ties away from zero: then each bfloat16 stands for 65,536 float32 values, which 16 bits more tell apart.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits away(Lane x) {
  const Bits bits = bits_of(x);
  return if_ordered(x, add(bits, Bits(0x8000)), bit_or(bits, Bits(0x400000)));
}
// What is left of x beside that, in the lower halves.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits remainder(Lane x) {
  return if_ordered(x, bits_of(x), Bits(0));
}
// upper: of bits whose lower halves are zero; remainder: with the sign of 16 bits.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Lane joined(Bits upper, Bits remainder) {
  // A zero, or an infinity, that was written from outside has nothing to do with the remainder of what was there.
  const Bits sum = add(upper, remainder);
  return Lane::float_of(if_ordered(Lane::float_of(sum), sum, upper));
}

// What Kahan's compensation keeps of x beside its stored value: nothing of an infinity.
template <class Lane>
FUSEDOPT_HD FUSEDOPT_INLINE Lane compensation(Lane x, Lane stored) {
  const Lane zero(0.0f), finite = sub(stored, stored);
  return if_equal(finite, zero, sub(x, stored), zero);
}

// --- a parameter -----------------------------------------------------------------------------------------------------

// `memory` has the elements of each slot (form.h): load<Lane>(slot, dtype), store(slot, dtype, x), and of 16 bits
// load_upper<Bits>(slot), load_signed<Bits>(slot), store_upper(slot, bits), store_lower(slot, bits).

// The value that a parameter stands for.
template <class Lane, class Memory>
FUSEDOPT_HD FUSEDOPT_INLINE Lane load_param(const Form& form, const Memory& memory) {
  using Bits = typename Lane::Bits;
  if (form.companion == Companion::kRemainder)
    return joined<Lane>(memory.template load_upper<Bits>(kParam), memory.template load_signed<Bits>(kCompanionSlot));
  const Lane param = memory.template load<Lane>(kParam, form.param);
  if (form.companion == Companion::kMaster) {
    // A parameter that is not its master's rounding was changed from outside, and is what counts.
    const Lane master = memory.template load<Lane>(kCompanionSlot, DType::kFloat32);
    Lane rounded;
    if (form.param == DType::kBFloat16) {
      rounded = Lane::float_of(bit_and(away(master), Bits(0xffff0000u)));
    } else {
      rounded = Lane::rounded(master, Half{});
    }
    return Lane::float_of(if_same(bits_of(param), bits_of(rounded), bits_of(master), bits_of(param)));
  }
  if (form.companion == Companion::kCompensation)
    return add(param, memory.template load<Lane>(kCompanionSlot, form.param));
  return param;
}

template <class Lane, class Memory, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE void store_drawn(DType dtype, Lane x, Bits draws, int slot, const Memory& memory) {
  if (dtype == DType::kBFloat16) return memory.store_upper(slot, stochastic(x, draws, BFloat16{}));
  memory.store_upper(slot, stochastic(x, draws, Half{}));
}

// draws(): those of the parameter, asked for if they are needed.
template <class Lane, class Memory, class Draws>
FUSEDOPT_HD FUSEDOPT_INLINE void store_param(const Form& form, Lane x, Draws draws, const Memory& memory) {
  switch (form.companion) {
    case Companion::kNone:
      if (form.stochastic_param) return store_drawn(form.param, x, draws(), kParam, memory);
      return memory.store(kParam, form.param, x);
    case Companion::kMaster:
      memory.store(kCompanionSlot, DType::kFloat32, x);
      if (form.param == DType::kBFloat16) return memory.store_upper(kParam, away(x));
      return memory.store(kParam, DType::kFloat16, x);
    case Companion::kRemainder:
      memory.store_upper(kParam, away(x));
      return memory.store_lower(kCompanionSlot, remainder(x));
    case Companion::kCompensation:
      Lane stored;
      if (form.param == DType::kBFloat16) {
        stored = Lane::rounded(x, BFloat16{});
      } else {
        stored = Lane::rounded(x, Half{});
      }
      memory.store(kParam, form.param, stored);
      return memory.store(kCompanionSlot, form.param, compensation(x, stored));
  }
}

// What an average is of, of a parameter that x was stored to: the value in full if the form has it.
template <class Lane, class Memory>
FUSEDOPT_HD FUSEDOPT_INLINE Lane averaged(const Form& form, Lane x, const Memory& memory) {
  if (form.companion == Companion::kMaster || form.companion == Companion::kRemainder) return x;
  return memory.template load<Lane>(kParam, form.param);
}

// --- 8 bits ----------------------------------------------------------------------------------------------------------

// A small float: a sign if it is signed, exponent and 4 bits of mantissa. Its largest value lies in [1, 2).
template <bool is_signed>
struct Code {
  static constexpr float kLargestValue = 2 - 1.0f / 16;
  static constexpr float kSmallest = is_signed ? 0x1p-6f : 0x1p-14f;  // of those that are normal
  static constexpr float kOne = kSmallest / 16;                       // the value of code 1
  // What Lane::load_codes() makes of a code, for each 1 that it stands for. A signed one has less of an exponent.
  static constexpr float kLoaded = is_signed ? 0x1p-8f : 1;

  // By which that is to be multiplied, with the block's scale: the only rounding.
  FUSEDOPT_HD static FUSEDOPT_INLINE float factor(float scale) { return portable::mul_one(scale, 1 / kLoaded); }
  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane decode(typename Lane::Bits codes, float scale) {
    return mul(Lane::template of_codes<is_signed>(codes), Lane(factor(scale)));
  }

  // Codes, in the highest bytes. `inverse`: the block's. `noise`: draws, as Bits::load_noise() has them.
  template <class Lane, class Bits = typename Lane::Bits>
  FUSEDOPT_HD static FUSEDOPT_INLINE Bits encode(Lane x, Lane inverse, Bits noise) {
    Lane y = mul(is_signed ? Lane::float_of(without_sign(bits_of(x))) : x, inverse);
    // A subnormal one lies half of what it is above the middle of the smallest normal value and zero: so its exponent
    // is that of a field of 0, and its bits are where a code's are, too.
    const Lane half(0.5f), middle(kSmallest / 2);
    y = max(y, Lane::kPrefersFma ? fma(y, half, middle) : add(mul(y, half), middle));
    // What is not zero must not become it: it is divided by.
    if (!is_signed) y = max_unless_zero(x, y, Lane((kSmallest + kOne) / 2));
    const Bits codes = add(bits_of(y), noise).template left<5>();
    return is_signed ? if_set(Bits(0x80000000u), bits_of(x), codes) : codes;
  }
};

// Those of what may be negative, and of what is not.
using SignedCode = Code<true>;
using UnsignedCode = Code<false>;

// A block's scale, of its largest magnitude, and what its values are multiplied by. 0 of one too small, NaN of one too
// large, or not finite: then the inverse is 0, and all codes must be.
struct BlockScale {
  float scale, inverse;
};
template <class C>
FUSEDOPT_HD inline BlockScale block_scale(float largest) {
  if (!(largest < 0x1p127f * C::kLoaded)) return {bits_to_float(0x7fc00000u), 0};
  const float scale = portable::mul_one(largest, 1 / C::kLargestValue);
  if (!(scale >= 0x1p-112f)) return {0, 0};
  // Products with it are two last places above the largest value at most: less than the four that a draw leaves.
  return {scale, portable::div_one(C::kLargestValue, largest)};
}

}  // namespace
}  // namespace fusedopt
