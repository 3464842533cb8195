#include "tensor.h"

#include <dlfcn.h>

#include <cstring>
#include <map>

#include "../lanes/lane.h"

namespace fusedopt {

namespace {

const dlpack::ExchangeApi* api = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
getter grad_getter = nullptr;
void* grad_closure = nullptr;
PyObject* str_grad = nullptr;
PyObject* increment_version = nullptr;  // torch._C._increment_version

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
  }
  return 0;
}

const char* dtype_name(DType dtype, bool is_complex) {
  switch (dtype) {
    case DType::kFloat32: return is_complex ? "torch.complex64" : "torch.float32";
    case DType::kFloat64: return is_complex ? "torch.complex128" : "torch.float64";
    case DType::kBFloat16: return "torch.bfloat16";
    case DType::kFloat16: return "torch.float16";
  }
  return "?";
}

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int d = 0; d < ndim; ++d) n *= shape[d];
  return n;
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
  }
  return 0;
}

bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, tensor_type); }

bool is_plain_tensor(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  return type == parameter_type || type == tensor_type;
}

PyObject* get_grad(PyObject* tensor) {
  if (is_plain_tensor(tensor)) return grad_getter(tensor, grad_closure);
  return PyObject_GetAttr(tensor, str_grad);
}

bool is_lazy_view(PyObject* tensor) {
  const py::handle t(tensor);
  return t.attr("is_neg")().cast<bool>() || t.attr("is_conj")().cast<bool>();
}

