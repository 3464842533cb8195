// The portable target: fixed-size arrays and plain loops, which compilers turn into whatever vectors the machine has.
#pragma once

#include <cmath>
#include <limits>

#include "lane.h"

namespace fusedopt {
namespace portable {

template <class T>
struct Lane {
  using Scalar = T;
  static constexpr int kWidth = 8;
  T v[kWidth];

  Lane() = default;
  explicit Lane(T x) {
    for (int k = 0; k < kWidth; ++k) v[k] = x;
  }

  template <class F>
  static Lane each(F f) {
    Lane r;
    for (int k = 0; k < kWidth; ++k) r.v[k] = f(k);
    return r;
  }

  static T widen(T x) { return x; }
  static T widen(BFloat16 x) { return to_float(x); }
  static T widen(Half x) { return to_float(x); }
  static T narrow(T x, T) { return x; }
  static BFloat16 narrow(T x, BFloat16) { return to_bfloat16(x); }
  static Half narrow(T x, Half) { return to_half(x); }

  // Through memcpy: a tensor made from a byte buffer need not be aligned to its element.
  template <class S>
  static T load_one(const S* p) {
    S x;
    std::memcpy(&x, p, sizeof x);
    return widen(x);
  }
  template <class S>
  static void store_one(S* p, T value) {
    const S x = narrow(value, S{});
    std::memcpy(p, &x, sizeof x);
  }

  template <class S>
  static Lane load(const S* p) {
    return each([p](int k) { return load_one(p + k); });
  }
  template <class S>
  static Lane load(const S* p, int n) {
    return each([p, n](int k) { return k < n ? load_one(p + k) : T(0); });
  }
  template <class S>
  void store(S* p) const {
    for (int k = 0; k < kWidth; ++k) store_one(p + k, v[k]);
  }
  template <class S>
  void store(S* p, int n) const {
    for (int k = 0; k < n; ++k) store_one(p + k, v[k]);
  }

  friend Lane add(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] + b.v[k]; });
  }
  friend Lane sub(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] - b.v[k]; });
  }
  friend Lane mul(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] * b.v[k]; });
  }
  friend Lane div(Lane a, Lane b) {
    return each([&](int k) { return a.v[k] / b.v[k]; });
  }
  friend Lane neg(Lane a) {
    return each([&](int k) { return -a.v[k]; });
  }
  friend Lane sqrt(Lane a) {
    return each([&](int k) { return std::sqrt(a.v[k]); });
  }
  friend Lane fma(Lane a, Lane b, Lane c) {
    return each([&](int k) { return std::fma(a.v[k], b.v[k], c.v[k]); });
  }
  friend Lane maximum(Lane a, Lane b) {
    return each([&](int k) {
      const bool unordered = a.v[k] != a.v[k] || b.v[k] != b.v[k];
      return unordered ? a.v[k] + b.v[k] : a.v[k] > b.v[k] ? a.v[k] : b.v[k];
    });
  }
  friend Lane flush_subnormal(Lane a) {
    return each([&](int k) {
      return std::fabs(a.v[k]) < std::numeric_limits<T>::min() ? std::copysign(T(0), a.v[k]) : a.v[k];
    });
  }
};

using F32 = Lane<float>;
using F64 = Lane<double>;

}  // namespace portable
}  // namespace fusedopt
