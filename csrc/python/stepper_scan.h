// What Stepper knows of a parameter, and what one step gathers: for stepper*.cpp alone.
#pragma once

#include <cstring>

#include "stepper.h"

namespace fusedopt {

// What is known of one parameter from the last step that used it.
struct Stepper::Entry {
  PyObject* param = nullptr;  // borrowed: compared, never followed
  uint32_t group = 0, index = 0;
  int8_t variant = 0, num_states = 0, num_streams = 0;  // the rule's states; all streams
  DType dtype = DType::kFloat32;                        // of all streams, or kMixed
  Part part = Part::kNone;                              // of this step
  Part known = Part::kNone;                             // what it was read for
  bool has_ema = false, is_complex = false;
  bool in_memory = false;
  bool step_is_double = false;
  bool step_on_device = false;
  bool is_sparse = false;       // the gradient, of which sparse_ knows more
  bool is_distributed = false;  // a DTensor, as its state is; what is known is of the parts that are here
  int16_t device = kCpu;
  // Positions for PyDict_Next: of the parameter in the optimizer's state, of the tensors in the parameter's.
  int32_t state_at = 0, step_at = 0, item_at[kMaxStreams - kState] = {};

  const Signature* signature[kMaxStreams] = {};
  const Signature* step_signature = nullptr;
  std::byte* step = nullptr;
  int64_t grad_bytes = 0;          // from the gradient's first element to behind its last
  std::unique_ptr<Layout> layout;  // of what is written
  std::unique_ptr<Form> form;      // null of a plain one
  WrittenMemory::Gap gap;
  // Of a DTensor: where its parts are, and of its gradient, if these are there too.
  py::object spec, grad_spec;

  double step_count() const {
    double d;
    float f;
    if (step_is_double) return std::memcpy(&d, step, sizeof d), d;
    return std::memcpy(&f, step, sizeof f), f;
  }
  // In the dtype that holds it, as torch's `step += 1`.
  double next_step_count() const {
    return step_is_double ? step_count() + 1 : static_cast<float>(static_cast<float>(step_count()) + 1.0f);
  }
  void set_step_count(double value) {
    const float f = static_cast<float>(value);
    if (step_is_double) {
      std::memcpy(step, &value, sizeof value);
    } else {
      std::memcpy(step, &f, sizeof f);
    }
  }
};

// No garbage collection while borrowed pointers are in use: a collection runs users' code. Nests, also across threads.
class NoCollection {
 public:
  NoCollection() {
    if (depth_++ == 0) was_enabled_ = PyGC_Disable();
  }
  ~NoCollection() {
    if (--depth_ == 0 && was_enabled_) PyGC_Enable();
  }
  NoCollection(const NoCollection&) = delete;

 private:
  static inline int depth_ = 0, was_enabled_ = 0;  // guarded by the GIL
};

class Held {
 public:
  ~Held() {
    for (PyObject* object : objects_) Py_DECREF(object);
  }
  void reserve(size_t n) { objects_.reserve(n); }
  void take(PyObject* object) { objects_.push_back(object); }  // steals the reference
  void keep(PyObject* object) { take(Py_NewRef(object)); }

 private:
  std::vector<PyObject*> objects_;
};

// Reads a one-element tensor that GradScaler left on the optimizer.
inline TensorView read_scalar(const py::object& tensor, const std::string& optimizer, const char* what) {
  TensorView view;
  std::string why;
  if (!read_number(tensor.ptr(), &view, &why)) throw std::runtime_error(optimizer + ": " + what + " " + why);
  if (view.dtype != DType::kFloat32)
    throw std::runtime_error(optimizer + ": " + what + " must be a one-element torch.float32 tensor");
  return view;
}

// The next entry of a dict at a position noted earlier, if it still has that key.
inline PyObject* value_at(PyObject* dict, Py_ssize_t position, PyObject* key) {
  PyObject *found, *value;
  return PyDict_Next(dict, &position, &found, &value) && found == key ? value : nullptr;
}

// The value of a key and its position, which is `hint` if the keys are asked for in their order.
inline PyObject* find_value(PyObject* dict, PyObject* key, Py_ssize_t hint, int32_t* at) {
  PyObject* value = value_at(dict, hint, key);
  if (value) return *at = static_cast<int32_t>(hint), value;
  value = PyDict_GetItemWithError(dict, key);
  if (!value) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return nullptr;
  }
  Py_ssize_t position = 0, before = 0;
  PyObject *found, *other;
  while (PyDict_Next(dict, &position, &found, &other) && other != value) before = position;
  return *at = static_cast<int32_t>(before), value;
}

