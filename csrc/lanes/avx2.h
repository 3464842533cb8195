// AVX2 with FMA and F16C: 8 floats or 4 doubles.
#pragma once

#include <immintrin.h>

#include "twice.h"

namespace fusedopt {
namespace avx2 {

struct F64 {
  using Scalar = double;
  using Doubles = F64;
  static constexpr int kWidth = 4;
  static constexpr bool kPrefersFma = true;
  __m256d v;

  F64() = default;
  F64(__m256d x) : v(x) {}
  explicit F64(double x) : v(_mm256_set1_pd(x)) {}

  static __m256i mask(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

  static F64 load(const double* p) { return _mm256_loadu_pd(p); }
  static F64 load(const double* p, int n) { return _mm256_maskload_pd(p, mask(n)); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm256_maskstore_pd(p, mask(n), v); }

  friend F64 add(F64 a, F64 b) { return _mm256_add_pd(a.v, b.v); }
  friend F64 sub(F64 a, F64 b) { return _mm256_sub_pd(a.v, b.v); }
  friend F64 mul(F64 a, F64 b) { return _mm256_mul_pd(a.v, b.v); }
  friend F64 div(F64 a, F64 b) { return _mm256_div_pd(a.v, b.v); }
  friend F64 sqrt(F64 a) { return _mm256_sqrt_pd(a.v); }
  friend F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
  friend F64 neg(F64 a) { return _mm256_xor_pd(a.v, _mm256_set1_pd(-0.0)); }
  friend F64 maximum(F64 a, F64 b) {
    return _mm256_blendv_pd(_mm256_max_pd(a.v, b.v), _mm256_add_pd(a.v, b.v), _mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q));
  }
  friend F64 abs(F64 a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v); }
  friend F64 if_equal(F64 a, F64 b, F64 yes, F64 no) {
    return _mm256_blendv_pd(no.v, yes.v, _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ));
  }
  friend bool any_above(F64 a, F64 b) { return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ)) != 0; }
  friend bool any_outside(F64 a, F64 most) {
    const __m256d above = _mm256_cmp_pd(a.v, most.v, _CMP_NLE_UQ);
    return _mm256_movemask_pd(_mm256_or_pd(above, _mm256_cmp_pd(a.v, _mm256_setzero_pd(), _CMP_EQ_OQ))) != 0;
  }
  void to_doubles(F64* out) const { *out = *this; }
  friend F64 flush_subnormal(F64 a) {
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d small = _mm256_cmp_pd(_mm256_andnot_pd(sign, a.v), _mm256_set1_pd(0x1p-1022), _CMP_LT_OQ);
    return _mm256_blendv_pd(a.v, _mm256_and_pd(a.v, sign), small);
  }
};

struct Bits {
  static constexpr int kWidth = 8;
  __m256i v;

