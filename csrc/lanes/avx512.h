// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Tails are masked.
#pragma once

#include <immintrin.h>

#include "twice.h"

namespace fusedopt {
namespace avx512 {

struct F64 {
  using Scalar = double;
  using Doubles = F64;
  static constexpr int kWidth = 8;
  static constexpr bool kPrefersFma = true;
  __m512d v;

  F64() = default;
  F64(__m512d x) : v(x) {}
  explicit F64(double x) : v(_mm512_set1_pd(x)) {}

  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

  static F64 load(const double* p) { return _mm512_loadu_pd(p); }
  static F64 load(const double* p, int n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }

  friend F64 add(F64 a, F64 b) { return _mm512_add_pd(a.v, b.v); }
  friend F64 sub(F64 a, F64 b) { return _mm512_sub_pd(a.v, b.v); }
  friend F64 mul(F64 a, F64 b) { return _mm512_mul_pd(a.v, b.v); }
  friend F64 div(F64 a, F64 b) { return _mm512_div_pd(a.v, b.v); }
  friend F64 sqrt(F64 a) { return _mm512_sqrt_pd(a.v); }
  friend F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
  friend F64 neg(F64 a) { return _mm512_xor_pd(a.v, _mm512_set1_pd(-0.0)); }
  friend F64 maximum(F64 a, F64 b) {
    const __mmask8 unordered = _mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q);
    return _mm512_mask_add_pd(_mm512_max_pd(a.v, b.v), unordered, a.v, b.v);
  }
  friend F64 abs(F64 a) { return _mm512_abs_pd(a.v); }
  friend F64 if_equal(F64 a, F64 b, F64 yes, F64 no) {
    return _mm512_mask_mov_pd(no.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ), yes.v);
  }
  friend bool any_above(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ) != 0; }
  // As integers: zero less one is the largest of all.
  friend bool any_outside(F64 a, F64 most) {
    const __m512i less_one = _mm512_sub_epi64(_mm512_castpd_si512(a.v), _mm512_set1_epi64(1));
    return _mm512_cmpge_epu64_mask(less_one, _mm512_castpd_si512(most.v)) != 0;
  }
  void to_doubles(F64* out) const { *out = *this; }
  friend F64 flush_subnormal(F64 a) {
    const __mmask8 small = _mm512_fpclass_pd_mask(a.v, 0x20);
    return _mm512_mask_and_pd(a.v, small, a.v, _mm512_set1_pd(-0.0));
  }
};

struct Bits {
  static constexpr int kWidth = 16;
  __m512i v;

