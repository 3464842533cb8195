// Sparse (COO) gradients: from torch's tensors to what the kernels walk.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace fusedopt {

class SparseRow {
 public:
  // Takes the gradient apart, and returns references to be kept until the kernel is done. Throws, as `who`, if it does
  // not fit the parameter. `ascends`: the step will negate it.
  std::vector<py::object> read(PyObject* grad, const TensorView& param, bool ascends, const ParamName& who);
  // Its values, which must be of the parameter's dtype and device.
  const TensorView& values() const { return values_; }

  // Fills the row of the kernels. `streams` holds the parameter and its state; its gradient is not looked at. Returns
  // the layout of what `written` below is.
  std::unique_ptr<Layout> plan(const Streams& streams, TensorRow* row);

  // For WrittenMemory: all of the parameter and its state; the values; the indices, numbers of 8 bytes.
  TensorRow written{}, grad_memory{}, index_memory{};

 private:
  void find_rows(const py::object& indices, bool ascends, const ParamName& who);

  TensorView values_;
  int64_t num_values_ = 0, num_rows_ = 0;
  const int64_t* sizes_ = nullptr;  // of the sparse dimensions
  SparseGrad grad_{};
  std::vector<Layout::Dim> dims_;
  std::vector<int64_t> order_, first_;
  std::unique_ptr<Layout> layout_, grad_layout_, index_layout_;
};

}  // namespace fusedopt
