// The floating-point modes a kernel runs under, whatever the caller's are: round to nearest even, subnormals kept.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedopt {

class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the processor's default: all exceptions masked
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  uint32_t saved_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
#error "fusedopt: FloatMode is written for x86-64 and aarch64"
#endif
  FloatMode(const FloatMode&) = delete;
};

}  // namespace fusedopt
