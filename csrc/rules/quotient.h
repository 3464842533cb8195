// Quotients by a number that many are divided by, without dividing: x / c as fma(x, high, x * low), where high + low is
// 1 / c to some 48 bits. That is the correctly rounded quotient of every x, for most c: which is found out for each
// (Brisebarre, Muller and Raina 2004, "Accelerating correctly rounded floating-point division when the divisor is known
// in advance").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fusedopt {

struct Reciprocal {
  float high, low;
};

// For the x whose quotients are the nearest to the middle between two floats; all others are safe. x = X * 2 ** i and
// c = C * 2 ** k, integers of 24 bits; the middles are odd integers M of 25. high + low is off by 2 ** -48 of 1 / c at
// most, and x * low is rounded by 2 ** -47; so the side of the middle can only be mistaken where
// |X * 2 ** shift - C * M| <= 6, with the shift that makes the quotient one of 25 bits.
inline bool divides_exactly(float c, const Reciprocal& by) {
  constexpr int64_t kReach = 6;
  int exponent;
  const auto C = static_cast<int64_t>(std::ldexp(std::frexp(c, &exponent), 24));
  const int zeros = __builtin_ctzll(C);
  const auto odd = static_cast<uint32_t>(C >> zeros);
  uint32_t inverse = odd;  // modulo 2 ** 32, by Newton: the first three bits are right
  for (int i = 0; i < 4; ++i) inverse *= 2 - odd * inverse;
  for (int shift = 24; shift <= 25; ++shift) {
    const int64_t modulus = int64_t{1} << (shift - zeros);
    for (int64_t apart = -kReach; apart <= kReach; ++apart) {
      // C * M = -apart modulo 2 ** shift, with an odd M.
      if (apart == 0 || __builtin_ctzll(apart) != zeros) continue;
      const uint32_t any = static_cast<uint32_t>(-(apart >> zeros)) * inverse;
      for (int64_t M = any % modulus; M < int64_t{1} << 25; M += modulus) {
        if (M < int64_t{1} << 24) continue;
        const int64_t X = (C * M + apart) >> shift;
        if (X < 1 << 23 || X >= 1 << 24 || (X >= C) != (shift == 24)) continue;
        const auto x = static_cast<float>(X);
        if (std::fma(x, by.high, x * by.low) != x / c) return false;
      }
    }
  }
  return true;
}

// For 0 and all x from 2 ** -75 to 2 ** 64, infinite ones and NaN: as square roots are. False if there is none.
inline bool find_reciprocal(float c, Reciprocal* by) {
  if (!(c >= 0x1p-20f && c <= 0x1p20f)) return false;
  const double exact = 1.0 / c;
  by->high = static_cast<float>(exact);
  // An infinite x makes an infinite quotient, so low must be positive.
  if (by->high > exact) by->high = std::nextafter(by->high, 0.0f);
  by->low = std::max(static_cast<float>(exact - by->high), 0x1p-100f);
  return divides_exactly(c, *by);
}

}  // namespace fusedopt
