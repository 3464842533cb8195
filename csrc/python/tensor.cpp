#include "tensor.h"

#include <structmember.h>  // PyMemberDef, before Python 3.12

#include <stdexcept>

#include "../cuda/runtime.h"

#include <cstring>
#include "../lanes/lane.h"

namespace fusedopt {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

namespace {

const dlpack::ExchangeApi* api = nullptr;
getter grad_getter = nullptr;
void* grad_closure = nullptr;
PyObject* str_grad = nullptr;

// torch.distributed.tensor.DTensor and where it keeps its two slots; null until that module is imported.
PyTypeObject* dtensor_type = nullptr;
Py_ssize_t local_at = 0, spec_at = 0;

// The place of a slot in a class's objects, or 0.
Py_ssize_t slot_of(py::handle type, const char* name) {
  if (!py::hasattr(type, name)) return 0;
  const py::object slot = type.attr(name);
  if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) return 0;
  return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
}

void find_dtensor() {
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
  if (!module || !py::hasattr(module, "DTensor")) return;
  const py::object type = py::handle(module).attr("DTensor");
  local_at = slot_of(type, "_local_tensor");
  spec_at = slot_of(type, "_spec");
  if (!local_at || !spec_at)
    throw std::runtime_error("fusedopt: the DTensors of this torch are not of the kind that it knows; use torch.optim");
  dtensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
}

PyObject* slot(PyObject* object, Py_ssize_t at) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + at);
}

std::string exception_text() {
  py::error_already_set error;
  const std::string text = py::str(error.value()).cast<std::string>();
  return text.substr(0, text.find('\n'));  // torch appends its C++ stack
}

std::string dtype_of(PyObject* tensor) { return py::str(py::handle(tensor).attr("dtype")).cast<std::string>(); }

bool supported_dtype(dlpack::DataType got, TensorView* out) {
  if (got.lanes != 1) return false;
  out->is_complex = got.code == dlpack::kComplex;
  const int bits = out->is_complex ? got.bits / 2 : got.bits;
  if (got.code == dlpack::kBfloat && bits == 16) {
    out->dtype = DType::kBFloat16;
  } else if (got.code == dlpack::kFloat && bits == 16) {
    out->dtype = DType::kFloat16;
  } else if ((got.code == dlpack::kFloat || out->is_complex) && bits == 32) {
    out->dtype = DType::kFloat32;
  } else if ((got.code == dlpack::kFloat || out->is_complex) && bits == 64) {
    out->dtype = DType::kFloat64;
  } else if (got.code == dlpack::kUInt && bits == 8) {
    out->dtype = DType::kCode;
  } else {
    return false;
  }
  return true;
}

}  // namespace

int64_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kCode: return 1;
    case DType::kMixed: break;
  }
  return 0;
}

const char* dtype_name(DType dtype, bool is_complex) {
  switch (dtype) {
    case DType::kFloat32: return is_complex ? "torch.complex64" : "torch.float32";
    case DType::kFloat64: return is_complex ? "torch.complex128" : "torch.float64";
    case DType::kBFloat16: return "torch.bfloat16";
    case DType::kFloat16: return "torch.float16";
    case DType::kCode: return "torch.uint8";
    case DType::kMixed: break;
  }
  return "?";
}

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int d = 0; d < ndim; ++d) n *= shape[d];
  return n;
}

