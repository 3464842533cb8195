#include "records.h"

#include <dlfcn.h>

#include <map>
#include <string>

namespace fusedopt {
namespace records {

Offsets at{};
bool found = false, enabled = true;

void set_enabled(bool value) { enabled = value; }

namespace {

PyObject* increment_version = nullptr;  // torch._C._increment_version

// torch::autograd::impl::bump_version(const at::Tensor&), the C++ function behind it: 3 ns instead of 45. A tensor's
// Python object holds the at::Tensor it takes. Used only if found and seen to work.
using BumpVersion = void (*)(const void* tensor);
BumpVersion bump_version = nullptr;

// The offset of the first word equal to `value` in [from, to), or -1.
int64_t find_word(const char* base, int64_t from, int64_t to, uint64_t value) {
  for (int64_t offset = from; offset < to; offset += 8) {
    if (load<uint64_t>(base, offset) == value) return offset;
  }
  return -1;
}

// The offset of the one word in [from, to) for which `differ` holds, or -1.
template <class Differ>
int64_t find_the_one(int64_t from, int64_t to, Differ differ) {
  int64_t one = -1;
  for (int64_t offset = from; offset < to; offset += 8) {
    if (!differ(offset)) continue;
    if (one >= 0) return -1;
    one = offset;
  }
  return one;
}

// torch.zeros on the CPU, whatever the default device.
py::object cpu_zeros(py::handle torch) {
  return py::module_::import("functools").attr("partial")(torch.attr("zeros"), py::arg("device") = "cpu");
}

uint64_t integer(const py::object& o) { return o.cast<uint64_t>(); }

// Fills the offsets from what Python and DLPack say of a few tensors.
bool locate(py::handle torch) {
  const py::object zeros = cpu_zeros(torch), parameter = torch.attr("nn").attr("Parameter");
  const py::object slice = zeros(py::make_tuple(5, 7)).attr("__getitem__")(py::slice(1, 5, 1));
  const py::object storage = slice.attr("untyped_storage")();
  at.record = find_word(reinterpret_cast<const char*>(slice.ptr()), sizeof(PyObject),
                        Py_TYPE(slice.ptr())->tp_basicsize, integer(slice.attr("_cdata")));
  if (at.record < 0) return false;
  const char* record = of(slice.ptr());

  dlpack::Tensor raw;
  if (read_dlpack(slice.ptr(), &raw) != 0) return PyErr_Clear(), false;
  const int64_t sizes = reinterpret_cast<const char*>(raw.shape) - record;
  const int64_t strides = reinterpret_cast<const char*>(raw.strides) - record;
  if (sizes < 24 || sizes > 160 || strides != sizes + 8 * kInlineDims) return false;
  at.shape = sizes - 8;
  if (load<uint64_t>(record, at.shape) != 2) return false;

  // Behind the strides: offset, number of elements, dtype and device, keys. The dtype is what differs between two
  // tensors that differ in nothing else; the keys, between a tensor and its negative view.
  const int64_t behind = strides + 8 * kInlineDims;
  const auto differ_in = [](const py::object& a, const py::object& b) {
    return [a, b](int64_t i) { return load<uint64_t>(of(a.ptr()), i) != load<uint64_t>(of(b.ptr()), i); };
  };
  at.offset = find_word(record, behind, behind + 32, 7);
  at.dtype =
      find_the_one(behind, behind + 32, differ_in(zeros(3), zeros(3, py::arg("dtype") = torch.attr("bfloat16"))));
  if (at.offset < 0 || at.dtype < 0) return false;
  const py::object z = zeros(2, py::arg("dtype") = torch.attr("complex64"));
  at.keys = find_the_one(at.dtype + 8, behind + 32, differ_in(z.attr("imag"), z.attr("conj")().attr("imag")));
  if (at.keys < 0) return false;

  at.storage = find_word(record, 8, at.shape, integer(storage.attr("_cdata")));
  if (at.storage < 0) return false;
  const char* memory = load(record, at.storage);
  at.address = find_word(memory, 8, 40, integer(storage.attr("data_ptr")()));
  if (at.address < 0) return false;
  // Beside the address lie the deleter, the same for all of torch's own memory, and its argument, which never is.
  const py::object another = zeros(3);
  const char* elsewhere = load(of(another.ptr()), at.storage);
  at.deleter = find_the_one(at.address + 8, at.address + 24,
                            [&](int64_t i) { return load<uint64_t>(memory, i) == load<uint64_t>(elsewhere, i); });
  if (at.deleter < 0) return false;

  // Autograd's record: null in a plain tensor, not in a parameter.
  const py::object p = parameter(zeros(3)), without = parameter(zeros(3)), g = zeros(3);
  p.attr("grad") = g;
  at.autograd = find_the_one(8, at.shape, [&](int64_t i) {
    return i != at.storage && load<uint64_t>(of(g.ptr()), i) == 0 && load<uint64_t>(of(p.ptr()), i) != 0;
  });
  if (at.autograd < 0 || !load(of(without.ptr()), at.autograd)) return false;
  at.grad = find_word(load(of(p.ptr()), at.autograd), 8, 96, integer(g.attr("_cdata")));
  if (at.grad < 0) return false;
  at.no_grad = load(load(of(without.ptr()), at.autograd), at.grad);
  return true;
}

// Changes tensors in every way there is to change one in place; each must be noticed.
bool notices_changes(py::handle torch) {
  const auto fresh = [&] { return cpu_zeros(torch)(py::make_tuple(4, 6)); };
  const auto notices = [&](auto&& change) {
    py::object t = fresh();
    TensorView view;
    std::string why;
    if (!read_tensor(t.ptr(), &view, &why)) return false;
    const Signature* signature = Signature::of(t.ptr(), view);
    std::byte* address = nullptr;
    if (!signature || !signature->matches(of(t.ptr()), &address) || address != view.data) return false;
    const py::object kept = change(t);
    return !signature->matches(of(t.ptr()), &address) || address != view.data;
  };
  const auto set_data = [&](auto&& make) {
    return notices([&](py::object t) {
      const py::object data = make(t);
      t.attr("data") = data;
      return data;
    });
  };
  bool ok = set_data([&](py::object) { return fresh(); });
  ok = ok && set_data([&](py::object t) { return t.attr("t")(); });
  ok = ok && set_data([&](py::object t) { return t.attr("__getitem__")(1); });
  ok = ok && set_data([&](py::object t) { return t.attr("bfloat16")(); });
  ok = ok && set_data([&](py::object t) { return t.attr("int")(); });
  ok = ok && notices([&](py::object t) { return t.attr("set_")(fresh()); });
  ok = ok && notices([&](py::object t) { return t.attr("resize_")(2, 3); });
  ok = ok && notices([&](py::object t) { return t.attr("t_")(); });
  ok = ok && notices([&](py::object t) { return t.attr("unsqueeze_")(0); });
  ok = ok && notices([&](py::object t) { return t.attr("as_strided_")(py::make_tuple(4, 6), py::make_tuple(6, 0)); });
  ok = ok && notices([&](py::object t) { return t.attr("untyped_storage")().attr("resize_")(1 << 20); });
  return ok;
}

// Gradients come, go and are replaced; the record must be that of `.grad` each time.
bool follows_gradients(py::handle torch) {
  const py::object zeros = cpu_zeros(torch), p = torch.attr("nn").attr("Parameter")(zeros(3));
  const py::object view = zeros(6).attr("__getitem__")(py::slice(0, 3, 1));
  const auto follows = [](const py::object& t) {
    const py::object grad = t.attr("grad");
    return of_grad(t.ptr()) == (grad.is_none() ? nullptr : of(grad.ptr()));
  };
  bool ok = follows(p) && follows(zeros(3));
  p.attr("grad") = zeros(3);
  ok = ok && follows(p);
  p.attr("grad") = view;
  ok = ok && follows(p);
  p.attr("grad") = py::none();
  ok = ok && follows(p);
  p.attr("sum")().attr("backward")();
  ok = ok && follows(p) && of_grad(p.ptr());
  view.attr("grad") = zeros(3);
  ok = ok && follows(view);
  return ok;
}

void find_bump_version(py::handle torch) {
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return;
  const auto candidate =
      reinterpret_cast<BumpVersion>(dlsym(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));
  dlclose(library);
  if (!candidate) return;
  const py::object t = cpu_zeros(torch)(3);
  const int64_t before = t.attr("_version").cast<int64_t>();
  candidate(reinterpret_cast<const char*>(t.ptr()) + at.record);
  if (t.attr("_version").cast<int64_t>() == before + 1) bump_version = candidate;
}

}  // namespace

void find(py::handle torch) {
  increment_version = py::object(torch.attr("_C").attr("_increment_version")).release().ptr();
  try {
    found = locate(torch);
    found = found && notices_changes(torch) && follows_gradients(torch);
    if (found) find_bump_version(torch);
  } catch (py::error_already_set&) {
    found = false;
  }
}

void bump_versions(PyObject* const* tensors, size_t count) {
  if (bump_version && enabled) {
    for (size_t i = 0; i < count; ++i) bump_version(reinterpret_cast<const char*>(tensors[i]) + at.record);
    return;
  }
  py::list list(count);
  for (size_t i = 0; i < count; ++i) list[i] = py::reinterpret_borrow<py::object>(tensors[i]);
  py::reinterpret_borrow<py::object>(increment_version)(list);
}

}  // namespace records

const Signature* Signature::of(PyObject* tensor, const TensorView& view) {
  using namespace records;
  if (!found || view.ndim > kInlineDims) return nullptr;
  const char* record = records::of(tensor);
  const char* storage = load(record, at.storage);
  if (!storage) return nullptr;
  Signature s;
  std::memcpy(s.shape_, record + at.shape, sizeof s.shape_);
  s.dtype_and_device_ = load<uint64_t>(record, at.dtype) & kDtypeAndDevice;
  s.keys_ = load<uint64_t>(record, at.keys);
  s.deleter_ = load<uint64_t>(storage, at.deleter);
  s.itemsize_ = view.itemsize() * (view.is_complex ? 2 : 1);
  std::byte* address;
  if (!s.matches(record, &address) || address != view.data) return nullptr;

  // As many as there are different shapes; kept for the life of the process.
  static auto* pool = new std::map<std::string, Signature>;
  const std::string key(reinterpret_cast<const char*>(&s), sizeof s);
  return &pool->emplace(key, s).first->second;
}

}  // namespace fusedopt
