// What one instruction set adds up over elements: included by step.h.
#pragma once

#include <limits>

#include "../measures.h"
#include "gather.h"

namespace fusedopt {
namespace {

// kLanes sums of doubles.
template <class Lane, int kLanes = kPartLanes>
struct PartSum {
  using Doubles = typename Lane::Doubles;
  static constexpr int kEach = Lane::kWidth / Doubles::kWidth, kCount = kLanes / Doubles::kWidth;
  Doubles sum[kCount];

  PartSum() {
    for (int k = 0; k < kCount; ++k) sum[k] = Doubles(0.0);
  }
  // Lane `at` of those that follow one another through a stretch of kLanes.
  void add_square(int at, Lane values) {
    Doubles doubles[kEach];
    values.to_doubles(doubles);
    for (int k = 0; k < kEach; ++k) sum[at * kEach + k] = fma(doubles[k], doubles[k], sum[at * kEach + k]);
  }
  void add_sum(int at, Lane values) {
    Doubles doubles[kEach];
    values.to_doubles(doubles);
    for (int k = 0; k < kEach; ++k) sum[at * kEach + k] = add(doubles[k], sum[at * kEach + k]);
  }
  __attribute__((noinline)) double total() const {
    double lanes[kLanes];
    for (int k = 0; k < kCount; ++k) sum[k].store(lanes + k * Doubles::kWidth);
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      for (int k = 0; k < apart; ++k) lanes[k] += lanes[k + apart];
    }
    return lanes[0];
  }
};

// Calls f(i, at, count...) for the lanes of [0, end): `at` counts from 0 through each stretch of kLanes elements,
// `count` is empty or the elements left.
template <class Lane, int kLanes = kPartLanes, class F>
__attribute__((always_inline)) inline void each_lane(int64_t end, F f) {
  int64_t i = 0;
  for (; i + kLanes <= end; i += kLanes) {
    for (int at = 0; at < kLanes / Lane::kWidth; ++at) f(i + at * Lane::kWidth, at);
  }
  for (int at = 0; i < end; ++at, i += Lane::kWidth) {
    if (i + Lane::kWidth <= end) {
      f(i, at);
    } else {
      f(i, at, static_cast<int>(end - i));
    }
  }
}

// The first n elements of a lane, and zeros.
template <class Lane>
Lane head(Lane lane, int n) {
  typename Lane::Scalar values[Lane::kWidth];
  lane.store(values);
  return Lane::load(static_cast<const typename Lane::Scalar*>(values), n);
}

template <class Lane>
typename Lane::Scalar largest_of(Lane lane) {
  typename Lane::Scalar values[Lane::kWidth];
  lane.store(values);
  NormPart all = {0, 0};
  for (int k = 0; k < Lane::kWidth; ++k) all = combine(all, {0, values[k]});
  return static_cast<typename Lane::Scalar>(all.largest);
}

// The norm of gradients in storage type S.
template <class Lane, class S>
struct Norm {
  using T = typename Lane::Scalar;
  using Scalars = Common::Scalars<T>;

  // `last`: where the gradient ends.
  template <class G>
  static NormPart add_up(const Scalars& scalars, const G* grad, int64_t count, int64_t last, bool wants_largest) {
    const Scalars s = scalars;
    PartSum<Lane> sum;
    Lane largest(T(0));
    each_lane<Lane>(count, [&](int64_t i, int at, auto... n) {
      __builtin_prefetch(grad + to_fetch(i, last));
      const Lane x = Common::value(s, Lane::load(grad + i, n...));
      if (wants_largest) largest = maximum(largest, abs(x));
      sum.add_square(at, x);
    });
    return {sum.total(), wants_largest ? largest_of(largest) : 0};
  }

  static void measure(const TensorRow& row, const NormOptions& options, int64_t begin, int64_t end) {
    Context context;
    context.unscale = options.unscale;
    context.inv_scale = options.inv_scale;
    const Scalars as_it_is = Common::scalars<T>({}, false, 0);
    const Scalars unscaled = Common::scalars<T>(context, false, 0);
    for (int64_t at = begin; at < end; at += kPart) {
      const int64_t count = end - at < kPart ? end - at : kPart;
      NormPart& part = row.beside->norm[at / kPart];
      if (!row.layout) {
        part = add_up(unscaled, reinterpret_cast<const S*>(row.data[kGrad]) + at, count, end - at, options.largest);
        continue;
      }
      alignas(64) T grad[kPart];
      gather_grad<Lane, S>(unscaled, row, at, count, grad);
      part = add_up(as_it_is, grad, count, count, options.largest);
    }
  }
};

// What becomes of a parameter as its update goes through a piece of it, run by run. Within a run everything is in
// opmath and in registers, for arithmetic is what a step has least to spare of: a sum has at most kRun / kLanes terms
// there.
constexpr int64_t kRun = 256;
constexpr int64_t kLongRun = 512;
template <class Lane>
class Stats {
 public:
  using T = typename Lane::Scalar;
  static constexpr int kLanes = sizeof(T) == 4 ? 16 : 8;  // on all targets
  static constexpr int kEach = kLanes / Lane::kWidth;

