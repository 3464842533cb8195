#include "check.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "../form.h"

namespace fusedopt {

std::string ParamName::text() const {
  std::string s =
      std::string(optimizer) + ": param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
  PyObject* names = PyDict_GetItemString(param_group, "param_names");
  if (names && PyList_Check(names) && index < static_cast<size_t>(PyList_GET_SIZE(names)))
    s += " (" + py::repr(PyList_GET_ITEM(names, index)).cast<std::string>() + ")";
  return s;
}

void fail(const ParamName& name, const std::string& what, const std::string& problem) {
  throw std::runtime_error(name.text() + ": " + what + " " + problem);
}

namespace {

// The strides of a complex tensor's real view have a last dimension of 2.
void add_dims(const Streams& streams, Layout* layout) {
  const TensorView& param = streams.view[kParam];
  for (int d = 0; d < param.ndim; ++d) {
    if (param.shape[d] == 1) continue;
    Layout::Dim& dim = layout->dim[layout->ndim++];
    dim.size = param.shape[d];
    for (int k = 0; k < streams.count; ++k) dim.stride[k] = streams.view[k].strides[d] * (param.is_complex ? 2 : 1);
  }
  if (param.is_complex) {
    Layout::Dim& dim = layout->dim[layout->ndim++];
    dim.size = 2;
    for (int k = 0; k < streams.count; ++k) dim.stride[k] = 1;
  }
}

// dim[d + 1] continues dim[d] in every stream: one dimension.
void merge_dims(Layout* layout, int num_streams) {
  int last = 0;
  for (int d = 1; d < layout->ndim; ++d) {
    Layout::Dim &outer = layout->dim[last], &inner = layout->dim[d];
    bool together = true;
    for (int k = 0; k < num_streams; ++k) together &= outer.stride[k] == inner.stride[k] * inner.size;
    if (together) {
      const int64_t size = outer.size * inner.size;
      outer = inner;
      outer.size = size;
    } else {
      layout->dim[++last] = inner;
    }
  }
  layout->ndim = last + 1;
}

}  // namespace

std::unique_ptr<Layout> plan_row(const Streams& streams, TensorRow* row, bool any_order) {
  const TensorView& param = streams.view[kParam];
  row->numel = param.numel() * (param.is_complex ? 2 : 1);
  for (int k = 0; k < streams.count; ++k) row->data[k] = streams.view[k].data;
  if (row->numel <= 1) return nullptr;

  // Almost always all are contiguous.
  bool contiguous = true;
  for (int k = 0; k < streams.count; ++k) contiguous &= streams.view[k].is_contiguous();
  if (contiguous) return nullptr;

  auto layout = std::make_unique<Layout>();
  add_dims(streams, layout.get());
  const auto by_stride = [](const Layout::Dim& a, const Layout::Dim& b) { return a.stride[kParam] > b.stride[kParam]; };
  if (any_order) std::stable_sort(layout->dim, layout->dim + layout->ndim, by_stride);
  merge_dims(layout.get(), streams.count);
  if (layout->ndim == 1) {
    bool dense = true;
    for (int k = 0; k < streams.count; ++k) dense &= layout->dim[0].stride[k] == 1;
    if (dense) return nullptr;
  }
  return layout;
}

bool same_written_layout(const Layout* a, const Layout* b, int num_streams) {
  if (!a || !b) return a == b;
  if (a->ndim != b->ndim) return false;
  for (int d = 0; d < a->ndim; ++d) {
    if (a->dim[d].size != b->dim[d].size) return false;
    for (int k = 0; k < num_streams; ++k) {
      if (k != kGrad && a->dim[d].stride[k] != b->dim[d].stride[k]) return false;
    }
  }
  return true;
}

int64_t itemsize(const TensorRow& row, DType dtype, int stream) {
  return itemsize(row.form ? row.form->dtype(stream) : dtype);
}

// The codes' scales have a shape of their own, and are dense.
static bool is_scales(const TensorRow& row, int stream) {
  return row.form && row.form->is_coded() && stream == row.form->scales();
}
static int64_t num_elements(const TensorRow& row, int stream) {
  if (!is_scales(row, stream)) return row.numel;
  return row.numel / row.form->row_numel * row.form->blocks_per_row() * row.form->num_states;
}
static const Layout* layout_of(const TensorRow& row, int stream) {
  return is_scales(row, stream) ? nullptr : row.layout;
}

void stream_extent(const TensorRow& row, int stream, DType dtype, const std::byte** begin, const std::byte** end) {
  int64_t last = num_elements(row, stream) - 1;
  if (const Layout* layout = layout_of(row, stream)) {
    last = 0;
    for (int d = 0; d < layout->ndim; ++d) last += (layout->dim[d].size - 1) * layout->dim[d].stride[stream];
  }
  *begin = row.data[stream];
  *end = row.data[stream] + (last + 1) * itemsize(row, dtype, stream);
}

namespace {

// Calls visit(address) for every byte of every element of a stream, until it returns true; then returns true.
template <class Visit>
bool any_byte_of(const TensorRow& row, int stream, DType dtype, Visit visit) {
  const int64_t size = itemsize(row, dtype, stream), numel = num_elements(row, stream);
  for (int64_t e = 0; e < numel; ++e) {
    int64_t offset = e;
    if (const Layout* layout = layout_of(row, stream)) {
      offset = 0;
      int64_t rest = e;
      for (int d = layout->ndim - 1; d >= 0; --d) {
        offset += rest % layout->dim[d].size * layout->dim[d].stride[stream];
        rest /= layout->dim[d].size;
      }
    }
    for (int64_t byte = 0; byte < size; ++byte) {
      if (visit(row.data[stream] + offset * size + byte)) return true;
    }
  }
  return false;
}

// True if the strides alone show that no two elements of a stream are in one place: each dimension steps over all that
// the ones inside it reach. So it is for every permuted or sliced tensor.
bool elements_apart(const Layout* layout, int stream) {
  if (!layout) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int d = 0; d < layout->ndim; ++d) dims.emplace_back(layout->dim[d].stride[stream], layout->dim[d].size);
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return false;
    extent += stride * (size - 1);
  }
  return true;
}

}  // namespace

