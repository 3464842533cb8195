// Reading torch tensors through DLPack, without a torch header.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../table.h"
#include "dlpack.h"

namespace fusedopt {

namespace py = pybind11;

constexpr int kCpu = -1;

// A tensor as the drivers see it; pointers into the tensor itself, valid until control returns to Python.
struct TensorView {
  std::byte* data;
  int device;       // the CUDA device's number; kCpu for memory of the host
  DType dtype;      // of the real view, for a complex tensor
  bool is_complex;  // element = two values of dtype
  int ndim;
  const int64_t* shape;
  const int64_t* strides;  // in elements (of two values, for a complex tensor)

  int64_t numel() const;
  bool is_contiguous() const;
  int64_t itemsize() const;  // of dtype
  std::string shape_string() const;
  double first() const;  // the value of the first element, a real one of the host's
};

int64_t itemsize(DType dtype);
std::string device_name(int device);
// The same for torch, whose the device is: not if the host only pretends to be it.
std::string torch_device(int device);
// torch's current stream on a device.
void* current_stream(int device);

// Makes a device torch's current one, and puts back what was.
class TorchDevice {
 public:
  explicit TorchDevice(int device);
  ~TorchDevice();
  TorchDevice(const TorchDevice&) = delete;

 private:
  py::handle set_;
  int before_ = kCpu;
};

// For tests, with the runtime of tests/cuda_on_host: tensors of the host count as the device's. kTensors: all but the
// numbers (step counts, lr, ...); kNumbers: these too.
enum class Pretend { kNothing, kTensors, kNumbers };
void pretend_cuda(Pretend what);
const char* dtype_name(DType dtype, bool is_complex);

// Finds torch's DLPack table and types; called once at import.
void bind_tensors(py::handle torch);

extern PyTypeObject *tensor_type, *parameter_type;

// Exactly torch.Tensor or torch.nn.Parameter: their attributes are torch's own.
inline bool is_plain_tensor(PyObject* object) {
  return Py_TYPE(object) == parameter_type || Py_TYPE(object) == tensor_type;
}
inline bool is_tensor(PyObject* object) { return is_plain_tensor(object) || PyObject_TypeCheck(object, tensor_type); }
// A DTensor: a tensor of which this process has a part.
bool is_distributed(PyObject* tensor);
// That part of a DTensor, borrowed; any other tensor itself.
PyObject* local_part(PyObject* tensor);
// What a DTensor says of shape, mesh and placements, borrowed.
PyObject* spec_of(PyObject* dtensor);
// A new reference to tensor.grad (None included), or null with a Python exception set.
PyObject* get_grad(PyObject* tensor);
// The shape, strides and so on as DLPack tells them: 0, or -1 with a Python exception set.
int read_dlpack(PyObject* tensor, dlpack::Tensor* out);
// Reads a strided tensor of a supported dtype; of an integer one, which some state is, if it may be. Otherwise returns
// false and says in `why` what was got.
bool read_tensor(PyObject* tensor, TensorView* out, std::string* why, bool may_be_integer = false);
// The same for a tensor that is one real number.
bool read_number(PyObject* tensor, TensorView* out, std::string* why);
// Conjugate and negative views read as if they were not: true for those.
bool is_lazy_view(PyObject* tensor);

}  // namespace fusedopt
