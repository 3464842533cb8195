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

// Philox4x32-10 (Salmon et al. 2011): four words of random bits for each counter of four. key(round, which) is one of
// the two keys of a round.
template <class Bits, class Key>
FUSEDOPT_HD FUSEDOPT_INLINE void philox(Bits* counter, Key key) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high2, low2;
    mul_wide(counter[0], 0xD2511F53u, &high0, &low0);
    mul_wide(counter[2], 0xCD9E8D57u, &high2, &low2);
    counter[0] = bit_xor(bit_xor(high2, counter[1]), key(round, 0));
    counter[2] = bit_xor(bit_xor(high0, counter[3]), key(round, 1));
    counter[1] = low2;
    counter[3] = low0;
  }
}
FUSEDOPT_HD FUSEDOPT_INLINE uint32_t round_key(uint64_t seed, int round, int which) {
  const auto from = static_cast<uint32_t>(seed >> 32 * which), more = static_cast<uint32_t>(round);
  return from + more * (which == 0 ? 0x9E3779B9u : 0xBB67AE85u);
}

// Draws are made from a multiple of so many elements on: of 8 lanes of any target.
constexpr int64_t kDraws = 128;

// The draws of a parameter's elements, at a step: 8 of a counter.
template <class Bits, class Key>
FUSEDOPT_HD FUSEDOPT_INLINE void draw(const Form& form, uint32_t step, int64_t counter, Bits* words, Key key) {
  words[0] = Bits::count_from(static_cast<uint32_t>(counter));
  words[1] = Bits(static_cast<uint32_t>(counter >> 32));
  words[2] = Bits(step);
  words[3] = Bits(form.position);
  philox(words, key);
}

// What all draws of a parameter have in common.
struct Drawing {
  uint32_t step = 0;
  uint32_t keys[10][2];

  Drawing(const Form& form, uint32_t at_step) : step(at_step) {
    for (int round = 0; round < 10; ++round) {
      for (int which = 0; which < 2; ++which) keys[round][which] = round_key(form.seed, round, which);
    }
  }
};

// Those of 8 lanes' elements, from a multiple of kDraws on.
template <class Bits>
__attribute__((noinline)) void draw_more(const Form& form, const Drawing& drawing, int64_t element, uint16_t* out) {
  Bits words[4];
  draw(form, drawing.step, element / 8, words, [&](int round, int which) { return Bits(drawing.keys[round][which]); });
  store_in_turn(words[0], words[1], words[2], words[3], reinterpret_cast<uint32_t*>(out));
}

// A state tensor's own, of the element's: rotated by 8, 4 or 12 bits, so each is uniform, and two are next to
// uncorrelated.
template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits state_draw(Bits draws, int k) {
  const Bits twice = bit_or(draws, draws.template left<16>()), mask(0xffffu);
  if (k == 0) return bit_and(twice.template right<8>(), mask);
  if (k == 1) return bit_and(twice.template right<12>(), mask);
  return bit_and(twice.template right<4>(), mask);
}

// --- 16 bits ---------------------------------------------------------------------------------------------------------

template <class Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits without_sign(Bits bits) {
  return bit_and(bits, Bits(0x7fffffffu));
}

// Up or down with the probabilities that make it x on average. Infinities and NaN (which are quiet: results of
// arithmetic, or loaded from 16 bits) as to nearest.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits stochastic(Lane x, Bits draws, BFloat16) {
  const Bits bits = bits_of(x);
  return if_less(without_sign(bits), Bits(0x7f800000u), add(bits, draws), bits).template right<16>();
}
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits stochastic(Lane x, Bits draws, Half) {
  const Bits bits = bits_of(x), magnitude = without_sign(bits), inf(0x7c00);
  const Bits sum = sub(add(magnitude, draws.template right<3>()), Bits(0x38000000u));
  Bits half = sum.template right<13>();
  half = min(half, inf);
  // A subnormal half: in units of 2^-40.
  const Lane small = Lane::float_of(if_less(magnitude, Bits(0x38800000u), magnitude, Bits(0)));
  const Bits units = truncated(mul(small, Lane(0x1p40f)));
  half = if_less(magnitude, Bits(0x38800000u), add(units, draws).template right<16>(), half);
  const Bits nan = bit_or(Bits(0x7e00), bit_and(magnitude.template right<13>(), Bits(0x1ff)));
  half = if_less(magnitude, Bits(0x47800000u), half, inf);
  half = if_less(Bits(0x7f800000u), magnitude, nan, half);
  return bit_or(half, bit_and(bits.template right<16>(), Bits(0x8000)));
}

// To nearest, ties away from zero: then each bfloat16 stands for 65,536 float32 values, which 16 bits more tell apart.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits away(Lane x) {
  const Bits bits = bits_of(x), nan = bit_or(bits.template right<16>(), Bits(0x40));
  return if_less(Bits(0x7f800000u), without_sign(bits), nan, add(bits, Bits(0x8000)).template right<16>());
}
// What is left of x beside that.
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Bits remainder(Lane x) {
  const Bits bits = bits_of(x);
  return if_less(Bits(0x7f800000u), without_sign(bits), Bits(0), bit_and(bits, Bits(0xffff)));
}
template <class Lane, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE Lane joined(Bits high, Bits remainder) {
  // The remainder is signed: 0xffff is -1.
  const Bits low = sub(bit_xor(remainder, Bits(0x8000)), Bits(0x8000)), bits = high.template left<16>();
  // A zero, or an infinity, that was written from outside has nothing to do with the remainder of what was there.
  const Bits sum = add(bits, low);
  return Lane::float_of(if_less(Bits(0x7f800000u), without_sign(sum), bits, sum));
}

