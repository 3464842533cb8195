// Reading torch tensors without a torch header: what a tensor is (through DLPack), and whether it still is what it was.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../table.h"
#include "dlpack.h"

namespace fusedopt {

namespace py = pybind11;

// A tensor as the drivers see it; pointers into the tensor itself, valid until control returns to Python.
struct TensorView {
  std::byte* data;
  DType dtype;      // of the real view, for a complex tensor
  bool is_complex;  // element = two values of dtype
  int ndim;
  const int64_t* shape;
  const int64_t* strides;  // in elements (of two values, for a complex tensor)

  int64_t numel() const;
  int64_t itemsize() const;  // of dtype
  std::string shape_string() const;
  double first() const;  // the value of the first element, a real one
};

int64_t itemsize(DType dtype);
const char* dtype_name(DType dtype, bool is_complex);

// Called once at import, with the torch module.
void bind_torch(py::handle torch);

// Exactly torch.Tensor or torch.nn.Parameter: their attributes are torch's own.
bool is_plain_tensor(PyObject* object);
bool is_tensor(PyObject* object);
// A new reference to tensor.grad (None included), or null with a Python exception set.
PyObject* get_grad(PyObject* tensor);
// Reads a strided CPU tensor of a supported dtype. Otherwise returns false and says in `why` what was got.
bool read_tensor(PyObject* tensor, TensorView* out, std::string* why);
// Conjugate and negative views read as if they were not: true for those.
bool is_lazy_view(PyObject* tensor);

// Tells autograd that these were written. The pointers may repeat.
void bump_versions(PyObject* const* tensors, size_t count);

// What a tensor's own record (torch's TensorImpl) says of it: sizes, strides, offset, dtype, device, dispatch keys.
// Asking DLPack about a tensor costs 50 ns, and a step asks about five tensors a parameter; comparing the record with
// the one seen when DLPack was asked costs 5. Where the record's fields lie is found by experiment at import and
// tested there by changing tensors in every way torch has; if any of that fails, `available()` is false and every
// tensor is read through DLPack every time.
class Signature {
 public:
  static bool available();
  static void set_enabled(bool enabled);
  // The interned signature of a tensor that was just read; null where it has none.
  static const Signature* of(PyObject* tensor, const TensorView& view);
  // Where a tensor's records lie: only ever a hint of what to fetch into the cache early, stale or not.
  struct Hint {
    const char *object = nullptr, *record = nullptr, *memory = nullptr;
    void prefetch() const;
  };
  static Hint hint(PyObject* tensor);
  // If the tensor still has this signature: its address now.
  bool matches(PyObject* tensor, std::byte** data) const;

 private:
  static constexpr int kInlineDims = 5;  // sizes and strides of so many dimensions lie in the record itself
  static constexpr int kShapeWords = 1 + 2 * kInlineDims;
  uint64_t shape_[kShapeWords];  // number of dimensions, sizes, strides
  uint64_t dtype_and_device_, keys_, deleter_;
  int64_t itemsize_;
  friend struct SignatureLayout;
};

}  // namespace fusedopt