  Bits() = default;
  Bits(__m256i x) : v(x) {}
  explicit Bits(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
  static Bits count_from(uint32_t first) { return add(Bits(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

  static Bits load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bits load(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Bits load(const int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Bits load_upper(const uint16_t* p) { return load(p).left<16>(); }
  static Bits load_upper(const uint16_t* p, int n) { return load(p, n).left<16>(); }
  template <class I>
  static Bits load(const I* p, int n) {
    I block[kWidth] = {};
    std::memcpy(block, p, n * sizeof(I));
    return load(block);
  }
  static Bits load_noise(const uint16_t* p) { return bit_or(load(p).left<3>(), Bits(4)); }
  static void store_highest(Bits a, Bits b, Bits c, Bits d, uint8_t* p) {
    const __m256i ab = _mm256_packus_epi32(a.right<24>().v, b.right<24>().v);
    const __m256i cd = _mm256_packus_epi32(c.right<24>().v, d.right<24>().v);
    // Of each half of 128 bits four bytes of each of them.
    const __m256i all = _mm256_packus_epi16(ab, cd), turned = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(all, turned));
  }
  void store(uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  void store(uint16_t* p) const { left<16>().store_upper(p); }
  void store_upper(uint16_t* p) const {
    const __m256i words = _mm256_srli_epi32(v, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

  friend Bits add(Bits a, Bits b) { return _mm256_add_epi32(a.v, b.v); }
  friend Bits sub(Bits a, Bits b) { return _mm256_sub_epi32(a.v, b.v); }
  friend Bits bit_and(Bits a, Bits b) { return _mm256_and_si256(a.v, b.v); }
  friend Bits bit_or(Bits a, Bits b) { return _mm256_or_si256(a.v, b.v); }
  friend Bits bit_xor(Bits a, Bits b) { return _mm256_xor_si256(a.v, b.v); }
  template <int count>
  Bits left() const {
    return _mm256_slli_epi32(v, count);
  }
  template <int count>
  Bits right() const {
    return _mm256_srli_epi32(v, count);
  }
  template <int count>
  Bits next_words() const {
    return _mm256_alignr_epi8(v, v, 2 * count);
  }
  friend Bits min(Bits a, Bits b) { return _mm256_min_epu32(a.v, b.v); }
  friend Bits max(Bits a, Bits b) { return _mm256_max_epu32(a.v, b.v); }
  friend uint32_t largest(Bits a) {
    uint32_t each[kWidth], most = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), a.v);
    for (int k = 0; k < kWidth; ++k) most = each[k] > most ? each[k] : most;
    return most;
  }
  friend Bits if_same(Bits a, Bits b, Bits yes, Bits no) {
    return _mm256_blendv_epi8(no.v, yes.v, _mm256_cmpeq_epi32(a.v, b.v));
  }
  friend Bits if_set(Bits a, Bits yes, Bits no) {
    return _mm256_or_si256(_mm256_and_si256(a.v, yes.v), _mm256_andnot_si256(a.v, no.v));
  }
  friend void mul_wide(Bits a, uint32_t constant, Bits* high, Bits* low) {
    const __m256i c = _mm256_set1_epi32(static_cast<int>(constant));
    const __m256i even = _mm256_mul_epu32(a.v, c), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), c);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  friend void store_in_turn(Bits a, Bits b, Bits c, Bits d, uint32_t* p) {
    const __m256i ab0 = _mm256_unpacklo_epi32(a.v, b.v), ab1 = _mm256_unpackhi_epi32(a.v, b.v);
    const __m256i cd0 = _mm256_unpacklo_epi32(c.v, d.v), cd1 = _mm256_unpackhi_epi32(c.v, d.v);
    // Of elements 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    const __m256i r0 = _mm256_unpacklo_epi64(ab0, cd0), r1 = _mm256_unpackhi_epi64(ab0, cd0);
    const __m256i r2 = _mm256_unpacklo_epi64(ab1, cd1), r3 = _mm256_unpackhi_epi64(ab1, cd1);
    auto* out = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(r0, r1, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(r2, r3, 0x20));
    _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(r0, r1, 0x31));
    _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(r2, r3, 0x31));
  }
};

struct F32 {
  using Scalar = float;
  using Doubles = F64;
  using Bits = avx2::Bits;
  using Pair = Twice<F32>;
  static constexpr int kWidth = 8;
  static constexpr bool kPrefersFma = true;
  __m256 v;

  F32() = default;
  F32(__m256 x) : v(x) {}
  explicit F32(float x) : v(_mm256_set1_ps(x)) {}

  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  static F32 load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }

  static F32 widen(__m128i x, BFloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static F32 widen(__m128i x, Half) { return _mm256_cvtph_ps(x); }

  template <bool is_signed>
  static void load_codes(const uint8_t* p, F32* a, F32* b) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    __m256i halves = _mm256_slli_epi16(is_signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes), 6);
    if (is_signed) halves = _mm256_and_si256(halves, _mm256_set1_epi16(static_cast<int16_t>(0x9fc0)));
    *a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    *b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }

  // Round to nearest even; a NaN is made quiet and keeps its upper bits.
  __m128i narrow(BFloat16) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  __m128i narrow(Half) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // The two 16-bit storage types. AVX2 has no 16-bit mask: a tail goes through a padded block.
  template <class S>
  static F32 load(const S* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), S{});
  }
  template <class S>
  static F32 load(const S* p, int n) {
    S block[kWidth] = {};
    std::memcpy(block, p, n * sizeof(S));
    return load(block);
  }
  template <class S>
  void store(S* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(S{}));
  }
  template <class S>
  void store(S* p, int n) const {
    S block[kWidth];
    store(block);
    std::memcpy(p, block, n * sizeof(S));
  }

  template <class S>
  static F32 rounded(F32 x, S) {
    return widen(x.narrow(S{}), S{});
  }
  friend Bits bits_of(F32 x) { return _mm256_castps_si256(x.v); }
  static F32 float_of(Bits bits) { return _mm256_castsi256_ps(bits.v); }
  friend F32 min(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
  friend F32 max(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
  friend F32 max_unless_zero(F32 x, F32 a, F32 b) {
    const __m256 is_zero = _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return _mm256_max_ps(a.v, _mm256_andnot_ps(is_zero, b.v));  // a is positive
  }
  friend Bits if_ordered(F32 x, Bits yes, Bits no) {
    return _mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q)));
  }

  friend F32 add(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
  friend F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a.v, b.v); }
  friend F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
  friend F32 div(F32 a, F32 b) { return _mm256_div_ps(a.v, b.v); }
  friend F32 sqrt(F32 a) { return _mm256_sqrt_ps(a.v); }
  friend F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend F32 neg(F32 a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
  friend F32 maximum(F32 a, F32 b) {
    return _mm256_blendv_ps(_mm256_max_ps(a.v, b.v), _mm256_add_ps(a.v, b.v), _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q));
  }
  friend F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
  friend F32 if_equal(F32 a, F32 b, F32 yes, F32 no) {
    return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
  }
  friend bool any_above(F32 a, F32 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)) != 0; }
  friend bool any_outside(F32 a, F32 most) {
    const __m256 above = _mm256_cmp_ps(a.v, most.v, _CMP_NLE_UQ);
    return _mm256_movemask_ps(_mm256_or_ps(above, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_EQ_OQ))) != 0;
  }
  void to_doubles(F64* out) const {
    out[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    out[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  }
  friend F32 flush_subnormal(F32 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 small = _mm256_cmp_ps(_mm256_andnot_ps(sign, a.v), _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm256_blendv_ps(a.v, _mm256_and_ps(a.v, sign), small);
  }
};

}  // namespace avx2
}  // namespace fusedopt
