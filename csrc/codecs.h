// How float32 values are stored in fewer bits and come back: stochastic rounding and the draws it needs, a float32 in
// two halves, the 8-bit codes. Integer operations over a Lane: the same on every target. docs/precision.md has the
// definitions.
#pragma once

#include <cstdint>

#include "form.h"
#include "lanes/scalar.h"

// What a call would cost more than it does: arguments in registers.
#ifdef __CUDACC__
#define FUSEDOPT_INLINE __forceinline__
#else
#define FUSEDOPT_INLINE __attribute__((always_inline)) inline
#endif

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

// A block's scale, for its elements.
template <class Lane>
struct CodeScale {
  Lane half, whole, down;  // half of it, it, and what a subnormal lies below
};

// A small float: a sign if kSigned, exponent and mantissa. Its largest value lies in [1, 2).
template <bool is_signed, int exponent_bits, int mantissa_bits>
struct Code {
  static constexpr int kMantissa = mantissa_bits;
  static constexpr int kBias = (1 << exponent_bits) - 1;
  static constexpr uint32_t kLargest = is_signed ? 0x7f : 0xff;
  static constexpr float kLargestValue = 2 - 1.0f / (1 << mantissa_bits);
  static_assert(is_signed + exponent_bits + mantissa_bits == 8, "");

  static constexpr uint32_t kSmallest = static_cast<uint32_t>(128 - kBias) << 23;  // normal: 2 ** (1 - bias)
  // Where floats have the fields 0 and 1.
  static constexpr uint32_t kZero = kSmallest - (1u << 23), kOne = kZero + (1u << (23 - kMantissa));

  template <class Lane>
  FUSEDOPT_HD static FUSEDOPT_INLINE CodeScale<Lane> scaled(float scale) {
    return {Lane(portable::mul_one(scale, 0.5f)), Lane(scale),
            Lane(portable::mul_one(scale, -bits_to_float(kSmallest)))};
  }

  // All products but the last are exact, block_scale() sees to that.
  template <class Lane, class Bits = typename Lane::Bits>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane decode(Bits code, const CodeScale<Lane>& scale) {
    const Bits field = is_signed ? bit_and(code, Bits(kLargest)) : code;
    // Twice the value, if it is normal. A subnormal one is what that is above the smallest normal value, which is less.
    const Lane above = Lane::float_of(add(field.template left<23 - kMantissa>(), Bits(kSmallest)));
    const Lane value = min(mul(above, scale.half), fma(above, scale.whole, scale.down));
    if (!is_signed) return value;
    return Lane::float_of(bit_or(bits_of(value), bit_and(code.template left<24>(), Bits(0x80000000u))));
  }

  // inverse: of the scale; 0 if that is.
  template <class Lane, class Bits = typename Lane::Bits>
  FUSEDOPT_HD static FUSEDOPT_INLINE Bits encode(Lane x, Lane inverse, Bits draws) {
    const Bits bits = bits_of(x);
    const Lane magnitude = Lane::float_of(without_sign(bits)), zero(0.0f), smallest = Lane::float_of(Bits(kSmallest));
    // The other way round: half of what is above the smallest normal value; of a subnormal one that is more.
    Lane y = mul(magnitude, inverse);
    y = max(y, mul(add(y, smallest), Lane(0.5f)));
    y = min(y, Lane(kLargestValue));
    // What is not zero must not become it: it is divided by.
    if (!is_signed) y = max(y, if_equal(magnitude, zero, zero, Lane::float_of(Bits(kOne))));
    // As 0 has the field 0, and draws begin at a half of one.
    const Bits sum = sub(add(bits_of(y), draws.template left<7 - kMantissa>()), Bits(kZero - (1u << (6 - kMantissa))));
    const Bits field = sum.template right<23 - kMantissa>();
    if (!is_signed) return field;
    return bit_or(field, bit_and(bits.template right<24>(), Bits(0x80)));
  }
};

// Those of what may be negative, and of what is not.
using SignedCode = Code<true, 3, 4>;
using UnsignedCode = Code<false, 4, 4>;

// A block's scale, of its largest magnitude, and the inverse. 0 of a magnitude too small to have one whose products
// with codes are exact, NaN of one that is not finite: then the inverse is 0, and all codes must be.
struct BlockScale {
  float scale, inverse;
};
template <class C>
FUSEDOPT_HD inline BlockScale block_scale(float largest) {
  const float scale = portable::mul_one(largest, 1 / C::kLargestValue);
  if (largest - largest != 0) return {bits_to_float(0x7fc00000u), 0};
  if (!(scale >= 0x1p-112f)) return {0, 0};
  return {scale, portable::div_one(1.0f, scale)};
}

}  // namespace
}  // namespace fusedopt
