// What a Lane is, and the few conversions that every target must agree on.
//
// A Lane is a small vector of opmath values (float or double). A target's header (scalar.h, avx2.h, avx512.h)
// defines Lane types inside its own namespace (CUDA uses scalar.h's) with:
//
//   typename Lane::Scalar, Lane::kWidth
//   Lane::kPrefersFma                    two multiply-adds take less time than a division, or one than two operations
//   Lane(Scalar)                         the same value in every element
//   Lane::load(const T*), load(const T*, n)   n < kWidth: the rest is zero
//   store(T*), store(T*, n)              one rounding, to nearest even, to the storage type T
//   add sub mul div sqrt fma neg         one correctly rounded IEEE operation each, never contracted
//   maximum(a, b)                        a > b ? a : b, and NaN if either is NaN (torch.maximum)
//   abs(x)
//   if_equal(a, b, x, y)                 a == b ? x : y
//   any_above(a, b)                      is a <= b not true of some element
//   any_outside(a, most)                 is 0 < a <= most not true of some element; neither is negative, most no NaN
//   to_doubles(Lane::Doubles*)           its elements as lanes of doubles
//   flush_subnormal(x)                   |x| below the smallest normal number becomes a zero of the same sign
//
// A lane of floats also has
//
//   Lane::Bits                           as many unsigned integers of 32 bits, see below
//   bits_of(x), float_of(Bits)           the same bits
//   if_ordered(x, a, b)                  x is no NaN ? a : b, of Bits
//   min(a, b), max(a, b)                 a < b ? a : b, a > b ? a : b
//   max_unless_zero(x, a, b)             x == 0 ? a : max(a, b)
//   Lane::Pair                           a lane of more elements (twice.h), where that is faster; it also has
//   Pair::load_codes<is_signed>(const uint8_t*)   of 8 bits, as the float16s that they are when moved left by 6, their
//                                        sign, if they have one, in its place
//   Lane::rounded(x, S)                  as store() and load() of storage type S would leave it
//
// and Bits
//
//   Bits(uint32_t), Bits::count_from(first)   first, first + 1, ...
//   Bits::load(const I*), load(p, n), store(I*)   of integers of 16 or 32 bits; stored: the low ones
//   Bits::load_upper(const uint16_t*), load_upper(p, n), store_upper(uint16_t*)   of the upper halves
//   add sub bit_and bit_or bit_xor, x.left<k>() x.right<k>()   modulo 2^32, shifts by k
//   x.next_words<k>()                    words of 16 bits: in each 8 of them, the one k further on, cyclically
//   min(a, b), max(a, b)                 unsigned
//   largest(a)                           of its elements
//   if_same(a, b, x, y)                  a == b ? x : y
//   if_set(a, x, y)                      bit by bit: a ? x : y
//   Bits::load_noise(const uint16_t*)    moved left by three, behind them 100
//   Bits::store_highest(a, b, c, d, uint8_t*)   the highest byte of each, of four one behind the other
//   mul_wide(a, constant, &high, &low)   the product's halves
//   store_in_turn(a, b, c, d, p)         a0 b0 c0 d0 a1 b1 ...
//
// Everything here has internal linkage: the file of an instruction set must not hand its code to another one.
#pragma once

#include <cstdint>
#include <cstring>

// Code that nvcc compiles for the GPU too.
#ifdef __CUDACC__
#define FUSEDOPT_HD __host__ __device__
#else
#define FUSEDOPT_HD
#endif

// What a call would cost more than it does: arguments in registers.
#ifdef __CUDACC__
#define FUSEDOPT_INLINE __forceinline__
#else
#define FUSEDOPT_INLINE __attribute__((always_inline)) inline
#endif

// A condition that is the same for many elements: what follows from it is moved out of, or into, the straight line.
#define FUSEDOPT_RARELY(condition) __builtin_expect(static_cast<bool>(condition), 0)
#define FUSEDOPT_MOSTLY(condition) __builtin_expect(static_cast<bool>(condition), 1)

namespace fusedopt {

// Storage types of 16 bits. They are only ever loaded into float and stored from float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace {

FUSEDOPT_HD inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FUSEDOPT_HD inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSEDOPT_HD inline float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN. A GPU has an instruction for it: the same bits but for a NaN's.
FUSEDOPT_HD inline BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x0040u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

FUSEDOPT_HD inline float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | magnitude << 13);  // inf, nan
  // Rebias the exponent by a multiplication: exact, and right for subnormal halves too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

FUSEDOPT_HD inline Half to_half(float value) {
#ifdef __CUDA_ARCH__
  Half rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 puts the last bit of the half at the last bit of the float's significand.
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rebias = magnitude - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rebias + 0xfffu + (rebias >> 13 & 1u)) >> 13)};
#endif
}

}  // namespace
}  // namespace fusedopt