// What Kahan's compensation keeps of x beside its stored value: nothing of an infinity.
template <class Lane>
FUSEDOPT_HD FUSEDOPT_INLINE Lane compensation(Lane x, Lane stored) {
  const Lane zero(0.0f), finite = sub(stored, stored);
  return if_equal(finite, zero, sub(x, stored), zero);
}

// --- a parameter -----------------------------------------------------------------------------------------------------

// `memory` has the elements of each slot (form.h): load<Lane>(slot, dtype), load_words<Bits>(slot), store(slot, dtype,
// x), store_words(slot, bits).

// The value that a parameter stands for.
template <class Lane, class Memory>
FUSEDOPT_HD FUSEDOPT_INLINE Lane load_param(const Form& form, const Memory& memory) {
  using Bits = typename Lane::Bits;
  if (form.companion == Companion::kRemainder)
    return joined<Lane>(memory.template load_words<Bits>(kParam), memory.template load_words<Bits>(kCompanionSlot));
  const Lane param = memory.template load<Lane>(kParam, form.param);
  if (form.companion == Companion::kMaster) {
    // A parameter that is not its master's rounding was changed from outside, and is what counts.
    const Lane master = memory.template load<Lane>(kCompanionSlot, DType::kFloat32);
    Lane rounded;
    if (form.param == DType::kBFloat16) {
      rounded = Lane::float_of(away(master).template left<16>());
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
  if (dtype == DType::kBFloat16) return memory.store_words(slot, stochastic(x, draws, BFloat16{}));
  memory.store_words(slot, stochastic(x, draws, Half{}));
}

template <class Lane, class Memory, class Bits = typename Lane::Bits>
FUSEDOPT_HD FUSEDOPT_INLINE void store_param(const Form& form, Lane x, Bits draws, const Memory& memory) {
  switch (form.companion) {
    case Companion::kNone:
      if (form.stochastic_param) return store_drawn(form.param, x, draws, kParam, memory);
      return memory.store(kParam, form.param, x);
    case Companion::kMaster:
      memory.store(kCompanionSlot, DType::kFloat32, x);
      if (form.param == DType::kBFloat16) return memory.store_words(kParam, away(x));
      return memory.store(kParam, DType::kFloat16, x);
    case Companion::kRemainder:
      memory.store_words(kParam, away(x));
      return memory.store_words(kCompanionSlot, remainder(x));
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

// A small float: a sign if kSigned, exponent and mantissa. Its largest value lies in [1, 2).
template <bool is_signed, int exponent_bits, int mantissa_bits>
struct Code {
  static constexpr int kMantissa = mantissa_bits;
  static constexpr int kBias = (1 << exponent_bits) - 1;
  static constexpr uint32_t kLargest = is_signed ? 0x7f : 0xff;
  static constexpr float kLargestValue = 2 - 1.0f / (1 << mantissa_bits);
  static_assert(is_signed + exponent_bits + mantissa_bits == 8, "");

  // 2 ** exponent
  FUSEDOPT_HD static constexpr uint32_t power_bits(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }

  template <class Lane, class Bits = typename Lane::Bits>
  FUSEDOPT_HD static FUSEDOPT_INLINE Lane decode(Bits code, Lane scale) {
    const Bits field = bit_and(code, Bits(kLargest)), normal(1u << kMantissa), smallest(power_bits(1 - kBias));
    // Subnormals are what is above the smallest normal value, in steps of its last bit.
    const Bits above = add(field.template left<23 - kMantissa>(), smallest);
    const Bits subnormal = bits_of(sub(Lane::float_of(above), Lane::float_of(smallest)));
    Bits value = if_less(field, normal, subnormal, sub(above, Bits(1u << 23)));
    if (is_signed) value = bit_or(value, bit_and(code, Bits(0x80)).template left<24>());
    return mul(Lane::float_of(value), scale);
  }

  // inverse: of the scale; 0 if that is.
  template <class Lane, class Bits = typename Lane::Bits>
  FUSEDOPT_HD static FUSEDOPT_INLINE Bits encode(Lane x, Lane inverse, Bits draws) {
    const Bits bits = bits_of(x), magnitude = without_sign(bits), smallest(power_bits(1 - kBias));
    const Lane y = mul(Lane::float_of(magnitude), inverse);
    // Subnormals are rounded as what is above the smallest normal value.
    const Bits above = bits_of(add(y, Lane::float_of(smallest))), y_bits = bits_of(y);
    const Bits z = if_less(y_bits, smallest, sub(above, Bits(1u << 23)), y_bits);
    const Bits sum = add(add(z, draws.template left<7 - kMantissa>()), Bits(1u << (6 - kMantissa)));
    Bits field = sub(sum.template right<23 - kMantissa>(), Bits(static_cast<uint32_t>(127 - kBias) << kMantissa));
    field = min(field, Bits(kLargest));
    if (is_signed) return bit_or(field, bit_and(bits.template right<24>(), Bits(0x80)));
    // What is not zero must not become it: it is divided by.
    return max(field, min(magnitude, Bits(1)));
  }
};

// Those of what may be negative, and of what is not.
using SignedCode = Code<true, 3, 4>;
using UnsignedCode = Code<false, 4, 4>;

// A block's scale, of its largest magnitude, and the inverse. 0 of a magnitude too small to have one, NaN of one that
// is not finite: then the inverse is 0, and all codes are.
struct BlockScale {
  float scale, inverse;
};
template <class C>
FUSEDOPT_HD inline BlockScale block_scale(float largest) {
  const float scale = portable::mul_one(largest, 1 / C::kLargestValue);
  if (largest - largest != 0) return {bits_to_float(0x7fc00000u), 0};
  if (!(scale >= 0x1p-126f)) return {0, 0};
  return {scale, portable::div_one(1.0f, scale)};
}

}  // namespace
}  // namespace fusedopt
