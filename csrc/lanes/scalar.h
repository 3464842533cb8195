// The portable target and CUDA's: arrays of a fixed size and plain loops, which compilers turn into whatever vectors
// the machine has, or unroll.
#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>

#include "lane.h"

namespace fusedopt {
namespace portable {

// One IEEE operation each: the compiler's own on a processor (built with -ffp-contract=off), named ones on a GPU.
#ifdef __CUDA_ARCH__
#define FUSEDOPT_OP(name, host, f32, f64)                               \
  FUSEDOPT_HD inline float name(float a, float b) { return f32(a, b); } \
  FUSEDOPT_HD inline double name(double a, double b) { return f64(a, b); }
#else
#define FUSEDOPT_OP(name, host, f32, f64)                              \
  FUSEDOPT_HD inline float name(float a, float b) { return a host b; } \
  FUSEDOPT_HD inline double name(double a, double b) { return a host b; }
#endif
FUSEDOPT_OP(add_one, +, __fadd_rn, __dadd_rn)
FUSEDOPT_OP(sub_one, -, __fsub_rn, __dsub_rn)
FUSEDOPT_OP(mul_one, *, __fmul_rn, __dmul_rn)
FUSEDOPT_OP(div_one, /, __fdiv_rn, __ddiv_rn)
#undef FUSEDOPT_OP

#ifdef __CUDA_ARCH__
FUSEDOPT_HD inline float sqrt_one(float a) { return __fsqrt_rn(a); }
FUSEDOPT_HD inline double sqrt_one(double a) { return __dsqrt_rn(a); }
FUSEDOPT_HD inline float fma_one(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FUSEDOPT_HD inline double fma_one(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
template <class T>
inline T sqrt_one(T a) {
  return std::sqrt(a);
}
template <class T>
inline T fma_one(T a, T b, T c) {
  return std::fma(a, b, c);
}
#endif

template <int N>
struct Bits {
  static constexpr int kWidth = N;
  uint32_t v[N];

  Bits() = default;
  FUSEDOPT_HD explicit Bits(uint32_t x) {
    for (int k = 0; k < N; ++k) v[k] = x;
  }
  template <class F>
  FUSEDOPT_HD static Bits each(F f) {
    Bits r;
    for (int k = 0; k < N; ++k) r.v[k] = f(k);
    return r;
  }
  FUSEDOPT_HD static Bits count_from(uint32_t first) {
    return each([first](int k) { return first + static_cast<uint32_t>(k); });
  }

  // Through memcpy, as below, and because draws are written as words and read as halves.
  template <class I>
  FUSEDOPT_HD static uint32_t load_one(const I* p) {
    I x;
    std::memcpy(&x, p, sizeof x);
    return static_cast<uint32_t>(x);
  }
  template <class I>
  FUSEDOPT_HD static Bits load(const I* p) {
    return each([p](int k) { return load_one(p + k); });
  }
  template <class I>
  FUSEDOPT_HD static Bits load(const I* p, int n) {
    return each([p, n](int k) { return k < n ? load_one(p + k) : 0u; });
  }
  FUSEDOPT_HD static Bits load_upper(const uint16_t* p) { return load(p).template left<16>(); }
  FUSEDOPT_HD static Bits load_upper(const uint16_t* p, int n) { return load(p, n).template left<16>(); }
  template <class I>
  FUSEDOPT_HD void store(I* p) const {
    for (int k = 0; k < N; ++k) {
      const I x = static_cast<I>(v[k]);
      std::memcpy(p + k, &x, sizeof x);
    }
  }
  FUSEDOPT_HD void store_upper(uint16_t* p) const { right<16>().store(p); }

  FUSEDOPT_HD static Bits noise(Bits words) { return bit_or(words.template left<3>(), Bits(4)); }
  FUSEDOPT_HD static Bits load_noise(const uint16_t* p) { return noise(load(p)); }
  FUSEDOPT_HD static void store_highest(Bits a, Bits b, Bits c, Bits d, uint8_t* p) {
    for (const Bits& x : {a, b, c, d}) {
      x.template right<24>().store(p);
      p += N;
    }
  }

  FUSEDOPT_HD friend Bits add(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] + b.v[k]; });
  }
  FUSEDOPT_HD friend Bits sub(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] - b.v[k]; });
  }
  FUSEDOPT_HD friend Bits bit_and(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] & b.v[k]; });
  }
  FUSEDOPT_HD friend Bits bit_or(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] | b.v[k]; });
  }
  FUSEDOPT_HD friend Bits bit_xor(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] ^ b.v[k]; });
  }
  template <int count>
  FUSEDOPT_HD Bits left() const {
    return each([&](int k) { return v[k] << count; });
  }
  template <int count>
  FUSEDOPT_HD Bits right() const {
    return each([&](int k) { return v[k] >> count; });
  }
  template <int count>
  FUSEDOPT_HD Bits next_words() const {
    return each([&](int k) {
      const uint32_t low = v[k - k % 4 + (k + count / 2) % 4], high = v[k - k % 4 + (k + count / 2 + 1) % 4];
      return count % 2 == 0 ? low : low >> 16 | high << 16;
    });
  }
  FUSEDOPT_HD friend Bits min(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] < b.v[k] ? a.v[k] : b.v[k]; });
  }
  FUSEDOPT_HD friend Bits max(Bits a, Bits b) {
    return each([&](int k) { return a.v[k] > b.v[k] ? a.v[k] : b.v[k]; });
  }
  FUSEDOPT_HD friend uint32_t largest(Bits a) {
    uint32_t most = 0;
    for (int k = 0; k < N; ++k) most = a.v[k] > most ? a.v[k] : most;
    return most;
  }
  FUSEDOPT_HD friend Bits if_same(Bits a, Bits b, Bits yes, Bits no) {
    return each([&](int k) { return a.v[k] == b.v[k] ? yes.v[k] : no.v[k]; });
  }
  FUSEDOPT_HD friend Bits if_set(Bits a, Bits yes, Bits no) {
    return each([&](int k) { return (a.v[k] & yes.v[k]) | (~a.v[k] & no.v[k]); });
  }
  FUSEDOPT_HD friend void mul_wide(Bits a, uint32_t constant, Bits* high, Bits* low) {
    for (int k = 0; k < N; ++k) {
      const uint64_t product = uint64_t{a.v[k]} * constant;
      high->v[k] = static_cast<uint32_t>(product >> 32);
      low->v[k] = static_cast<uint32_t>(product);
    }
  }
  FUSEDOPT_HD friend void store_in_turn(Bits a, Bits b, Bits c, Bits d, uint32_t* p) {
    for (int k = 0; k < N; ++k) {
      p[4 * k] = a.v[k];
      p[4 * k + 1] = b.v[k];
      p[4 * k + 2] = c.v[k];
      p[4 * k + 3] = d.v[k];
    }
  }
};

