// Elements that do not lie one behind the other: included by step.h.
#pragma once

#include <cstring>

#include "../rules/common.h"
#include "../table.h"

namespace fusedopt {
namespace {

// Elements that are fetched before they are updated: see ARCHITECTURE.md, "Memory".
constexpr int64_t kFetched = 512;

// The element to be fetched beside the i-th, of those before `end`.
inline int64_t to_fetch(int64_t i, int64_t end) { return i + kFetched < end ? i + kFetched : i; }

template <int64_t size>
inline void copy_each(std::byte* to, int64_t to_stride, const std::byte* from, int64_t from_stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, size);
}
inline void copy(std::byte* to, int64_t to_stride, const std::byte* from, int64_t from_stride, int64_t count,
                 int64_t size) {
  if (to_stride == size && from_stride == size) return void(std::memcpy(to, from, count * size));
  switch (size) {
    case 1: return copy_each<1>(to, to_stride, from, from_stride, count);
    case 2: return copy_each<2>(to, to_stride, from, from_stride, count);
    case 4: return copy_each<4>(to, to_stride, from, from_stride, count);
    default: return copy_each<8>(to, to_stride, from, from_stride, count);
  }
}

// Where the first `count` streams have an element, counted in the order of their layout.
inline void find(const Layout& layout, int64_t element, int count, int64_t* offset) {
  for (int k = 0; k < count; ++k) offset[k] = layout.ndim == 0 ? element : 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t index = element % layout.dim[d].size;
    element /= layout.dim[d].size;
    for (int k = 0; k < count; ++k) offset[k] += index * layout.dim[d].stride[k];
  }
}

// The sum of the values, of storage type S, of row r of a sparse gradient, from one of their elements on.
template <class Lane, class S>
__attribute__((noinline)) void add_up_values(const Common::Scalars<typename Lane::Scalar>& s, const TensorRow& row,
                                             int64_t r, int64_t from, int64_t count, typename Lane::Scalar* sum) {
  const SparseGrad& sparse = *row.layout->sparse;
  const int64_t first = sparse.order ? sparse.first[r] : r, last = sparse.order ? sparse.first[r + 1] : r + 1;
  for (int64_t v = first; v < last; ++v) {
    const int64_t value = sparse.order ? sparse.order[v] : v;
    const S* at = reinterpret_cast<const S*>(row.data[kGrad]) + value * sparse.grad_stride + from;
    const auto add_block = [&](int64_t i, auto... n) {
      Lane x = Common::value(s, Lane::load(at + i, n...));
      if (v != first) x = add(Lane::load(static_cast<const typename Lane::Scalar*>(sum) + i, n...), x);
      x.store(sum + i, n...);
    };
    int64_t i = 0;
    for (; i + Lane::kWidth <= count; i += Lane::kWidth) add_block(i);
    if (i < count) add_block(i, static_cast<int>(count - i));
  }
}

// Elements of a strided or sparse gradient, as Common::value has them.
template <class Lane, class S>
__attribute__((noinline)) void gather_grad(const Common::Scalars<typename Lane::Scalar>& s, const TensorRow& row,
                                           int64_t begin, int64_t count, typename Lane::Scalar* out) {
  const Layout& layout = *row.layout;
  for (int64_t done = 0; done < count;) {
    int64_t run = count - done, element = begin + done, offset[kMaxStreams];
    if (const SparseGrad* sparse = layout.sparse) {
      const int64_t r = element / sparse->row_numel, from = element % sparse->row_numel;
      find(layout, from, kMaxStreams, offset);
      if (layout.ndim > 0) run = 1;
      if (run > sparse->row_numel - from) run = sparse->row_numel - from;
      add_up_values<Lane, S>(s, row, r, offset[kGrad], run, out + done);
    } else {
      const Layout::Dim& inner = layout.dim[layout.ndim - 1];
      find(layout, element, kMaxStreams, offset);
      if (run > inner.size - element % inner.size) run = inner.size - element % inner.size;
      const S* at = reinterpret_cast<const S*>(row.data[kGrad]) + offset[kGrad];
      const int64_t stride = inner.stride[kGrad], width = stride == 1 ? Lane::kWidth : 1;
      int64_t i = 0;
      for (; width > 1 && i + width <= run; i += width) Common::value(s, Lane::load(at + i)).store(out + done + i);
      for (; i < run; ++i) Common::value(s, Lane::load(at + i * stride, 1)).store(out + done + i, 1);
    }
    done += run;
  }
}

}  // namespace
}  // namespace fusedopt
