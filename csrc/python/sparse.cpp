#include "sparse.h"

#include <algorithm>
#include <string>

#include "../cuda/runtime.h"

namespace fusedopt {

namespace {

// A value of the gradient and where it belongs, as one number.
struct Placed {
  int64_t place, value;
};

// Equal ones keep their order. By digits: comparisons of random numbers are mispredicted, which made std::sort take as
// long as the step itself.
void sort_by_place(std::vector<Placed>* placed, std::vector<Placed>* scratch) {
  constexpr int kBits = 11;
  int64_t all = 0;
  for (const Placed& p : *placed) all |= p.place;
  scratch->resize(placed->size());
  for (int shift = 0; shift < 64 && all >> shift != 0; shift += kBits) {
    int64_t end[(1 << kBits) + 1] = {};
    const auto digit = [shift](const Placed& p) { return p.place >> shift & ((1 << kBits) - 1); };
    for (const Placed& p : *placed) ++end[digit(p) + 1];
    for (int i = 0; i < 1 << kBits; ++i) end[i + 1] += end[i];
    for (const Placed& p : *placed) (*scratch)[end[digit(p)]++] = p;
    placed->swap(*scratch);
  }
}

// A tensor of int64, which torch's own indices always are.
dlpack::Tensor read_integers(const py::object& tensor) {
  dlpack::Tensor out;
  if (read_dlpack(tensor.ptr(), &out) != 0) throw py::error_already_set();
  if (out.dtype.code != dlpack::kInt || out.dtype.bits != 64) throw py::type_error("indices must be torch.int64");
  out.data = out.data ? static_cast<std::byte*>(out.data) + out.byte_offset : nullptr;
  return out;
}

// The row whose gradient is a tensor, for what only looks at its memory.
std::unique_ptr<Layout> memory_of(const TensorView& tensor, TensorRow* row) {
  Streams streams;
  streams.count = kGrad + 1;
  streams.view[kParam] = streams.view[kGrad] = tensor;
  std::unique_ptr<Layout> layout = plan_row(streams, row);
  row->data[kParam] = nullptr;  // it is no stream of the parameter's
  row->layout = layout.get();
  return layout;
}

}  // namespace

std::vector<py::object> SparseRow::read(PyObject* grad, const TensorView& param, bool ascends, const ParamName& who) {
  py::object whole = py::handle(grad).attr("detach")();
  std::vector<int64_t> shape;
  for (const py::handle size : whole.attr("shape")) shape.push_back(size.cast<int64_t>());
  if (!std::equal(shape.begin(), shape.end(), param.shape, param.shape + param.ndim)) {
    TensorView view{};
    view.ndim = static_cast<int>(shape.size());
    view.shape = shape.data();
    fail(who, "the gradient", "has shape " + view.shape_string() + " but the parameter has " + param.shape_string());
  }
  // On a GPU the kernel reads the indices itself: each must be there but once.
  if (param.device != kCpu && !whole.attr("is_coalesced")().cast<bool>()) {
    const TorchDevice current(param.device);
    if (cuda::runtime()->is_capturing(current_stream(param.device)))
      fail(who, "the gradient", "is sparse and not coalesced, which a CUDA graph cannot do: .coalesce() it before");
    whole = whole.attr("coalesce")();
  }

  const py::object indices_tensor = whole.attr("_indices")();
  py::object values = whole.attr("_values")();
  if (is_lazy_view(values.ptr())) values = values.attr("resolve_conj")().attr("resolve_neg")();
  std::string why;
  if (!read_tensor(values.ptr(), &values_, &why)) fail(who, "the gradient", why);
  const dlpack::Tensor indices = read_integers(indices_tensor);
  grad_.num_dims = whole.attr("sparse_dim")().cast<int>();
  num_values_ = values_.ndim > 0 ? values_.shape[0] : -1;
  sizes_ = param.shape;
  if (indices.ndim != 2 || indices.shape[0] != grad_.num_dims || indices.shape[1] != num_values_ ||
      !std::equal(values_.shape + 1, values_.shape + values_.ndim, param.shape + grad_.num_dims,
                  param.shape + param.ndim)) {
    fail(who, "the gradient", "is sparse and its indices and values do not fit its shape");
  }
  if (!indices.data && num_values_ > 0 && grad_.num_dims > 0)
    fail(who, "the gradient", "is sparse and its indices have no memory (their storage was freed)");
  grad_.indices = static_cast<const int64_t*>(indices.data);
  grad_.dim_stride = indices.strides[0];
  grad_.value_stride = indices.strides[1];
  grad_.grad_stride = values_.strides[0] * (values_.is_complex ? 2 : 1);
  grad_.order = grad_.first = nullptr;
  num_rows_ = num_values_;
  if (param.device == kCpu) find_rows(indices_tensor, ascends, who);

  TensorView view = param;
  view.data = static_cast<std::byte*>(indices.data);
  view.dtype = DType::kFloat64;  // of the same size
  view.is_complex = false;
  view.ndim = 2;
  view.shape = indices.shape;
  view.strides = indices.strides;
  index_layout_ = memory_of(view, &index_memory);
  grad_layout_ = memory_of(values_, &grad_memory);
  return {indices_tensor, values};
}

// Finds the values that belong in one place.
void SparseRow::find_rows(const py::object& indices, bool ascends, const ParamName& who) {
  // Shared by all, under the GIL, for it is large; no Python code runs while they are in use.
  static std::vector<Placed> placed, scratch;
  placed.resize(num_values_);
  for (int64_t v = 0; v < num_values_; ++v) placed[v] = {0, v};
  for (int d = 0; d < grad_.num_dims; ++d) {
    const int64_t* at = grad_.indices + d * grad_.dim_stride;
    for (int64_t v = 0; v < num_values_; ++v) {
      const int64_t index = at[v * grad_.value_stride];
      if (index < 0 || index >= sizes_[d]) {
        fail(who, "the gradient",
             "is sparse and has index " + std::to_string(index) + " in dimension " + std::to_string(d) + " of size " +
                 std::to_string(sizes_[d]));
      }
      placed[v].place = placed[v].place * sizes_[d] + index;
    }
  }
  const auto not_increasing = [](const Placed& a, const Placed& b) { return a.place >= b.place; };
  if (std::adjacent_find(placed.begin(), placed.end(), not_increasing) == placed.end()) return;

  sort_by_place(&placed, &scratch);
  order_.resize(num_values_);
  first_.clear();
  int64_t most = 0;
  for (int64_t v = 0; v < num_values_; ++v) {
    order_[v] = placed[v].value;
    if (v == 0 || placed[v].place != placed[v - 1].place) first_.push_back(v);
    most = std::max(most, v + 1 - first_.back());
  }
  num_rows_ = static_cast<int64_t>(first_.size());
  first_.push_back(num_values_);
  grad_.order = order_.data();
  grad_.first = first_.data();
  if (most <= 2) return;

  // Sums of three and more depend on the order. torch's coalesce takes the one that torch's sort gives it, which is not
  // a stable one.
  py::object flat = grad_.num_dims == 0 ? indices.attr("new_zeros")(num_values_) : indices.attr("select")(0, 0);
  for (int d = 1; d < grad_.num_dims; ++d) flat = flat.attr("mul")(sizes_[d]).attr("add")(indices.attr("select")(0, d));
  if (ascends) flat = flat.attr("contiguous")();  // as the negative of a gradient is, there
  const py::object order = flat.attr("sort")(0).attr("indices");
  const auto* sorted = static_cast<const int64_t*>(read_integers(order).data);
  std::copy(sorted, sorted + num_values_, order_.begin());
}

std::unique_ptr<Layout> SparseRow::plan(const Streams& streams, TensorRow* row) {
  const TensorView& param = streams.view[kParam];
  const int complex = param.is_complex ? 2 : 1;

  Streams inner = streams;  // one row of each
  inner.view[kGrad] = values_;
  dims_.assign(grad_.num_dims, {});
  for (int k = 0; k < streams.count; ++k) {
    const int outer = k == kGrad ? 1 : grad_.num_dims;
    inner.view[k].ndim -= outer;
    inner.view[k].shape += outer;
    inner.view[k].strides += outer;
    for (int d = 0; d < grad_.num_dims; ++d) {
      dims_[d].size = param.shape[d];
      dims_[d].stride[k] = k == kGrad ? 0 : streams.view[k].strides[d] * complex;
    }
  }
  layout_ = plan_row(inner, row);
  if (!layout_) layout_ = std::make_unique<Layout>();
  layout_->sparse = &grad_;
  grad_.dims = dims_.data();
  grad_.row_numel = row->numel;
  row->numel *= num_rows_;
  grad_.is_one_element = num_rows_ == 1 && values_.ndim == 1 && param.is_contiguous();
  row->layout = layout_.get();

  Streams whole = streams;
  whole.view[kGrad] = param;
  std::unique_ptr<Layout> layout = plan_row(whole, &written);
  written.layout = layout.get();
  return layout;
}

}  // namespace fusedopt