template <class Visit>
bool WrittenMemory::any_byte(const Region& region, Visit visit) const {
  const Shape& shape = shapes_[region.owner];
  if (region.stream != kStepCount) return any_byte_of(*shape.row, region.stream, shape.dtype, visit);
  for (const std::byte* at = region.begin; at != region.end; ++at) {
    if (visit(at)) return true;
  }
  return false;
}

void WrittenMemory::clear() {
  regions_.clear();
  shapes_.clear();
}

void WrittenMemory::add(const TensorRow& row, int num_streams, DType dtype, size_t owner) {
  if (shapes_.size() <= owner) shapes_.resize(owner + 1);
  shapes_[owner] = {&row, dtype};
  if (row.numel == 0) return;
  for (int k = 0; k < num_streams; ++k) {
    if (k == kGrad) continue;
    Region region{nullptr, nullptr, owner, k, nullptr};
    stream_extent(row, k, dtype, &region.begin, &region.end);
    regions_.push_back(region);
  }
}

void WrittenMemory::add_step_count(const std::byte* step, int64_t itemsize, size_t owner) {
  regions_.push_back({step, step + itemsize, owner, kStepCount, nullptr});
}

bool WrittenMemory::find_overlap(Region* a, Region* b) {
  std::sort(regions_.begin(), regions_.end(), [](const Region& x, const Region& y) {
    return std::tie(x.begin, x.owner, x.stream) < std::tie(y.begin, y.owner, y.stream);
  });
  const std::byte* reach = nullptr;
  for (Region& region : regions_) region.reach = reach = std::max(reach, region.end);

  for (size_t i = 0; i < regions_.size();) {
    // A cluster: regions whose extents touch. One alone is the usual case.
    size_t next = i + 1;
    while (next < regions_.size() && regions_[next].begin < regions_[next - 1].reach) ++next;
    const bool apart =
        regions_[i].stream == kStepCount ||
        elements_apart(layout_of(*shapes_[regions_[i].owner].row, regions_[i].stream), regions_[i].stream);
    if (!(next == i + 1 && apart) && elements_overlap(i, next, a, b)) return true;
    i = next;
  }
  return false;
}

// Exact: marks every byte that is written. Only for the few tensors that share a buffer or are not dense.
bool WrittenMemory::elements_overlap(size_t from, size_t to, Region* a, Region* b) const {
  const std::byte* begin = regions_[from].begin;
  std::vector<bool> written(static_cast<size_t>(regions_[to - 1].reach - begin));
  for (size_t i = from; i < to; ++i) {
    const std::byte* shared = nullptr;
    any_byte(regions_[i], [&](const std::byte* at) {
      if (written[at - begin]) return shared = at, true;
      written[at - begin] = true;
      return false;
    });
    if (!shared) continue;
    *b = regions_[i];
    size_t j = from;
    while (j < i && !any_byte(regions_[j], [&](const std::byte* at) { return at == shared; })) ++j;
    *a = regions_[j];
    return true;
  }
  return false;
}

// The first region that begins at or behind `p`.
size_t WrittenMemory::first_from(const std::byte* p) const {
  // Gradients made one after the other often lie between regions that were: look a little further than last time.
  for (size_t i = cursor_; i < std::min(cursor_ + 8, regions_.size()); ++i) {
    if (regions_[i].begin >= p && (i == 0 || regions_[i - 1].begin < p)) return cursor_ = i;
  }
  const auto found = std::lower_bound(regions_.begin(), regions_.end(), p,
                                      [](const Region& r, const std::byte* q) { return r.begin < q; });
  return cursor_ = found - regions_.begin();
}

bool WrittenMemory::gradient_overlaps(const TensorRow& row, DType dtype, size_t owner, Gap* gap,
                                      Region* touched) const {
  *gap = {};
  if (row.numel == 0) return false;
  const std::byte *from, *to;
  stream_extent(row, kGrad, dtype, &from, &to);
  const auto next = regions_.begin() + first_from(to);
  const std::byte* reach = next == regions_.begin() ? nullptr : std::prev(next)->reach;
  if (reach <= from) {
    *gap = {reach, next == regions_.end() ? reinterpret_cast<const std::byte*>(UINTPTR_MAX) : next->begin};
    return false;
  }

  const auto is_own_stream = [&](const Region& region) {
    if (region.owner != owner || region.stream == kStepCount || row.data[region.stream] != row.data[kGrad] ||
        itemsize(row, dtype, region.stream) != itemsize(row, dtype, kGrad))
      return false;
    for (int d = 0; row.layout && d < row.layout->ndim; ++d) {
      if (row.layout->dim[d].stride[kGrad] != row.layout->dim[d].stride[region.stream]) return false;
    }
    return true;
  };
  std::vector<bool> read(static_cast<size_t>(to - from));
  any_byte_of(row, kGrad, dtype, [&](const std::byte* at) { return read[at - from] = true, false; });
  for (auto region = regions_.begin(); region != next; ++region) {
    if (region->end <= from || is_own_stream(*region)) continue;
    *touched = *region;
    if (any_byte(*region, [&](const std::byte* at) { return from <= at && at < to && read[at - from]; })) return true;
  }
  return false;
}

}  // namespace fusedopt