  Bits() = default;
  Bits(__m512i x) : v(x) {}
  explicit Bits(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
  static Bits count_from(uint32_t first) {
    return add(Bits(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }

  // Upper halves from, or to, words that lie together: one shuffle, without a shift.
  static Bits upper(__m256i x) {
    const __m512i from = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000,
                                          0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
    return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(x));
  }
  __m256i upper() const {
    const __m256i odd = _mm256_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(odd), v));
  }
  __m256i lower() const {
    const __m256i even = _mm256_set_epi16(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(even), v));
  }

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Bits load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Bits load(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Bits load(const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Bits load(const int16_t* p, int n) { return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static Bits load_upper(const uint16_t* p) { return upper(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Bits load_upper(const uint16_t* p, int n) { return upper(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static Bits load_noise(const uint16_t* p) {
    const __m512i from = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    // Into the lower halves; what is to come behind them is at the top, and is turned there with them.
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    return _mm512_rol_epi32(_mm512_mask_permutexvar_epi16(upper, 0x55555555, from, words), 3);
  }
  static void store_highest(Bits a, Bits b, Bits c, Bits d, uint8_t* p) {
    // To each quarter of 128 bits four bytes of each of them.
    const __m512i at = _mm512_set1_epi32(0x0f0b0703);
    __m512i all = _mm512_shuffle_epi8(a.v, at);
    all = _mm512_mask_shuffle_epi8(all, 0x00f000f000f000f0, b.v, at);
    all = _mm512_mask_shuffle_epi8(all, 0x0f000f000f000f00, c.v, at);
    all = _mm512_mask_shuffle_epi8(all, 0xf000f000f000f000, d.v, at);
    const __m512i turned = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(turned, all));
  }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  void store(uint16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lower()); }
  void store_upper(uint16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper()); }

  friend Bits add(Bits a, Bits b) { return _mm512_add_epi32(a.v, b.v); }
  friend Bits sub(Bits a, Bits b) { return _mm512_sub_epi32(a.v, b.v); }
  friend Bits bit_and(Bits a, Bits b) { return _mm512_and_si512(a.v, b.v); }
  friend Bits bit_or(Bits a, Bits b) { return _mm512_or_si512(a.v, b.v); }
  friend Bits bit_xor(Bits a, Bits b) { return _mm512_xor_si512(a.v, b.v); }
  template <int count>
  Bits left() const {
    return _mm512_slli_epi32(v, count);
  }
  template <int count>
  Bits right() const {
    return _mm512_srli_epi32(v, count);
  }
  template <int count>
  Bits next_words() const {
    return _mm512_alignr_epi8(v, v, 2 * count);
  }
  friend Bits min(Bits a, Bits b) { return _mm512_min_epu32(a.v, b.v); }
  friend Bits max(Bits a, Bits b) { return _mm512_max_epu32(a.v, b.v); }
  friend Bits if_set(Bits mask, Bits yes, Bits no) { return _mm512_ternarylogic_epi32(mask.v, yes.v, no.v, 0xca); }
  friend uint32_t largest(Bits a) { return _mm512_reduce_max_epu32(a.v); }
  friend Bits if_same(Bits a, Bits b, Bits yes, Bits no) {
    return _mm512_mask_mov_epi32(no.v, _mm512_cmpeq_epi32_mask(a.v, b.v), yes.v);
  }
  friend void mul_wide(Bits a, uint32_t constant, Bits* high, Bits* low) {
    const __m512i c = _mm512_set1_epi32(static_cast<int>(constant));
    const __m512i even = _mm512_mul_epu32(a.v, c), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), c);
    *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    *low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  friend void store_in_turn(Bits a, Bits b, Bits c, Bits d, uint32_t* p) {
    const __m512i ab0 = _mm512_unpacklo_epi32(a.v, b.v), ab1 = _mm512_unpackhi_epi32(a.v, b.v);
    const __m512i cd0 = _mm512_unpacklo_epi32(c.v, d.v), cd1 = _mm512_unpackhi_epi32(c.v, d.v);
    // Element 4 * q + k of quarter q of the k-th.
    const __m512i r0 = _mm512_unpacklo_epi64(ab0, cd0), r1 = _mm512_unpackhi_epi64(ab0, cd0);
    const __m512i r2 = _mm512_unpacklo_epi64(ab1, cd1), r3 = _mm512_unpackhi_epi64(ab1, cd1);
    const __m512i lo01 = _mm512_shuffle_i32x4(r0, r1, 0x44), hi01 = _mm512_shuffle_i32x4(r0, r1, 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(r2, r3, 0x44), hi23 = _mm512_shuffle_i32x4(r2, r3, 0xee);
    _mm512_storeu_si512(p, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(p + 16, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
    _mm512_storeu_si512(p + 32, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(p + 48, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
  }
};

struct F32 {
  using Scalar = float;
  using Doubles = F64;
  using Bits = avx512::Bits;
  using Pair = Twice<F32>;
  static constexpr int kWidth = 16;
  static constexpr bool kPrefersFma = true;
  __m512 v;

  F32() = default;
  F32(__m512 x) : v(x) {}
  explicit F32(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static F32 load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }

  static F32 widen(__m256i x, BFloat16) { return _mm512_castsi512_ps(Bits::upper(x).v); }
  static F32 widen(__m256i x, Half) { return _mm512_cvtph_ps(x); }

  // To nearest even, in the upper halves; a NaN is made quiet and keeps its upper bits. (VCVTNEPS2BF16 would flush
  // subnormals.)
  Bits nearest() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits, _mm512_set1_epi32(0x400000));
  }
  __m256i narrow(BFloat16) const { return nearest().upper(); }
  __m256i narrow(Half) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // The two 16-bit storage types.
  template <class S>
  static F32 load(const S* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), S{});
  }
  template <class S>
  static F32 load(const S* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(mask(n), p), S{});
  }
  template <class S>
  void store(S* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(S{}));
  }
  template <class S>
  void store(S* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), narrow(S{}));
  }

  static F32 rounded(F32 x, BFloat16) { return float_of(bit_and(x.nearest(), Bits(0xffff0000u))); }
  static F32 rounded(F32 x, Half) { return widen(x.narrow(Half{}), Half{}); }
  friend Bits bits_of(F32 x) { return _mm512_castps_si512(x.v); }
  static F32 float_of(Bits bits) { return _mm512_castsi512_ps(bits.v); }
  friend F32 min(F32 a, F32 b) { return _mm512_min_ps(a.v, b.v); }
  friend F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
  friend Bits if_ordered(F32 x, Bits yes, Bits no) {
    return _mm512_mask_mov_epi32(no.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), yes.v);
  }

  friend F32 max_unless_zero(F32 x, F32 a, F32 b) {
    return _mm512_mask_max_ps(a.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v, b.v);
  }
  template <bool is_signed>
  static void load_codes(const uint8_t* p, F32* a, F32* b) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    __m512i halves = _mm512_slli_epi16(is_signed ? _mm512_cvtepi8_epi16(codes) : _mm512_cvtepu8_epi16(codes), 6);
    if (is_signed) halves = _mm512_and_si512(halves, _mm512_set1_epi16(static_cast<int16_t>(0x9fc0)));
    *a = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    *b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }

  friend F32 add(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
  friend F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
  friend F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
  friend F32 div(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
  friend F32 sqrt(F32 a) { return _mm512_sqrt_ps(a.v); }
  friend F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  friend F32 neg(F32 a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
  friend F32 maximum(F32 a, F32 b) {
    const __mmask16 unordered = _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q);
    return _mm512_mask_add_ps(_mm512_max_ps(a.v, b.v), unordered, a.v, b.v);
  }
  friend F32 abs(F32 a) { return _mm512_abs_ps(a.v); }
  friend F32 if_equal(F32 a, F32 b, F32 yes, F32 no) {
    return _mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), yes.v);
  }
  friend bool any_above(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) != 0; }
  // As integers: zero less one is the largest of all.
  friend bool any_outside(F32 a, F32 most) {
    const __m512i less_one = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(1));
    return _mm512_cmpge_epu32_mask(less_one, _mm512_castps_si512(most.v)) != 0;
  }
  void to_doubles(F64* out) const {
    out[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    out[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  }
  friend F32 flush_subnormal(F32 a) {
    const __mmask16 small = _mm512_fpclass_ps_mask(a.v, 0x20);
    return _mm512_mask_and_ps(a.v, small, a.v, _mm512_set1_ps(-0.0f));
  }
};

}  // namespace avx512
}  // namespace fusedopt
