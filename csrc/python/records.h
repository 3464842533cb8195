// Torch's own records of tensors: whether a tensor still is what it was when DLPack was asked about it.
//
// Asking DLPack about a tensor costs 50 ns, a gradient's Python object 40 to 300, and a step has five tensors a
// parameter to look at. Comparing the record (torch's TensorImpl) with the one seen when DLPack was asked costs 5 ns.
// Where the fields lie is no interface of torch's, so nothing is assumed: they are located by experiment at import, and
// tested there by changing tensors in every way torch has. If any of that fails, `available()` is false and every
// tensor is read through DLPack in every step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>

#include "tensor.h"

namespace fusedopt {
namespace records {

constexpr int kInlineDims = 5;  // sizes and strides of so many dimensions lie in the record itself
constexpr int kShapeWords = 1 + 2 * kInlineDims;
constexpr uint64_t kDtypeAndDevice = 0xffffffff;

// Offsets of the fields, in bytes.
struct Offsets {
  int64_t record;  // in the Python object: the address of the record
  // In the record:
  int64_t storage;   // the address of the storage's record
  int64_t autograd;  // the address of autograd's, null for a tensor that never had one
  int64_t shape;     // number of dimensions, sizes, strides
  int64_t offset;    // from the start of the storage, in elements
  int64_t dtype;     // dtype and device; then flags and unused bits
  int64_t keys;      // dispatch keys: these tell conjugate, negative, sparse, fake ... tensors
  // In the storage's:
  int64_t address;
  int64_t deleter;  // which changes when the memory becomes copy-on-write
  // In autograd's:
  int64_t grad;         // the address of the gradient's record,
  const char* no_grad;  // or of this one
};

extern Offsets at;
extern bool found, enabled;

inline bool available() { return found && enabled; }
// For tests: false reads every tensor anew in every step.
void set_enabled(bool enabled);
// Locates and tests; called once at import.
void find(py::handle torch);

template <class T = const char*>
inline T load(const void* base, int64_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(base) + offset, sizeof value);
  return value;
}

inline const char* of(PyObject* tensor) { return load(tensor, at.record); }

// The record of tensor.grad, null if that is None.
inline const char* of_grad(PyObject* tensor) {
  const char* autograd = load(of(tensor), at.autograd);
  if (!autograd) return nullptr;
  const char* grad = load(autograd, at.grad);
  return grad == at.no_grad ? nullptr : grad;
}

// Tells autograd that these were written. The pointers may repeat.
void bump_versions(PyObject* const* tensors, size_t count);

}  // namespace records

// What a record says, but for where the memory lies.
class Signature {
 public:
  // The interned signature of a tensor that was just read; null where it has none.
  static const Signature* of(PyObject* tensor, const TensorView& view);

  // If a tensor's record still has this signature: its address now.
  bool matches(const char* record, std::byte** data) const {
    using namespace records;
    const char* storage = load(record, at.storage);
    uint64_t difference = storage == nullptr;
    for (int i = 0; i < kShapeWords; ++i) difference |= shape_[i] ^ load<uint64_t>(record, at.shape + 8 * i);
    difference |= (dtype_and_device_ ^ load<uint64_t>(record, at.dtype)) & kDtypeAndDevice;
    difference |= keys_ ^ load<uint64_t>(record, at.keys);
    if (difference) return false;
    *data = load<std::byte*>(storage, at.address) + load<int64_t>(record, at.offset) * itemsize_;
    return load<uint64_t>(storage, at.deleter) == deleter_;
  }

 private:
  uint64_t shape_[records::kShapeWords];
  uint64_t dtype_and_device_, keys_, deleter_;
  int64_t itemsize_;
};

}  // namespace fusedopt