bool read_tensor(PyObject* tensor, TensorView* out, std::string* why) {
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
  if (api->from_object(tensor, &raw) != 0) {
    *why = "cannot be read: " + exception_text();
    return false;
  }
  if (raw.device.type != dlpack::kCPU && raw.device.type != dlpack::kCUDAHost) {
    *why = "is on device '" + py::str(t.attr("device")).cast<std::string>() +
           "', which this build has no kernels for; move it to 'cpu' or use torch.optim";
    return false;
  }
  if (!supported_dtype(raw.dtype, out)) {
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
  return true;
}

// Where the fields of torch's records lie, in bytes.
struct SignatureLayout {
  bool found = false, enabled = true;
  int64_t impl;     // in the Python object: the TensorImpl
  int64_t storage;  // in the TensorImpl: the StorageImpl,
  int64_t shape;    // number of dimensions, sizes, strides,
  int64_t offset;   // offset from the start of the storage, in elements,
  int64_t dtype;    // dtype and device, then flags and unused bits,
  int64_t keys;     // dispatch keys: these tell conjugate, negative, sparse, fake ... tensors
  int64_t data;     // in the StorageImpl: the address,
  int64_t deleter;  // and what frees it, which changes when the memory becomes copy-on-write
  static constexpr uint64_t kDtypeAndDevice = 0xffffffff;

  template <class T>
  static T at(const void* base, int64_t offset) {
    T value;
    std::memcpy(&value, static_cast<const char*>(base) + offset, sizeof value);
    return value;
  }
  const char* record(PyObject* tensor) const { return at<const char*>(tensor, impl); }

  // The offset of the first word equal to `value` in [from, to), or -1.
  static int64_t find(const void* base, int64_t from, int64_t to, uint64_t value) {
    for (int64_t offset = from; offset < to; offset += 8) {
      if (at<uint64_t>(base, offset) == value) return offset;
    }
    return -1;
  }

  // The offset of the one word in [from, to) in which two records differ, or -1.
  int64_t find_difference(const py::object& a, const py::object& b, int64_t from, int64_t to) const {
    int64_t found = -1;
    for (int64_t offset = from; offset < to; offset += 8) {
      if (at<uint64_t>(record(a.ptr()), offset) == at<uint64_t>(record(b.ptr()), offset)) continue;
      if (found >= 0) return -1;
      found = offset;
    }
    return found;
  }

  // Fills the fields from what Python and DLPack say of a few tensors.
  bool locate(py::handle torch) {
    const auto integer = [](const py::object& o) { return o.cast<uint64_t>(); };
    const py::object zeros = torch.attr("zeros");
    const py::object slice = zeros(py::make_tuple(5, 7)).attr("__getitem__")(py::slice(1, 5, 1));
    const py::object owner = slice.attr("untyped_storage")();
    impl = find(slice.ptr(), sizeof(PyObject), Py_TYPE(slice.ptr())->tp_basicsize, integer(slice.attr("_cdata")));
    if (impl < 0) return false;
    const char* tensor = record(slice.ptr());

    dlpack::Tensor raw;
    if (api->from_object(slice.ptr(), &raw) != 0) return PyErr_Clear(), false;
    const int64_t sizes = reinterpret_cast<const char*>(raw.shape) - tensor;
    const int64_t strides = reinterpret_cast<const char*>(raw.strides) - tensor;
    if (sizes < 24 || sizes > 160 || strides != sizes + 8 * Signature::kInlineDims) return false;
    shape = sizes - 8;
    if (at<uint64_t>(tensor, shape) != 2) return false;

    // Behind the strides: offset, number of elements, dtype and device, keys. The dtype is what differs between two
    // tensors that differ in nothing else; the keys, between a tensor and its negative view.
    const int64_t behind = strides + 8 * Signature::kInlineDims;
    offset = find(tensor, behind, behind + 32, 7);
    dtype = find_difference(zeros(3), zeros(3, py::arg("dtype") = torch.attr("bfloat16")), behind, behind + 32);
    if (offset < 0 || dtype < 0) return false;
    const py::object z = zeros(2, py::arg("dtype") = torch.attr("complex64"));
    keys = find_difference(z.attr("imag"), z.attr("conj")().attr("imag"), dtype + 8, behind + 32);
    if (keys < 0) return false;

    storage = find(tensor, 8, shape, integer(owner.attr("_cdata")));
    if (storage < 0) return false;
    const char* memory = at<const char*>(tensor, storage);
    data = find(memory, 8, 40, integer(owner.attr("data_ptr")()));
    if (data < 0) return false;
    // Beside the address lie the deleter, the same for all of torch's own memory, and its argument, which never is.
    const py::object another = zeros(3);
    const char* elsewhere = at<const char*>(record(another.ptr()), storage);
    const bool first = at<uint64_t>(memory, data + 8) == at<uint64_t>(elsewhere, data + 8);
    const bool second = at<uint64_t>(memory, data + 16) == at<uint64_t>(elsewhere, data + 16);
    deleter = data + (first ? 8 : 16);
    return first != second;
  }

  // Changes tensors in every way there is to change one in place; each must be noticed.
  bool test(py::handle torch) {
    const py::object empty = torch.attr("empty");
    const auto fresh = [&] { return empty(py::make_tuple(4, 6)); };
    const auto notices = [&](auto&& change) {
      py::object t = fresh();
      TensorView view;
      std::string why;
      if (!read_tensor(t.ptr(), &view, &why)) return false;
      const Signature* signature = Signature::of(t.ptr(), view);
      std::byte* address = nullptr;
      if (!signature || !signature->matches(t.ptr(), &address) || address != view.data) return false;
      py::object keep = change(t);
      return !signature->matches(t.ptr(), &address) || address != view.data;
    };
    const py::object other = fresh();
    const py::object foreign =
        torch.attr("frombuffer")(py::bytearray(std::string(96, 0)), py::arg("dtype") = torch.attr("float32"));
    bool ok = notices([&](py::object t) {
      t.attr("data") = other;
      return other;
    });
    ok = ok && notices([&](py::object t) {
           t.attr("data") = t.attr("t")();
           return other;
         });
    ok = ok && notices([&](py::object t) {
           t.attr("data") = t.attr("__getitem__")(1);
           return other;
         });
    ok = ok && notices([&](py::object t) {
           t.attr("data") = t.attr("bfloat16")();
           return other;
         });
    ok = ok && notices([&](py::object t) {
           t.attr("data") = t.attr("int")();
           return other;
         });
    ok = ok && notices([&](py::object t) { return t.attr("set_")(foreign); });
    ok = ok && notices([&](py::object t) { return t.attr("resize_")(2, 3); });
    ok = ok && notices([&](py::object t) { return t.attr("t_")(); });
    ok = ok && notices([&](py::object t) { return t.attr("unsqueeze_")(0); });
    ok = ok && notices([&](py::object t) { return t.attr("as_strided_")(py::make_tuple(4, 6), py::make_tuple(6, 0)); });
    ok = ok && notices([&](py::object t) { return t.attr("untyped_storage")().attr("resize_")(1 << 20); });
    return ok;
  }
};

static SignatureLayout layout;

bool Signature::available() { return layout.found && layout.enabled; }
void Signature::set_enabled(bool enabled) { layout.enabled = enabled; }

const Signature* Signature::of(PyObject* tensor, const TensorView& view) {
  if (!layout.found || view.ndim > kInlineDims) return nullptr;
  const char* record = layout.record(tensor);
  const char* memory = SignatureLayout::at<const char*>(record, layout.storage);
  if (!memory) return nullptr;
  Signature s;
  std::memcpy(s.shape_, record + layout.shape, sizeof s.shape_);
  s.dtype_and_device_ = SignatureLayout::at<uint64_t>(record, layout.dtype) & SignatureLayout::kDtypeAndDevice;
  s.keys_ = SignatureLayout::at<uint64_t>(record, layout.keys);
  s.deleter_ = SignatureLayout::at<uint64_t>(memory, layout.deleter);
  s.itemsize_ = view.itemsize() * (view.is_complex ? 2 : 1);
  std::byte* address;
  if (!s.matches(tensor, &address) || address != view.data) return nullptr;

  // As many as there are different shapes; kept for the life of the process.
  static auto* pool = new std::map<std::string, Signature>;
  const std::string key(reinterpret_cast<const char*>(&s), sizeof s);
  return &pool->emplace(key, s).first->second;
}

Signature::Hint Signature::hint(PyObject* tensor) {
  if (!layout.found) return {};
  const char* record = layout.record(tensor);
  return {reinterpret_cast<const char*>(tensor), record, SignatureLayout::at<const char*>(record, layout.storage)};
}

void Signature::Hint::prefetch() const {
  __builtin_prefetch(object);
  __builtin_prefetch(record);
  __builtin_prefetch(record + 64);
  __builtin_prefetch(record + 128);
  __builtin_prefetch(memory);
}

bool Signature::matches(PyObject* tensor, std::byte** data) const {
  if (!is_tensor(tensor)) return false;
  const char* record = layout.record(tensor);
  const char* memory = SignatureLayout::at<const char*>(record, layout.storage);
  uint64_t difference = memory == nullptr;
  for (int i = 0; i < kShapeWords; ++i)
    difference |= shape_[i] ^ SignatureLayout::at<uint64_t>(record, layout.shape + 8 * i);
  difference |=
      (dtype_and_device_ ^ SignatureLayout::at<uint64_t>(record, layout.dtype)) & SignatureLayout::kDtypeAndDevice;
  difference |= keys_ ^ SignatureLayout::at<uint64_t>(record, layout.keys);
  if (difference) return false;
  *data = SignatureLayout::at<std::byte*>(memory, layout.data) +
          SignatureLayout::at<int64_t>(record, layout.offset) * itemsize_;
  return SignatureLayout::at<uint64_t>(memory, layout.deleter) == deleter_;
}

namespace {

// torch::autograd::impl::bump_version(const at::Tensor&), the C++ function behind torch._C._increment_version: 3 ns
// instead of 45. A tensor's Python object holds the at::Tensor it takes. Used only if found and seen to work.
using BumpVersion = void (*)(const void* tensor);
BumpVersion bump_version = nullptr;

void find_bump_version(py::handle torch) {
  if (!layout.found) return;
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return;
  const auto candidate =
      reinterpret_cast<BumpVersion>(dlsym(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));
  dlclose(library);
  if (!candidate) return;
  const py::object t = torch.attr("zeros")(3);
  const int64_t before = t.attr("_version").cast<int64_t>();
  candidate(reinterpret_cast<const char*>(t.ptr()) + layout.impl);
  if (t.attr("_version").cast<int64_t>() == before + 1) bump_version = candidate;
}

}  // namespace

void bump_versions(PyObject* const* tensors, size_t count) {
  if (bump_version && layout.enabled) {
    for (size_t i = 0; i < count; ++i) bump_version(reinterpret_cast<const char*>(tensors[i]) + layout.impl);
    return;
  }
  py::list list(count);
  for (size_t i = 0; i < count; ++i) list[i] = py::reinterpret_borrow<py::object>(tensors[i]);
  py::reinterpret_borrow<py::object>(increment_version)(list);
}

void bind_torch(py::handle torch) {
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
  increment_version = py::object(torch.attr("_C").attr("_increment_version")).release().ptr();

  layout.found = layout.locate(torch);
  layout.found = layout.found && layout.test(torch);
  find_bump_version(torch);
}

}  // namespace fusedopt