bool TensorView::is_contiguous() const {
  int64_t expected = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

int64_t TensorView::itemsize() const { return fusedopt::itemsize(dtype); }

std::string TensorView::shape_string() const {
  std::string s = "(";
  for (int d = 0; d < ndim; ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + (ndim == 1 ? ",)" : ")");
}

double TensorView::first() const {
  double f64;
  float f32;
  BFloat16 bf16;
  Half f16;
  switch (dtype) {
    case DType::kFloat32: return std::memcpy(&f32, data, sizeof f32), f32;
    case DType::kFloat64: return std::memcpy(&f64, data, sizeof f64), f64;
    case DType::kBFloat16: return std::memcpy(&bf16, data, sizeof bf16), to_float(bf16);
    case DType::kFloat16: return std::memcpy(&f16, data, sizeof f16), to_float(f16);
    default: return 0;
  }
}

std::string device_name(int device) { return device == kCpu ? "cpu" : "cuda:" + std::to_string(device); }

static Pretend pretend = Pretend::kNothing;
std::string torch_device(int device) { return device_name(pretend == Pretend::kNothing ? device : kCpu); }
void pretend_cuda(Pretend what) { pretend = what; }

// A function of torch._C, kept for the life of the process.
static py::handle torch_function(const char* name) {
  return py::object(py::module_::import("torch._C").attr(name)).release();
}

void* current_stream(int device) {
  if (pretend != Pretend::kNothing) return nullptr;
  // Not DLPack's, which is null where torch was built without it: that is the legacy stream.
  static const py::handle get = torch_function("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(get(device).cast<uintptr_t>());
}

TorchDevice::TorchDevice(int device) {
  if (device == kCpu || pretend != Pretend::kNothing) return;
  static const py::handle get = torch_function("_cuda_getDevice"), set = torch_function("_cuda_setDevice");
  const int current = get().cast<int>();
  if (current == device) return;
  set(device);
  set_ = set;
  before_ = current;
}

TorchDevice::~TorchDevice() {
  if (before_ == kCpu) return;
  try {
    set_(before_);
  } catch (py::error_already_set&) {
    // The process is ending.
  }
}

int read_dlpack(PyObject* tensor, dlpack::Tensor* out) { return api->from_object(tensor, out); }

bool is_distributed(PyObject* tensor) {
  if (is_plain_tensor(tensor) || !is_tensor(tensor)) return false;
  if (!dtensor_type) find_dtensor();
  return dtensor_type && PyObject_TypeCheck(tensor, dtensor_type);
}

PyObject* local_part(PyObject* tensor) {
  if (!is_distributed(tensor)) return tensor;
  PyObject* part = slot(tensor, local_at);
  return part ? part : tensor;
}

PyObject* spec_of(PyObject* dtensor) { return slot(dtensor, spec_at); }

PyObject* get_grad(PyObject* tensor) {
  if (is_plain_tensor(tensor) || Py_TYPE(tensor) == dtensor_type) return grad_getter(tensor, grad_closure);
  return PyObject_GetAttr(tensor, str_grad);
}

bool is_lazy_view(PyObject* tensor) {
  const py::handle t(tensor);
  return t.attr("is_neg")().cast<bool>() || t.attr("is_conj")().cast<bool>();
}

bool read_tensor(PyObject* tensor, TensorView* out, std::string* why, bool may_be_integer) {
  if (!is_tensor(tensor)) {
    *why = "is not a tensor but a " + std::string(Py_TYPE(tensor)->tp_name);
    return false;
  }
  const py::handle t(tensor);
  if (!is_plain_tensor(tensor) &&
      !t.attr("__torch_dispatch__").is(py::module_::import("torch").attr("_C").attr("_disabled_torch_dispatch_impl"))) {
    *why = "is a " + py::str(py::type::of(t)).cast<std::string>() +
           ", a tensor subclass without memory of its own; this optimizer needs plain strided tensors";
    return false;
  }
  dlpack::Tensor raw;
  if (read_dlpack(tensor, &raw) != 0) {
    *why = "cannot be read: " + exception_text() +
           "; it must be a strided tensor in the memory of the CPU or of a CUDA device";
    return false;
  }
  out->device = pretend == Pretend::kNothing ? kCpu : 0;
  if (raw.device.type == dlpack::kCUDA) {
    const char* problem = cuda::runtime() ? cuda::runtime()->why_not() : "this build has no CUDA kernels";
    if (problem) {
      *why = "is on device '" + device_name(raw.device.id) + "', but " + problem + "; see fusedopt.show_config()";
      return false;
    }
    out->device = raw.device.id;
  } else if (raw.device.type != dlpack::kCPU && raw.device.type != dlpack::kCUDAHost) {
    *why = "is on device '" + py::str(t.attr("device")).cast<std::string>() +
           "', which this build has no kernels for; move it to 'cpu' or use torch.optim";
    return false;
  }
  const bool is_integer = raw.dtype.code == dlpack::kInt || raw.dtype.code == dlpack::kUInt;
  if (!supported_dtype(raw.dtype, out) || (is_integer && !may_be_integer)) {
    *why = "has dtype " + dtype_of(tensor) +
           "; supported are float32, float64, bfloat16, float16, complex64 and complex128";
    return false;
  }
  out->data = static_cast<std::byte*>(raw.data) + raw.byte_offset;
  out->ndim = raw.ndim;
  out->shape = raw.shape;
  out->strides = raw.strides;
  if (!out->data && out->numel() > 0) {
    *why = "has no memory (a fake or zero tensor, or one whose storage was freed)";
    return false;
  }
  if (out->device != kCpu && reinterpret_cast<uintptr_t>(out->data) % out->itemsize() != 0) {
    *why = "does not begin at a multiple of its element's size, which a GPU cannot read; use a .clone() of it";
    return false;
  }
  return true;
}

bool read_number(PyObject* tensor, TensorView* out, std::string* why) {
  if (!read_tensor(tensor, out, why)) return false;
  if (pretend == Pretend::kTensors) out->device = kCpu;
  if (out->numel() == 1 && !out->is_complex && !is_lazy_view(tensor)) return true;
  *why = "must be a one-element real tensor and no lazy view, got " +
         std::string(dtype_name(out->dtype, out->is_complex)) + " of shape " + out->shape_string();
  return false;
}

void bind_tensors(py::handle torch) {
  const py::object Tensor = torch.attr("Tensor");
  if (!py::hasattr(Tensor, "__dlpack_c_exchange_api__")) {
    throw py::import_error("fusedopt needs torch >= 2.11 (DLPack's C exchange table); this is torch " +
                           py::str(torch.attr("__version__")).cast<std::string>());
  }
  const py::object capsule = Tensor.attr("__dlpack_c_exchange_api__");
  api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  if (!api || !api->from_object) throw py::import_error("fusedopt: torch's DLPack exchange table has no version 1");

  // Kept for the life of the process.
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(Tensor).release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
  const py::object grad = torch.attr("_C").attr("TensorBase").attr("grad");
  if (!PyObject_TypeCheck(grad.ptr(), &PyGetSetDescr_Type)) throw py::import_error("fusedopt: unknown Tensor.grad");
  const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(py::object(grad).release().ptr());
  grad_getter = descriptor->d_getset->get;
  grad_closure = descriptor->d_getset->closure;
  str_grad = PyUnicode_InternFromString("grad");
}

}  // namespace fusedopt