template <class T, int N = 8>
struct Lane {
  using Bits = portable::Bits<N>;
  using Scalar = T;
  using Doubles = Lane<double, N>;
  using Pair = Lane;  // compilers do no better with more
  static constexpr int kWidth = N;
#if defined(__FP_FAST_FMAF) && !defined(__CUDACC__)
  static constexpr bool kPrefersFma = true;
#else  // without an instruction it is slow, and a GPU waits for its memory
  static constexpr bool kPrefersFma = false;
#endif
  static constexpr T kSmallest = std::numeric_limits<T>::min();  // the smallest normal number
  T v[kWidth];

  Lane() = default;
  FUSEDOPT_HD explicit Lane(T x) {
    for (int k = 0; k < kWidth; ++k) v[k] = x;
  }

  template <class F>
  FUSEDOPT_HD static Lane each(F f) {
    Lane r;
    for (int k = 0; k < kWidth; ++k) r.v[k] = f(k);
    return r;
  }

  FUSEDOPT_HD static T widen(T x) { return x; }
  FUSEDOPT_HD static T widen(BFloat16 x) { return to_float(x); }
  FUSEDOPT_HD static T widen(Half x) { return to_float(x); }
  FUSEDOPT_HD static T narrow(T x, T) { return x; }
  FUSEDOPT_HD static BFloat16 narrow(T x, BFloat16) { return to_bfloat16(x); }
  FUSEDOPT_HD static Half narrow(T x, Half) { return to_half(x); }

  // Through memcpy: a tensor made from a byte buffer need not be aligned to its element.
  template <class S>
  FUSEDOPT_HD static T load_one(const S* p) {
    S x;
    std::memcpy(&x, p, sizeof x);
    return widen(x);
  }
  template <class S>
  FUSEDOPT_HD static void store_one(S* p, T value) {
    const S x = narrow(value, S{});
    std::memcpy(p, &x, sizeof x);
  }