  // Of one run: a copy that the compiler keeps in registers.
  struct Run {
    Lane grads[kEach], params[kEach], changes[kEach], largest, threshold;
    int64_t lost = 0;

    // `added`: to the parameter, before it was rounded away perhaps.
    __attribute__((always_inline)) inline void include(int at, Lane grad, Lane before, Lane after, Lane added) {
      const Lane change = sub(after, before);
      grads[at] = fma(grad, grad, grads[at]);
      params[at] = fma(after, after, params[at]);
      changes[at] = fma(change, change, changes[at]);
      if (any_outside(abs(change), abs(mul(threshold, before)))) {  // seldom
        largest = larger(largest, change, before);
        threshold = just_below(largest);
        lost += count_lost(change, added);
      }
    }
  };

  Run begin_run() const {
    Run run;
    for (int k = 0; k < kEach; ++k) run.grads[k] = run.params[k] = run.changes[k] = Lane(T(0));
    run.largest = largest_;
    run.threshold = just_below(largest_);
    return run;
  }

  // `grad_at` and `param_at` give the run's gradients and its parameters, as updated, again.
  template <class GradAt, class ParamAt>
  void end_run(const Run& run, int64_t count, GradAt grad_at, ParamAt param_at) {
    num_elements += count;
    largest_ = run.largest;
    lost_ += run.lost;
    const bool exact_grads = !in_range(run.grads), exact_params = !in_range(run.params);
    for (int k = 0; k < kEach; ++k) {
      if (!exact_grads) grads_.add_sum(k, run.grads[k]);
      if (!exact_params) params_.add_sum(k, run.params[k]);
      changes_.add_sum(k, run.changes[k]);
    }
    if (exact_grads) nonfinite_ += add_exactly(count, grad_at, &grads_);
    if (exact_params) add_exactly(count, param_at, &params_);
  }

  // Of the part that ends here. The ratio is that of the piece so far: only the largest of all counts.
  __attribute__((noinline)) StatsPart end_part() {
    const T largest = largest_of(largest_);
    const StatsPart part = {grads_.total(), params_.total(), changes_.total(), largest, nonfinite_, lost_};
    *this = Stats();
    largest_ = Lane(largest);
    return part;
  }

  int64_t num_elements = 0;  // of the part so far

 private:
  // Below its product with the parameter no change is a larger part of it, whatever the roundings. Never NaN.
  static Lane just_below(Lane ratio) {
    const Lane product = mul(ratio, Lane(T(1) - 8 * std::numeric_limits<T>::epsilon()));
    return if_equal(ratio, ratio, product, Lane(T(0)));
  }

  __attribute__((noinline)) static Lane larger(Lane largest, Lane change, Lane before) {
    const Lane zero(T(0)), ratio = div(abs(change), abs(before));
    const Lane found = if_equal(sub(before, before), zero, if_equal(before, zero, zero, ratio), zero);
    return maximum(largest, found);
  }

  __attribute__((noinline)) static int64_t count_lost(Lane change, Lane added) {
    const Lane zero(T(0)), one(T(1));
    T values[Lane::kWidth], count = 0;
    if_equal(added, zero, zero, if_equal(change, zero, one, zero)).store(values);
    for (int k = 0; k < Lane::kWidth; ++k) count += values[k];
    return static_cast<int64_t>(count);
  }

  // Are squares neither so small nor so large that opmath has lost something?
  static bool in_range(const Lane* sums) {
    bool outside = false;
    for (int k = 0; k < kEach; ++k)
      outside |= any_above(Lane(kSmall), sums[k]) || any_above(sums[k], Lane(std::numeric_limits<T>::max()));
    return !outside;
  }
  static constexpr T kSmall = sizeof(T) == 4 ? T(0x1p-70) : T(0x1p-900);

  // In double, whatever they are. Returns how many are inf or nan.
  template <class At>
  __attribute__((noinline)) static int64_t add_exactly(int64_t count, At value_at, PartSum<Lane, kLanes>* sums) {
    const Lane zero(T(0)), one(T(1));
    Lane finite = zero;
    int64_t lanes = 0;
    each_lane<Lane, kLanes>(count, [&](int64_t i, int at, auto... n) {
      const Lane x = value_at(i, n...);
      sums->add_square(at, x);
      finite = add(finite, if_equal(sub(x, x), zero, one, zero));
      ++lanes;
    });
    T each[Lane::kWidth], sum = 0;
    finite.store(each);
    for (int k = 0; k < Lane::kWidth; ++k) sum += each[k];
    return lanes * Lane::kWidth - static_cast<int64_t>(sum);  // a padded lane's zeros are finite too
  }

  PartSum<Lane, kLanes> grads_, params_, changes_;
  Lane largest_{T(0)};
  int64_t nonfinite_ = 0, lost_ = 0;
};

}  // namespace
}  // namespace fusedopt
