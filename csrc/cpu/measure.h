// What one instruction set adds up over elements: included by step.h.
#pragma once

#include "../measures.h"
#include "gather.h"

namespace fusedopt {
namespace {

// kPartLanes sums of doubles.
template <class Lane>
struct PartSum {
  using Doubles = typename Lane::Doubles;
  static constexpr int kEach = Lane::kWidth / Doubles::kWidth, kCount = kPartLanes / Doubles::kWidth;
  Doubles sum[kCount];

  PartSum() {
    for (int k = 0; k < kCount; ++k) sum[k] = Doubles(0.0);
  }
  // Lane `at` of those that follow one another through a stretch of kPartLanes.
  void add_square(int at, Doubles* values) {
    for (int k = 0; k < kEach; ++k) sum[at * kEach + k] = fma(values[k], values[k], sum[at * kEach + k]);
  }
  void add_square(int at, Lane values) {
    Doubles doubles[kEach];
    values.to_doubles(doubles);
    add_square(at, doubles);
  }
  __attribute__((noinline)) double total() const {
    double lanes[kPartLanes];
    for (int k = 0; k < kCount; ++k) sum[k].store(lanes + k * Doubles::kWidth);
    for (int apart = kPartLanes / 2; apart > 0; apart /= 2) {
      for (int k = 0; k < apart; ++k) lanes[k] += lanes[k + apart];
    }
    return lanes[0];
  }
};

// Calls f(i, at, count...) for the lanes of [0, end): `at` counts from 0 through each stretch of kPartLanes elements,
// `count` is empty or the elements left.
template <class Lane, class F>
inline void each_lane(int64_t end, F f) {
  constexpr int kInStretch = kPartLanes / Lane::kWidth;
  int64_t i = 0;
  for (; i + kPartLanes <= end; i += kPartLanes) {
    for (int at = 0; at < kInStretch; ++at) f(i + at * Lane::kWidth, at);
  }
  for (int at = 0; i < end; ++at, i += Lane::kWidth) {
    if (i + Lane::kWidth <= end) {
      f(i, at);
    } else {
      f(i, at, static_cast<int>(end - i));
    }
  }
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

  template <class G>
  static NormPart add_up(const Scalars& scalars, const G* grad, int64_t count, bool wants_largest) {
    const Scalars s = scalars;
    PartSum<Lane> sum;
    Lane largest(T(0));
    each_lane<Lane>(count, [&](int64_t i, int at, auto... n) {
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
      NormPart& part = row.norm[at / kPart];
      if (!row.layout) {
        part = add_up(unscaled, reinterpret_cast<const S*>(row.data[kGrad]) + at, count, options.largest);
        continue;
      }
      alignas(64) T grad[kPart];
      gather_grad<Lane, S>(unscaled, row, at, count, grad);
      part = add_up(as_it_is, grad, count, options.largest);
    }
  }
};

// What becomes of parameters in storage type S, as their update goes through a part.
template <class Lane, class S>
struct Stats {
  using T = typename Lane::Scalar;
  static constexpr int kEach = PartSum<Lane>::kEach;
  PartSum<Lane> grads, params, changes;
  Lane ratio{T(0)}, finite{T(0)}, lost{T(0)};
  int64_t num_lanes = 0;

  // `change`: what was added, before it was rounded away perhaps; null if nothing was. (Once for all rules: not inlined.)
  template <class G>
  __attribute__((noinline)) void include(const Common::Scalars<T>& scalars, const S* before, const S* after, const G* grad, const T* change,
               int64_t count) {
    const Common::Scalars<T> s = scalars;
    const Lane zero(T(0)), one(T(1));
    each_lane<Lane>(count, [&](int64_t i, int at, auto... n) {
      const Lane g = Common::value(s, Lane::load(grad + i, n...));
      const Lane old = Lane::load(before + i, n...), now = Lane::load(after + i, n...);
      typename Lane::Doubles difference[kEach], subtrahend[kEach];
      now.to_doubles(difference);
      old.to_doubles(subtrahend);
      params.add_square(at, difference);
      for (int k = 0; k < kEach; ++k) difference[k] = sub(difference[k], subtrahend[k]);
      changes.add_square(at, difference);
      grads.add_square(at, g);
      ratio = maximum(ratio, if_equal(old, zero, zero, div(abs(sub(now, old)), abs(old))));
      finite = add(finite, if_equal(sub(g, g), zero, one, zero));
      if (change) {
        const Lane stays = if_equal(old, now, one, zero);
        lost = add(lost, if_equal(Lane::load(change + i, n...), zero, zero, stays));
      }
      ++num_lanes;
    });
  }

  __attribute__((noinline)) StatsPart total() const {
    // A padded lane's zeros are finite too.
    return {grads.total(), params.total(), changes.total(), largest_of(ratio),
            num_lanes * Lane::kWidth - count(finite), count(lost)};
  }

 private:
  static int64_t count(Lane ones) {
    T values[Lane::kWidth];
    ones.store(values);
    T sum = 0;
    for (int k = 0; k < Lane::kWidth; ++k) sum += values[k];
    return static_cast<int64_t>(sum);
  }
};

}  // namespace
}  // namespace fusedopt
