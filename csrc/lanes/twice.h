// Two lanes as one of twice the width: what is asked once for each lane (options, forms) is asked half as often, and
// the processor has more to do side by side.
#pragma once

#include "lane.h"

namespace fusedopt {
namespace {

template <class B>
struct TwiceBits {
  static constexpr int kWidth = 2 * B::kWidth;
  B a, b;

  TwiceBits() = default;
  FUSEDOPT_INLINE TwiceBits(B first, B second) : a(first), b(second) {}
  FUSEDOPT_INLINE explicit TwiceBits(uint32_t x) : a(x), b(x) {}

  template <class I>
  static FUSEDOPT_INLINE TwiceBits load(const I* p) {
    return {B::load(p), B::load(p + B::kWidth)};
  }
  static FUSEDOPT_INLINE TwiceBits load_upper(const uint16_t* p) {
    return {B::load_upper(p), B::load_upper(p + B::kWidth)};
  }
  template <class I>
  FUSEDOPT_INLINE void store(I* p) const {
    a.store(p);
    b.store(p + B::kWidth);
  }
  FUSEDOPT_INLINE void store_upper(uint16_t* p) const {
    a.store_upper(p);
    b.store_upper(p + B::kWidth);
  }

  friend FUSEDOPT_INLINE TwiceBits add(TwiceBits x, TwiceBits y) { return {add(x.a, y.a), add(x.b, y.b)}; }
  friend FUSEDOPT_INLINE TwiceBits sub(TwiceBits x, TwiceBits y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
  friend FUSEDOPT_INLINE TwiceBits bit_and(TwiceBits x, TwiceBits y) { return {bit_and(x.a, y.a), bit_and(x.b, y.b)}; }
  friend FUSEDOPT_INLINE TwiceBits bit_or(TwiceBits x, TwiceBits y) { return {bit_or(x.a, y.a), bit_or(x.b, y.b)}; }
  friend FUSEDOPT_INLINE TwiceBits bit_xor(TwiceBits x, TwiceBits y) { return {bit_xor(x.a, y.a), bit_xor(x.b, y.b)}; }
  template <int count>
  FUSEDOPT_INLINE TwiceBits left() const {
    return {a.template left<count>(), b.template left<count>()};
  }
  template <int count>
  FUSEDOPT_INLINE TwiceBits right() const {
    return {a.template right<count>(), b.template right<count>()};
  }
  friend FUSEDOPT_INLINE TwiceBits min(TwiceBits x, TwiceBits y) { return {min(x.a, y.a), min(x.b, y.b)}; }
  friend FUSEDOPT_INLINE TwiceBits max(TwiceBits x, TwiceBits y) { return {max(x.a, y.a), max(x.b, y.b)}; }
  friend FUSEDOPT_INLINE uint32_t largest(TwiceBits x) { return largest(max(x.a, x.b)); }
  friend FUSEDOPT_INLINE TwiceBits if_same(TwiceBits x, TwiceBits y, TwiceBits yes, TwiceBits no) {
    return {if_same(x.a, y.a, yes.a, no.a), if_same(x.b, y.b, yes.b, no.b)};
  }
};

template <class L>
struct Twice {
  using Scalar = typename L::Scalar;
  using Bits = TwiceBits<typename L::Bits>;
  static constexpr int kWidth = 2 * L::kWidth;
  static constexpr bool kPrefersFma = L::kPrefersFma;
  L a, b;

  Twice() = default;
  FUSEDOPT_INLINE Twice(L first, L second) : a(first), b(second) {}
  FUSEDOPT_INLINE explicit Twice(Scalar x) : a(x), b(x) {}

  template <class S>
  static FUSEDOPT_INLINE Twice load(const S* p) {
    return {L::load(p), L::load(p + L::kWidth)};
  }
  template <bool is_signed>
  static FUSEDOPT_INLINE Twice load_codes(const uint8_t* p) {
    Twice x;
    L::template load_codes<is_signed>(p, &x.a, &x.b);
    return x;
  }
  template <class S>
  FUSEDOPT_INLINE void store(S* p) const {
    a.store(p);
    b.store(p + L::kWidth);
  }
  template <class S>
  static FUSEDOPT_INLINE Twice rounded(Twice x, S s) {
    return {L::rounded(x.a, s), L::rounded(x.b, s)};
  }
  friend FUSEDOPT_INLINE Bits bits_of(Twice x) { return {bits_of(x.a), bits_of(x.b)}; }
  static FUSEDOPT_INLINE Twice float_of(Bits x) { return {L::float_of(x.a), L::float_of(x.b)}; }
  friend FUSEDOPT_INLINE Bits if_ordered(Twice x, Bits yes, Bits no) {
    return {if_ordered(x.a, yes.a, no.a), if_ordered(x.b, yes.b, no.b)};
  }

  friend FUSEDOPT_INLINE Twice add(Twice x, Twice y) { return {add(x.a, y.a), add(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice sub(Twice x, Twice y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice mul(Twice x, Twice y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice div(Twice x, Twice y) { return {div(x.a, y.a), div(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice sqrt(Twice x) { return {sqrt(x.a), sqrt(x.b)}; }
  friend FUSEDOPT_INLINE Twice fma(Twice x, Twice y, Twice z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
  friend FUSEDOPT_INLINE Twice neg(Twice x) { return {neg(x.a), neg(x.b)}; }
  friend FUSEDOPT_INLINE Twice min(Twice x, Twice y) { return {min(x.a, y.a), min(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice max(Twice x, Twice y) { return {max(x.a, y.a), max(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice maximum(Twice x, Twice y) { return {maximum(x.a, y.a), maximum(x.b, y.b)}; }
  friend FUSEDOPT_INLINE Twice abs(Twice x) { return {abs(x.a), abs(x.b)}; }
  friend FUSEDOPT_INLINE Twice if_equal(Twice x, Twice y, Twice yes, Twice no) {
    return {if_equal(x.a, y.a, yes.a, no.a), if_equal(x.b, y.b, yes.b, no.b)};
  }
  friend FUSEDOPT_INLINE Twice flush_subnormal(Twice x) { return {flush_subnormal(x.a), flush_subnormal(x.b)}; }
};

}  // namespace
}  // namespace fusedopt