class Stepper::Busy {
 public:
  explicit Busy(Stepper* stepper) : flag_(stepper->busy_) {
    if (flag_)
      throw std::runtime_error(stepper->optimizer_ + ": step() is already running, in another thread or from a hook");
    flag_ = true;
  }
  ~Busy() { flag_ = false; }
  Busy(const Busy&) = delete;

 private:
  bool& flag_;
};

// What one call of step() gathers.
class Stepper::Scan {
 public:
  py::list groups;
  py::dict state;
  Context context;
  // GradScaler's tensors, if they are on a device, or None; their copies on other devices.
  py::object grad_scale = py::none(), found_inf = py::none();
  float* report_inf = nullptr;
  py::object report = py::none();  // the tensor that it lies in
  int report_device = kCpu;
  bool wants_norm = false;
  bool has_averages = false, averages = false;  // an option says so; a GPU has some to move
  bool is_update_of_reporting = false;          // update_captured() of a step that told GradScaler what it found
  bool adds_up = false;                         // a norm, over processes
  bool has_same_states = false;                 // no parameter can have got a state since the last scan
  bool amp_on_device = false;
  std::vector<py::object> moved_scalars;
  struct List {
    PyObject* params;
    size_t first;  // the entry of its first parameter
  };
  std::vector<int> variants;       // of each group
  std::vector<double> ema_decays;  // of each group, -1 if it has none
  std::vector<Precision> precisions;
  std::vector<List> lists;         // of each group
  std::vector<PyObject*> written;  // the parameters of this step
  std::vector<Dirty> dirty;
  std::vector<size_t> moved_grads;
  // Parameters whose state this step made, and what was there before, null or an empty dict: put back if it fails.
  std::vector<std::pair<PyObject*, PyObject*>> made_state;
  std::unordered_map<PyObject*, PyObject*> redistributed;  // gradients that were placed otherwise: held
  std::vector<PyObject*> made_averages;                    // states that got an average in this step
  int64_t cost = 0;
  bool memory_changed = false;
  // References to every gradient and all state are held, so that the GIL may be released. A step of little work keeps
  // the GIL instead: its gradients' Python objects would cost more than the work.
  bool hold = true;
  Held held;

  bool has_ema(size_t group) const { return ema_decays[group] >= 0; }
  void begin() {
    variants.clear();
    ema_decays.clear();
    precisions.clear();
    lists.clear();
    written.clear();
    dirty.clear();
    moved_grads.clear();
    cost = 0;
  }
  // Holds the part of a tensor that is here.
  PyObject* hold_part(PyObject* tensor) {
    PyObject* part = local_part(tensor);
    if (is_plain_tensor(part)) return held.keep(part), part;
    // A collective's result, which may be on its way; or no DTensor at all.
    if (!is_distributed(tensor)) return tensor;
    const py::object arrived = py::module_::import("fusedopt._sharding").attr("local")(py::handle(tensor));
    return held.keep(arrived.ptr()), arrived.ptr();
  }
  // The gradient's Python object, None if there is none.
  PyObject* hold_grad(PyObject* param) {
    PyObject* grad = get_grad(param);
    if (!grad) throw py::error_already_set();
    held.take(grad);
    return grad;
  }

  ~Scan() {
    for (auto made = made_state.rbegin(); made != made_state.rend(); ++made) {
      const auto [param, before] = *made;
      const int failed = before ? PyObject_SetItem(state.ptr(), param, before) : PyObject_DelItem(state.ptr(), param);
      if (failed) PyErr_Clear();
    }
    for (PyObject* param_state : made_averages) {
      if (PyDict_DelItem(param_state, str_ema) != 0) PyErr_Clear();
    }
  }
  PyObject* str_ema = nullptr;
  // Runs kernels. A step of little work keeps the GIL, and so all that it has not taken references to.
  template <class Run>
  void without_gil(Run run) const {
    if (!hold) return run();
    py::gil_scoped_release release;
    run();
  }
  void keep_state() {
    made_state.clear();
    made_averages.clear();
  }
};

}  // namespace fusedopt
