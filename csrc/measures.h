// What is added up over elements, and what is decided by it. In double, and in an order that depends on nothing but the
// tensors: not on threads, blocks or instruction sets.
//
// Element i of a part goes to lane i % 32, one after the other; the lanes are then added up by halves: 16, 8, ... 1
// apart. Part i of all rows of a dtype goes to column i % 256, and the columns are added up by halves. Dtypes come in
// the order of DType.
#pragma once

#include <cstdint>

#include "lanes/scalar.h"

namespace fusedopt {

constexpr int64_t kPart = 4096;  // elements of a row, in the order of its layout, that are added up first
constexpr int kPartLanes = 32;
constexpr int kColumns = 256;

// Of the gradients, as unscaled and not clipped.
struct NormPart {
  double sum;      // of their squares
  double largest;  // magnitude; NaN if one is. Zero if nobody asked
};

struct NormOptions {
  bool unscale;
  double inv_scale;
  bool largest;  // is wanted
};

// Of one parameter's step. Sums of squares of the gradient (as NormPart), the parameter as updated, its change; the
// largest |change| / |parameter| where the parameter was finite and not zero; how many gradients were inf or nan; how
// many changes that were not zero left the parameter what it was.
struct StatsPart {
  double grad, param, change, ratio;
  int64_t nonfinite, lost;
};

// What the host asks to be decided when all gradients have been read.
struct Question {
  bool infinity_norm;  // the largest magnitude, not the root of the sum of squares
  bool largest;        // is known
  bool is_double;      // a gradient is: else the norm is rounded to float, as torch's is
  bool clip, skip;
  double max_norm;
};

// The answer, as a tensor of doubles.
constexpr int kStatsSize = 6;  // a parameter's, as a row of a tensor of doubles

enum Answer { kNorm, kClip, kSkip, kSkippedSteps, kSum, kLargest, kAveragedSteps, kAnswerSize = 8 };

namespace {

FUSEDOPT_HD inline NormPart combine(NormPart a, NormPart b) {
  const bool unordered = a.largest != a.largest || b.largest != b.largest;
  return {portable::add_one(a.sum, b.sum), unordered               ? a.largest + b.largest
                                           : a.largest > b.largest ? a.largest
                                                                   : b.largest};
}

// Adds up the columns that one thread of kColumns has.
FUSEDOPT_HD inline NormPart column(const NormPart* parts, int64_t num_parts, int first) {
  NormPart total = {0, 0};
  for (int64_t i = first; i < num_parts; i += kColumns) total = combine(total, parts[i]);
  return total;
}

FUSEDOPT_HD inline StatsPart combine(const StatsPart& a, const StatsPart& b) {
  const double ratio = combine(NormPart{0, a.ratio}, NormPart{0, b.ratio}).largest;
  return {portable::add_one(a.grad, b.grad),
          portable::add_one(a.param, b.param),
          portable::add_one(a.change, b.change),
          ratio,
          a.nonfinite + b.nonfinite,
          a.lost + b.lost};
}

// Rounded to float. (g++ 12 at -O3 vectorizes `is_double ? x : double(float(x))` wrongly: the rounding is gone.)
FUSEDOPT_HD inline double rounded(double x) {
  float narrow = static_cast<float>(x);
#ifndef __CUDA_ARCH__
  asm("" : "+m"(narrow));
#endif
  return narrow;
}

// As a tensor's row: norms in the parameter's opmath.
FUSEDOPT_HD inline void write_stats(const StatsPart& stats, bool is_double, double* out) {
  const double sums[] = {stats.grad, stats.param, stats.change};
  for (int k = 0; k < 3; ++k) {
    const double norm = portable::sqrt_one(sums[k]);
    out[k] = is_double ? norm : rounded(norm);
  }
  out[3] = stats.ratio;
  out[4] = static_cast<double>(stats.nonfinite);
  out[5] = static_cast<double>(stats.lost);
}

// All of them, on the host.
inline NormPart total(const NormPart* parts, int64_t num_parts) {
  NormPart columns[kColumns] = {};
  for (int64_t i = 0; i < num_parts; ++i) columns[i % kColumns] = combine(columns[i % kColumns], parts[i]);
  for (int apart = kColumns / 2; apart > 0; apart /= 2) {
    for (int c = 0; c < apart; ++c) columns[c] = combine(columns[c], columns[c + apart]);
  }
  return columns[0];
}

// torch.nn.utils.clip_grad_norm_'s coefficient, in its order and in the norm's type.
template <class T>
FUSEDOPT_HD inline T clip_coefficient(T norm, double max_norm) {
  using namespace portable;
  const T coefficient = mul_one(div_one(T(1), add_one(norm, static_cast<T>(1e-6))), static_cast<T>(max_norm));
  return coefficient > T(1) ? T(1) : coefficient;
}

// `answer` holds the totals. found_inf: another has seen one. `report` may be null.
FUSEDOPT_HD inline void decide(const Question& question, bool found_inf, double* answer, float* report) {
  const double exact = question.infinity_norm ? answer[kLargest] : portable::sqrt_one(answer[kSum]);
  const double telling = question.largest ? answer[kLargest] : answer[kSum];
  const bool is_finite = telling - telling == 0;
  answer[kNorm] = question.is_double ? exact : rounded(exact);
  answer[kClip] = !question.clip       ? 1.0
                  : question.is_double ? clip_coefficient(exact, question.max_norm)
                                       : clip_coefficient(static_cast<float>(exact), question.max_norm);
  answer[kSkip] = found_inf || (question.skip && !is_finite);
  answer[kSkippedSteps] += answer[kSkip];
  if (report) *report = is_finite ? 0.0f : 1.0f;
}

}  // namespace
}  // namespace fusedopt