  template <class S>
  FUSEDOPT_HD static Lane rounded(Lane x, S) {
    return each([&](int k) { return widen(narrow(x.v[k], S{})); });
  }
  FUSEDOPT_HD friend Bits bits_of(Lane x) {
    return Bits::each([&](int k) { return float_to_bits(x.v[k]); });
  }
  FUSEDOPT_HD static Lane float_of(Bits bits) {
    return each([&](int k) { return bits_to_float(bits.v[k]); });
  }
  FUSEDOPT_HD friend Lane min(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] < b.v[k] ? a.v[k] : b.v[k]; });
  }
  FUSEDOPT_HD friend Lane max(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] > b.v[k] ? a.v[k] : b.v[k]; });
  }
  FUSEDOPT_HD friend Lane max_unless_zero(Lane x, Lane a, Lane b) {
    return each([&](int k) { return x.v[k] == 0 || a.v[k] > b.v[k] ? a.v[k] : b.v[k]; });
  }
  FUSEDOPT_HD friend Bits if_ordered(Lane x, Bits yes, Bits no) {
    return Bits::each([&](int k) { return x.v[k] == x.v[k] ? yes.v[k] : no.v[k]; });
  }

  template <class S>
  FUSEDOPT_HD static Lane load(const S* p) {
    return each([p](int k) { return load_one(p + k); });
  }
  template <bool is_signed>
  FUSEDOPT_HD static Lane of_codes(Bits codes) {
    return each([&](int k) {
      const uint32_t field = is_signed ? codes.v[k] & 0x7f : codes.v[k];
      // A subnormal one is less than what its bits would be as a normal one's: what lies above the smallest, twice.
      const float normal = bits_to_float((field << 19) + (112u << 23)), other = sub_one(normal + normal, 0x1p-14f);
      const float value = normal < other ? normal : other;
      return bits_to_float(float_to_bits(value) | (is_signed ? codes.v[k] << 24 & 0x80000000u : 0u));
    });
  }
  template <bool is_signed>
  FUSEDOPT_HD static Lane load_codes(const uint8_t* p) {
    return of_codes<is_signed>(Bits::load(p));
  }
  template <class S>
  FUSEDOPT_HD static Lane load(const S* p, int n) {
    return each([p, n](int k) { return k < n ? load_one(p + k) : T(0); });
  }
  template <class S>
  FUSEDOPT_HD void store(S* p) const {
    for (int k = 0; k < kWidth; ++k) store_one(p + k, v[k]);
  }
  template <class S>
  FUSEDOPT_HD void store(S* p, int n) const {
    for (int k = 0; k < n; ++k) store_one(p + k, v[k]);
  }

  FUSEDOPT_HD friend Lane add(Lane a, Lane b) {
    return each([&](int k) { return add_one(a.v[k], b.v[k]); });
  }
  FUSEDOPT_HD friend Lane sub(Lane a, Lane b) {
    return each([&](int k) { return sub_one(a.v[k], b.v[k]); });
  }
  FUSEDOPT_HD friend Lane mul(Lane a, Lane b) {
    return each([&](int k) { return mul_one(a.v[k], b.v[k]); });
  }
  FUSEDOPT_HD friend Lane div(Lane a, Lane b) {
    return each([&](int k) { return div_one(a.v[k], b.v[k]); });
  }
  FUSEDOPT_HD friend Lane neg(Lane a) {
    return each([&](int k) { return -a.v[k]; });
  }
  FUSEDOPT_HD friend Lane sqrt(Lane a) {
    return each([&](int k) { return sqrt_one(a.v[k]); });
  }
  FUSEDOPT_HD friend Lane fma(Lane a, Lane b, Lane c) {
    return each([&](int k) { return fma_one(a.v[k], b.v[k], c.v[k]); });
  }
  FUSEDOPT_HD friend Lane maximum(Lane a, Lane b) {
    return each([&](int k) {
      const bool unordered = a.v[k] != a.v[k] || b.v[k] != b.v[k];
      return unordered ? a.v[k] + b.v[k] : a.v[k] > b.v[k] ? a.v[k] : b.v[k];
    });
  }
  FUSEDOPT_HD friend Lane abs(Lane a) {
    return each([&](int k) { return std::fabs(a.v[k]); });
  }
  FUSEDOPT_HD friend Lane if_equal(Lane a, Lane b, Lane yes, Lane no) {
    return each([&](int k) { return a.v[k] == b.v[k] ? yes.v[k] : no.v[k]; });
  }
  friend bool any_above(Lane a, Lane b) {
    bool any = false;
    for (int k = 0; k < kWidth; ++k) any |= !(a.v[k] <= b.v[k]);
    return any;
  }
  friend bool any_outside(Lane a, Lane most) {
    bool any = false;
    for (int k = 0; k < kWidth; ++k) any |= !(a.v[k] > 0 && a.v[k] <= most.v[k]);
    return any;
  }
  FUSEDOPT_HD void to_doubles(Doubles* out) const {
    for (int k = 0; k < kWidth; ++k) out->v[k] = static_cast<double>(v[k]);
  }
  FUSEDOPT_HD friend Lane flush_subnormal(Lane a) {
    return each([&](int k) { return std::fabs(a.v[k]) < kSmallest ? std::copysign(T(0), a.v[k]) : a.v[k]; });
  }
};

using F32 = Lane<float>;
using F64 = Lane<double>;

}  // namespace portable
}  // namespace fusedopt
