#include "stepper.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../cpu/float_mode.h"
#include "../cpu/run.h"
#include "../cpu/target.h"

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
  bool is_sparse = false;  // the gradient, of which sparse_ knows more
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

namespace {

// Elements of cost, about half a millisecond: more than this runs without the GIL.
constexpr int64_t kReleaseCost = 1 << 20;
// Parameters that a thread looks at in one go, some 10 microseconds.
constexpr int64_t kLookUnit = 64;

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
TensorView read_scalar(const py::object& tensor, const std::string& optimizer, const char* what) {
  TensorView view;
  std::string why;
  if (!read_number(tensor.ptr(), &view, &why)) throw std::runtime_error(optimizer + ": " + what + " " + why);
  if (view.dtype != DType::kFloat32)
    throw std::runtime_error(optimizer + ": " + what + " must be a one-element torch.float32 tensor");
  return view;
}

// The next entry of a dict at a position noted earlier, if it still has that key.
PyObject* value_at(PyObject* dict, Py_ssize_t position, PyObject* key) {
  PyObject *found, *value;
  return PyDict_Next(dict, &position, &found, &value) && found == key ? value : nullptr;
}

// The value of a key and its position, which is `hint` if the keys are asked for in their order.
PyObject* find_value(PyObject* dict, PyObject* key, Py_ssize_t hint, int32_t* at) {
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

}  // namespace

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
  int report_device = kCpu;
  bool wants_norm = false;
  bool has_averages = false, averages = false;  // an option says so; a GPU has some to move
  bool is_update_of_reporting = false;          // update_captured() of a step that told GradScaler what it found
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
  std::vector<PyObject*> made_averages;  // states that got an average in this step
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

Stepper::Stepper(const std::string& rule, std::string optimizer)
    : rule_(make_rule_driver(Rules{}, rule)),
      optimizer_(std::move(optimizer)),
      str_step_(PyUnicode_InternFromString("step")),
      str_params_(PyUnicode_InternFromString("params")),
      str_ema_(PyUnicode_InternFromString("ema")),
      str_scales_(PyUnicode_InternFromString("scales")) {
  static constexpr const char* kCompanions[] = {"", "master_param", "param_remainder", "compensation"};
  for (int k = 0; k < 4; ++k) str_companions_[k] = PyUnicode_InternFromString(kCompanions[k]);
  for (int k = 0; k < rule_->max_states(); ++k) state_names_[k] = PyUnicode_InternFromString(rule_->state_name(k));
}

Stepper::~Stepper() {
  for (auto& known : tables_) {
    try {
      const TorchDevice current(known->device);
      known.reset();
    } catch (py::error_already_set&) {
      known.reset();  // torch is gone, the process is ending
    }
  }
}

ParamName Stepper::name(const Entry& entry, const Scan& scan) const {
  return {optimizer_.c_str(), entry.group, entry.index, PyList_GET_ITEM(scan.groups.ptr(), entry.group)};
}

// Without a look at the entry, which costs a cache line, where none ever was.
bool Stepper::is_sparse(size_t n) const { return !sparse_.empty() && entries_[n].is_sparse; }

const TensorRow& Stepper::written_row(size_t n) const {
  if (!averages_.empty() && entries_[n].known == Part::kAverage) return averages_.at(n).row;
  return is_sparse(n) ? sparse_.at(n).written : rows_[n];
}
const TensorRow& Stepper::grad_row(size_t n) const { return is_sparse(n) ? sparse_.at(n).grad_memory : rows_[n]; }

PyObject* Stepper::state_name(const Entry& entry, int k) const {
  const bool is_average = entry.known == Part::kAverage;  // of which the average is the state
  if (k < entry.num_states) return is_average ? str_ema_ : state_names_[k];
  if (!is_average && entry.has_ema && k == entry.num_streams - kState - 1) return str_ema_;
  if (entry.form->is_coded() && k == entry.num_states) return str_scales_;
  return str_companions_[static_cast<int>(entry.form->companion)];
}

// Is nothing about the parameter and its state other than at its last step?
bool Stepper::unchanged(const Entry& entry, const TensorRow& row, PyObject* param, Scan* scan) const {
  if (entry.param != param || !entry.signature[kParam] || entry.has_ema != scan->has_ema(entry.group)) return false;
  if (entry.known == Part::kStep && entry.variant != scan->variants[entry.group]) return false;
  std::byte* data;
  const auto still = [&](const Signature* signature, PyObject* tensor, const std::byte* where) {
    if (!tensor || !is_tensor(tensor) || !signature->matches(records::of(tensor), &data) || data != where) return false;
    if (scan->hold) scan->held.keep(tensor);
    return true;
  };
  if (!still(entry.signature[kParam], param, row.data[kParam])) return false;

  PyObject* param_state = value_at(scan->state.ptr(), entry.state_at, param);
  if (!param_state || !PyDict_Check(param_state)) return false;
  if (!still(entry.step_signature, value_at(param_state, entry.step_at, str_step_), entry.step)) return false;
  for (int k = 0; k < entry.num_streams - kState; ++k) {
    PyObject* tensor = value_at(param_state, entry.item_at[k], state_name(entry, k));
    if (!still(entry.signature[kState + k], tensor, row.data[kState + k])) return false;
  }
  return true;
}

// The quick way: kChanged sends the parameter to refresh(). May run on several threads, if no references are held.
// `grad` takes the gradient where its Python object was needed.
Stepper::Look Stepper::look(size_t n, size_t group, size_t index, PyObject* param, Scan* scan, PyObject** grad) {
  Entry& entry = entries_[n];
  TensorRow& row = rows_[n];
  // What does not change is not written: its cache line would leave the other thread's processor.
  const auto takes = [&](Part part) {
    if (entry.part != part) entry.part = part;
    if (part != Part::kStep && row.scalars) row.scalars = nullptr;
  };
  const auto without_grad = [&] {
    if (!scan->has_ema(group)) return takes(Part::kNone), Look::kSitsOut;
    takes(Part::kAverage);
    if (grad) *grad = Py_None;
    if (entry.known == Part::kNone && entry.param == param && scan->has_same_states)
      return takes(Part::kNone), Look::kSitsOut;
    const bool same = entry.known == Part::kStep      ? unchanged(entry, row, param, scan)
                      : entry.known == Part::kAverage ? unchanged(entry, averages_.at(n).row, param, scan)
                                                      : false;
    return same ? Look::kUnchanged : Look::kChanged;
  };
  if (entry.group != group || entry.index != index) {
    entry.param = nullptr;
    entry.group = group;
    entry.index = index;
  }
  const char* grad_record = nullptr;
  if (records::available() && is_plain_tensor(param)) {
    grad_record = records::of_grad(param);
    if (!grad_record) return without_grad();
    if (scan->hold) *grad = scan->hold_grad(param);
  } else {
    if (!scan->hold) return Look::kChanged;
    if (!is_tensor(param)) fail(name(entry, *scan), "the parameter", "is not a tensor");
    *grad = scan->hold_grad(param);
    if (*grad == Py_None) return without_grad();
    if (records::available() && is_tensor(*grad)) grad_record = records::of(*grad);
  }
  takes(Part::kStep);
  std::byte* data;
  if (!grad_record || entry.known != Part::kStep || !unchanged(entry, row, param, scan)) return Look::kChanged;
  if (!entry.signature[kGrad]->matches(grad_record, &data)) return Look::kChanged;
  if (entry.device != kCpu && reinterpret_cast<uintptr_t>(data) % itemsize(row, entry.dtype, kGrad) != 0)
    return Look::kChanged;
  if (data != row.data[kGrad]) row.data[kGrad] = data;
  // Also where it has not moved: a scan that was begun anew may have noted the move, but nobody has looked at it.
  return entry.gap.holds(data, data + entry.grad_bytes) ? Look::kUnchanged : Look::kGradMoved;
}

// The form of a row of the moving average alone.
static Form average_form(Form form) {
  form.grad = form.param;
  form.state = form.ema;
  form.num_states = 1;
  form.stochastic_param = form.stochastic_state = false;
  if (form.companion == Companion::kCompensation) form.companion = Companion::kNone;  // of what is stored
  return form;
}

// Reads everything about a parameter anew. Without param_state only the parameter and its gradient are checked.
void Stepper::refresh(const Dirty& dirty, PyObject* param_state, Scan* scan) {
  Entry& entry = entries_[dirty.entry];
  TensorRow& row = rows_[dirty.entry];
  const ParamName who = name(entry, *scan);
  Streams streams;
  std::string why;
  const auto read = [&](int stream, PyObject* tensor, const std::string& what, bool may_be_lazy) -> PyObject* {
    if (!read_tensor(tensor, &streams.view[stream], &why, stream >= kState)) fail(who, what, why);
    if (is_lazy_view(tensor)) {
      if (!may_be_lazy) fail(who, what, "is a conjugate or negative view; call .resolve_conj().resolve_neg() on it");
      tensor = py::handle(tensor).attr("resolve_conj")().attr("resolve_neg")().release().ptr();
      scan->held.take(tensor);
      if (!read_tensor(tensor, &streams.view[stream], &why)) fail(who, what, why);
      return nullptr;
    }
    return tensor;
  };
  const auto must_be = [&](int stream, const std::string& what, DType dtype, bool is_complex) {
    const TensorView &got = streams.view[stream], &param = streams.view[kParam];
    if (got.device != param.device) {
      fail(who, what,
           "is on device '" + device_name(got.device) + "' but the parameter is on '" + device_name(param.device) +
               "'; move it there");
    }
    if (got.dtype == dtype && got.is_complex == is_complex) return;
    const std::string has = std::string("has dtype ") + dtype_name(got.dtype, got.is_complex);
    if (dtype == param.dtype && is_complex == param.is_complex)
      fail(who, what,
           has + " but the parameter has " + dtype_name(dtype, is_complex) +
               "; convert it to the parameter's dtype (nothing is cast silently)");
    fail(who, what,
         has + ", but with its group's master_weights, rounding and state_dtype it must have " +
             dtype_name(dtype, is_complex) + "; load_state_dict(..., convert=True) converts a whole state_dict");
  };
  const auto is_narrow = [](const TensorView& view) { return !view.is_complex && view.dtype != DType::kFloat64; };
  const auto must_have_same_type = [&](int stream, const std::string& what) {
    const TensorView &got = streams.view[stream], &param = streams.view[kParam];
    const bool may_differ = stream == kGrad && is_narrow(got) && is_narrow(param);
    must_be(stream, what, may_differ ? got.dtype : param.dtype, param.is_complex);
  };
  const auto must_match = [&](int stream, const std::string& what) {
    const TensorView &got = streams.view[stream], &param = streams.view[kParam];
    if (got.ndim != param.ndim || !std::equal(got.shape, got.shape + got.ndim, param.shape)) {
      fail(who, what, "has shape " + got.shape_string() + " but the parameter has " + param.shape_string());
    }
  };

  read(kParam, dirty.param, "the parameter", false);
  const bool inference = py::handle(dirty.param).attr("is_inference")().cast<bool>();
  if (inference && !py::module_::import("torch").attr("is_inference_mode_enabled")().cast<bool>())
    fail(who, "the parameter", "is an inference tensor and cannot be updated outside torch.inference_mode(); clone it");
  const TensorRow before = written_row(dirty.entry);
  const bool has_grad = dirty.grad != Py_None, has_ema = scan->has_ema(entry.group);
  const bool is_sparse = has_grad && is_tensor(dirty.grad) && py::handle(dirty.grad).attr("is_sparse").cast<bool>();
  SparseRow* const sparse = is_sparse ? &sparse_[dirty.entry] : nullptr;
  PyObject* grad = nullptr;
  if (is_sparse) {
    if (const char* problem = rule_->sparse_problem(entry.group))
      throw std::runtime_error(problem + std::string(" (") + who.text() + ")");
    for (py::object& part : sparse->read(dirty.grad, streams.view[kParam], rule_->ascends(entry.group), who))
      scan->held.take(part.release().ptr());
    streams.view[kGrad] = sparse->values();
    must_be(kGrad, "the gradient", streams.view[kParam].dtype, streams.view[kParam].is_complex);
  } else if (has_grad) {
    grad = read(kGrad, dirty.grad, "the gradient", true);
    must_have_same_type(kGrad, "the gradient");
    must_match(kGrad, "the gradient");
  } else {
    streams.view[kGrad] = streams.view[kParam];
  }
  const int variant = is_sparse ? rule_->sparse_variant() : scan->variants[entry.group];
  const int all_states = rule_->num_states(variant);
  auto form = std::make_unique<Form>();
  try {
    const Precision& precision = scan->precisions[entry.group];
    if (!find_form(precision, streams.view[kParam], streams.view[kGrad].dtype, all_states, dirty.entry, form.get()))
      form.reset();
  } catch (const std::runtime_error& error) {
    fail(who, "the parameter", error.what());
  }
  if (form && is_sparse)
    fail(
        who, "the gradient",
        "is sparse, and its group has master_weights, rounding or state_dtype, which are for dense ones: leave them at "
        "their defaults in a group of its own, or make the gradient dense");
  if (!param_state) return;

  entry.param = nullptr;
  entry.known = has_grad ? Part::kStep : Part::kAverage;
  const int num_states = has_grad ? all_states : 1;
  if (form && !has_grad) *form = average_form(*form);
  const bool is_coded = form && form->is_coded();
  const bool has_companion = form && form->companion != Companion::kNone;
  PyObject* tensors[kMaxStreams] = {dirty.param, grad};
  streams.count = kState + num_states + is_coded + has_companion + (has_grad && has_ema);
  entry.num_states = static_cast<int8_t>(num_states);
  entry.num_streams = static_cast<int8_t>(streams.count);
  entry.has_ema = has_ema;
  entry.form = std::move(form);
  const Form* const formed = entry.form.get();
  for (int k = 0; k < streams.count - kState; ++k) {
    PyObject* const key = state_name(entry, k);
    const std::string what = "state '" + py::handle(key).cast<std::string>() + "'";
    PyObject* tensor = find_value(param_state, key, 0, &entry.item_at[k]);
    if (!tensor)
      fail(who, what,
           "is missing: was the option that needs it switched on, or another optimizer's state "
           "loaded? Delete this parameter's state to begin anew");
    read(kState + k, tensor, what, false);
    const TensorView &got = streams.view[kState + k], &param = streams.view[kParam];
    must_be(kState + k, what, formed ? formed->dtype(kState + k) : param.dtype, param.is_complex);
    if (key == str_scales_) {
      const int64_t wanted[] = {param.ndim == 0 ? 1 : param.shape[0], formed->blocks_per_row(), num_states};
      if (got.ndim != 3 || !std::equal(wanted, wanted + 3, got.shape) || !got.is_contiguous())
        fail(who, what,
             "has shape " + got.shape_string() + ", not the (" + std::to_string(wanted[0]) + ", " +
                 std::to_string(wanted[1]) + ", " + std::to_string(wanted[2]) + "), contiguous, of its blocks");
      // Found by the block, not by strides: those of the parameter are in nobody's way.
      TensorView& scales = streams.view[kState + k];
      scales.ndim = param.ndim;
      scales.shape = param.shape;
      scales.strides = param.strides;
    } else {
      must_match(kState + k, what);
      if (got.dtype == DType::kCode && !got.is_contiguous()) fail(who, what, "must be contiguous");
    }
    tensors[kState + k] = tensor;
    scan->held.keep(tensor);
  }
  TensorView step;
  PyObject* step_tensor = find_value(param_state, str_step_, 0, &entry.step_at);
  if (!step_tensor) fail(who, "state 'step'", "is missing");
  if (!read_number(step_tensor, &step, &why)) fail(who, "state 'step'", why);
  if (step.dtype != DType::kFloat32 && step.dtype != DType::kFloat64) {
    fail(who, "state 'step'",
         std::string("must be torch.float32 or torch.float64, got ") + dtype_name(step.dtype, false));
  }
  scan->held.keep(step_tensor);
  const int device = streams.view[kParam].device;
  if (step.device != kCpu && step.device != device) {
    fail(who, "state 'step'",
         "is on device '" + device_name(step.device) + "' but the parameter is on '" + device_name(device) +
             "'; move it there, or to the CPU");
  }

  std::unique_ptr<Layout> layout;
  if (has_ema) {
    const int ema = has_grad ? streams.count - 1 : kState;
    plan_average(dirty.entry, streams, ema, formed);
    const Layout* planned = averages_.at(dirty.entry).layout.get();
    if (!has_grad && planned) layout = std::make_unique<Layout>(*planned);  // to be compared with
  }
  if (has_grad) {
    layout = is_sparse ? sparse->plan(streams, &row) : plan_row(streams, &row, !formed || !formed->draws());
    row.form = formed;
  }
  entry.is_sparse = is_sparse;
  entry.is_complex = streams.view[kParam].is_complex;
  const TensorRow& written = written_row(dirty.entry);
  bool moved = !entry.in_memory || !same_written_layout(entry.layout.get(), layout.get(), streams.count) ||
               entry.step != step.data || before.numel != written.numel || entry.variant != variant ||
               entry.dtype != (formed ? DType::kMixed : streams.view[kParam].dtype);
  for (int k = 0; k < streams.count; ++k) moved |= k != kGrad && before.data[k] != written.data[k];
  scan->memory_changed |= moved;
  refreshed_ = true;

  entry.param = dirty.param;
  entry.variant = variant;
  entry.dtype = formed ? DType::kMixed : streams.view[kParam].dtype;
  entry.layout = std::move(layout);
  entry.step = step.data;
  entry.step_is_double = step.dtype == DType::kFloat64;
  entry.step_on_device = step.device != kCpu;
  entry.device = static_cast<int16_t>(device);
  entry.step_signature = Signature::of(step_tensor, step);
  bool signed_all = entry.step_signature != nullptr && (grad != nullptr || !has_grad);
  for (int k = 0; k < streams.count; ++k) {
    entry.signature[k] = tensors[k] ? Signature::of(tensors[k], streams.view[k]) : nullptr;
    signed_all &= entry.signature[k] != nullptr || (k == kGrad && !has_grad);
  }
  // What may be updated depends on the mode for an inference tensor: never taken the quick way.
  if (!signed_all || inference || !records::available()) entry.signature[kParam] = nullptr;
  if (!has_grad) return;
  if (!is_sparse) row.layout = entry.layout.get();
  row.update = device == kCpu ? target_->find(rule_->id(), variant, entry.dtype) : nullptr;
  const std::byte *from, *to;
  const TensorRow& grad_memory = grad_row(dirty.entry);
  stream_extent(grad_memory, kGrad, entry.dtype, &from, &to);
  entry.grad_bytes = grad_memory.numel ? to - from : 0;
  if (!entry.gap.holds(from, to)) scan->moved_grads.push_back(dirty.entry);
}

// The row of the moving average alone: the average is its state.
void Stepper::plan_average(size_t n, const Streams& all, int ema, const Form* form) {
  AverageRow& average = averages_[n];
  Streams streams;
  streams.view[kParam] = streams.view[kGrad] = all.view[kParam];  // there is none: its place is not read
  streams.view[kState] = all.view[ema];
  streams.count = kState + 1;
  average.form.reset();
  if (form) {
    average.form = std::make_unique<Form>(average_form(*form));
    if (average.form->companion != Companion::kNone) streams.view[streams.count++] = all.view[form->companion_stream()];
  }
  average.row = {};
  average.layout = plan_row(streams, &average.row);
  average.row.layout = average.layout.get();
  average.row.form = average.form.get();
}

void Stepper::read_options(Scan* scan) {
  PyObject* groups = scan->groups.ptr();
  rule_->begin_step();
  phase_.begin();
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    if (!PyDict_Check(group)) throw py::type_error(optimizer_ + ": param_groups must be a list of dicts");
    scan->held.keep(group);
    phase_.read_group(group, optimizer_.c_str());
    scan->context.has_ema = phase_.has_ema();
    scan->context.ema_decay = phase_.ema_decay();
    scan->ema_decays.push_back(phase_.has_ema() ? phase_.ema_decay() : -1);
    scan->variants.push_back(rule_->read_group(group, optimizer_.c_str(), scan->context));
    scan->precisions.push_back(precision_.read_group(group, optimizer_.c_str(), static_cast<size_t>(g)));
  }
}

void Stepper::read_groups(Scan* scan) {
  // All options first: reading a number may run users' code, which must not meet a half-done scan.
  read_options(scan);
  if (precisions_ != scan->precisions) {
    for (Entry& entry : entries_) entry.param = nullptr;
    precisions_ = scan->precisions;
  }
  PyObject* groups = scan->groups.ptr();
  size_t n = 0;
  for (size_t g = 0; g < scan->variants.size() && g < static_cast<size_t>(PyList_GET_SIZE(groups)); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    if (!PyDict_Check(group)) throw py::type_error(optimizer_ + ": param_groups must be a list of dicts");
    PyObject* params = PyDict_GetItemWithError(group, str_params_);
    if (!params || !PyList_Check(params))
      throw py::type_error(optimizer_ + ": param_groups[" + std::to_string(g) + "]['params'] must be a list");
    scan->held.keep(params);
    scan->lists.push_back({params, n});
    n += PyList_GET_SIZE(params);
  }
  if (n == entries_.size()) return;
  const auto forget_behind = [n](auto* by_entry) {
    for (auto it = by_entry->begin(); it != by_entry->end();) it = it->first >= n ? by_entry->erase(it) : std::next(it);
  };
  forget_behind(&averages_);
  forget_behind(&sparse_);
  entries_.resize(n);
  rows_.resize(n);
  scan->memory_changed = true;  // it points to the rows
}

// Looks at all parameters on several threads, without a reference to anything. False if that was not enough: a
// parameter is new or changed, or there is enough work to release the GIL for.
bool Stepper::scan_quickly(Scan* scan, int max_threads) {
  looks_.resize(entries_.size());
  std::atomic<bool> changed{false};
  parallel_for(entries_.size(), kLookUnit, max_threads, [&](int64_t begin, int64_t end) {
    size_t g = scan->lists.size() - 1;
    while (scan->lists[g].first > static_cast<size_t>(begin)) --g;
    for (size_t n = begin; n < static_cast<size_t>(end) && !changed.load(std::memory_order_relaxed); ++n) {
      while (g + 1 < scan->lists.size() && scan->lists[g + 1].first <= n) ++g;
      const size_t index = n - scan->lists[g].first;
      looks_[n] = look(n, g, index, PyList_GET_ITEM(scan->lists[g].params, index), scan, nullptr);
      if (looks_[n] == Look::kChanged) changed = true;
    }
  });
  if (changed) return false;
  for (size_t n = 0; n < entries_.size(); ++n) {
    if (looks_[n] != Look::kSitsOut) take_part(n, entries_[n].param, looks_[n], scan);
  }
  return scan->cost <= kReleaseCost;
}

// Notes a parameter that takes part in the step.
void Stepper::take_part(size_t n, PyObject* param, Look found, Scan* scan) {
  if (entries_[n].part == Part::kStep) {
    scan->written.push_back(param);
    if (entries_[n].device == kCpu) scan->cost += rows_[n].numel;
  }
  scan->memory_changed |= !entries_[n].in_memory;
  if (found == Look::kGradMoved) scan->moved_grads.push_back(n);
}

// Looks at one parameter after the other and holds a reference to every gradient and all state.
void Stepper::scan_holding(Scan* scan) {
  for (size_t g = 0; g < scan->lists.size(); ++g) {
    PyObject* params = scan->lists[g].params;
    const size_t first = scan->lists[g].first;
    const size_t end = g + 1 < scan->lists.size() ? scan->lists[g + 1].first : entries_.size();
    for (size_t n = first; n < end; ++n) {
      // The gradient of a tensor subclass may be users' code, which can do anything.
      if (n - first >= static_cast<size_t>(PyList_GET_SIZE(params)))
        throw std::runtime_error(optimizer_ + ": param_groups[" + std::to_string(g) + "]['params'] shrank in step()");
      PyObject *param = PyList_GET_ITEM(params, n - first), *grad = nullptr;
      scan->held.keep(param);
      const Look found = look(n, g, n - first, param, scan, &grad);
      if (found == Look::kSitsOut) continue;
      take_part(n, param, found, scan);
      if (found == Look::kChanged) scan->dirty.push_back({n, param, grad});
    }
  }
}

// The form of a parameter that has been checked; without states if it is plain.
Form Stepper::form_of(const Dirty& dirty, const Scan& scan) const {
  const Entry& entry = entries_[dirty.entry];
  TensorView param, grad;
  std::string why;
  Form form;
  if (!read_tensor(dirty.param, &param, &why)) fail(name(entry, scan), "the parameter", why);
  const bool has_grad = dirty.grad != Py_None && !py::handle(dirty.grad).attr("is_sparse").cast<bool>();
  if (!has_grad || !read_tensor(dirty.grad, &grad, &why)) grad = param;
  const int num_states = rule_->num_states(scan.variants[entry.group]);
  if (!find_form(scan.precisions[entry.group], param, grad.dtype, num_states, dirty.entry, &form)) form.num_states = 0;
  return form;
}

// What state a parameter is to have, with dtypes if it is not plain.
py::list Stepper::names_of(const Form& form, int variant, bool wants_state, bool wants_ema) const {
  py::list names;
  const auto add = [&](PyObject* name, DType dtype) {
    const py::handle of(name);
    if (form.num_states == 0) return names.append(of);
    names.append(py::make_tuple(of, dtype_name(dtype, false) + std::strlen("torch.")));
  };
  if (wants_state) {
    names.append(py::handle(str_step_));
    for (int k = 0; k < rule_->num_states(variant); ++k) add(state_names_[k], form.state);
    if (form.is_coded()) add(str_scales_, DType::kFloat32);
    if (form.companion != Companion::kNone)
      add(str_companions_[static_cast<int>(form.companion)], form.dtype(form.companion_stream()));
  }
  if (wants_ema) add(str_ema_, form.ema);
  return names;
}

py::list Stepper::state_names(py::handle param, py::dict group) {
  rule_->begin_step();
  const int variant = rule_->read_group(group.ptr(), optimizer_.c_str(), {});
  TensorView view;
  std::string why;
  Form form;
  if (!read_tensor(param.ptr(), &view, &why)) throw std::runtime_error(optimizer_ + ": a parameter " + why);
  const Precision precision = precision_.read(group.ptr(), optimizer_ + ": ");
  try {
    if (!find_form(precision, view, view.dtype, rule_->num_states(variant), 0, &form)) form.num_states = 0;
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(optimizer_ + ": a parameter of shape " + view.shape_string() + " " + error.what());
  }
  return names_of(form, variant, true, group.contains("ema_decay") && !group["ema_decay"].is_none());
}

// Reads the parameters that changed anew. If some have no state, checks the rest of them all the same, then makes it
// and returns false: that ran users' code perhaps, and the scan must begin anew.
bool Stepper::refresh_dirty(py::handle optimizer, Scan* scan) {
  py::list missing;
  std::vector<Dirty> without_state;
  Py_ssize_t next = 0;  // where the next parameter's state is likely to be
  for (const Dirty& dirty : scan->dirty) {
    Entry& entry = entries_[dirty.entry];
    PyObject* param_state = find_value(scan->state.ptr(), dirty.param, next, &entry.state_at);
    next = entry.state_at + 1;
    if (param_state && !PyDict_Check(param_state)) fail(name(entry, *scan), "the state", "must be a dict");
    if (param_state && PyDict_GET_SIZE(param_state) == 0) param_state = nullptr;
    if (param_state) scan->held.keep(param_state);  // a torch mode's code may run below
    bool lacks_ema = scan->has_ema(entry.group);
    if (lacks_ema && param_state) {
      lacks_ema = PyDict_GetItemWithError(param_state, str_ema_) == nullptr;
      if (PyErr_Occurred()) throw py::error_already_set();
    }
    if (lacks_ema && dirty.grad == Py_None) {  // it is what the parameter is, until that moves
      entry.part = entry.known = Part::kNone;
      entry.param = param_state ? nullptr : dirty.param;  // it may get one without the dict of all noticing
      continue;
    }
    refresh(dirty, lacks_ema ? nullptr : param_state, scan);
    if (param_state && !lacks_ema) continue;
    const py::list names = names_of(form_of(dirty, *scan), scan->variants[entry.group], !param_state, lacks_ema);
    missing.append(
        py::make_tuple(py::handle(dirty.param), names, py::handle(PyList_GET_ITEM(scan->groups.ptr(), entry.group))));
    without_state.push_back(dirty);
  }
  if (without_state.empty()) return true;
  int looked_at = kCpu;  // the device of the last one
  for (const Dirty& dirty : without_state) {
    TensorView view;
    std::string why;
    if (!read_tensor(dirty.param, &view, &why) || view.device == looked_at || view.device == kCpu) continue;
    looked_at = view.device;
    const TorchDevice current(view.device);
    if (cuda::runtime()->is_capturing(current_stream(view.device))) {
      fail(name(entries_[dirty.entry], *scan), "its state", "does not exist yet: make a step before capturing one");
    }
  }

  const py::list made = optimizer.attr("_new_states")(missing);
  scan->str_ema = str_ema_;
  for (size_t i = 0; i < without_state.size(); ++i) {
    PyObject* param = without_state[i].param;
    PyObject* before = PyDict_GetItemWithError(scan->state.ptr(), param);
    if (before) scan->held.keep(before);
    const py::dict one = made[i];
    if (!one.contains(py::handle(str_step_))) {
      if (PyDict_SetItem(before, str_ema_, py::object(one["ema"]).ptr()) != 0) throw py::error_already_set();
      scan->made_averages.push_back(before);
      continue;
    }
    scan->made_state.emplace_back(param, before);
    if (PyObject_SetItem(scan->state.ptr(), param, made[i].ptr()) != 0) throw py::error_already_set();
  }
  return false;
}

// No two elements that the step writes may share memory, nor may a gradient lie in what it writes.
void Stepper::check_memory(Scan* scan) {
  WrittenMemory::Region a, b;
  const auto what = [&](const WrittenMemory::Region& region) {
    if (region.stream == kParam) return std::string("the parameter");
    const bool is_step = region.stream == WrittenMemory::kStepCount;
    if (is_step) return std::string("state 'step'");
    const Entry& entry = entries_[region.owner];
    return "state '" + py::handle(state_name(entry, region.stream - kState)).cast<std::string>() + "'";
  };
  const auto where = [&](const WrittenMemory::Region& region) {
    const Entry& entry = entries_[region.owner];
    return "param_groups[" + std::to_string(entry.group) + "]['params'][" + std::to_string(entry.index) + "]" +
           (region.stream == kParam ? "" : " (its " + what(region) + ")");
  };
  const auto rebuild = [&] {
    memory_.clear();
    for (size_t n = 0; n < entries_.size(); ++n) {
      Entry& entry = entries_[n];
      entry.gap = {};
      entry.in_memory = entry.part != Part::kNone;
      if (!entry.in_memory) continue;
      memory_.add(written_row(n), entry.num_streams, entry.dtype, n);
      memory_.add_step_count(entry.step, entry.step_is_double ? 8 : 4, n);
    }
    if (!memory_.find_overlap(&a, &b)) return;
    const ParamName who = name(entries_[b.owner], *scan);
    if (a.owner == b.owner && a.stream == b.stream)
      fail(who, what(b), "has elements that share memory (an expanded tensor?); use a .clone() of it");
    fail(who, what(b), "shares memory with " + where(a) + "; give each its own, or list a tied parameter once");
  };
  // False, once, if a gradient seems to lie in written memory.
  const auto check_grads = [&](const std::vector<size_t>& which, bool may_retry) {
    WrittenMemory::Gap recent;  // gradients made one after the other tend to lie in one gap
    for (const size_t n : which) {
      Entry& entry = entries_[n];
      const TensorRow& row = grad_row(n);
      WrittenMemory::Gap gap;
      if (is_sparse(n) && memory_.gradient_overlaps(sparse_.at(n).index_memory, DType::kFloat64, n, &gap, &a)) {
        if (may_retry) return false;
        fail(name(entry, *scan), "the gradient's indices", "share memory with " + where(a) + "; use a .clone() of it");
      }
      const std::byte *from = row.data[kGrad], *to = from + entry.grad_bytes;
      if (entry.gap.holds(from, to)) continue;
      if (recent.holds(from, to)) {
        entry.gap = recent;
        continue;
      }
      if (!memory_.gradient_overlaps(row, entry.dtype, n, &entry.gap, &a)) {
        recent = entry.gap;
        continue;
      }
      if (may_retry) return false;
      fail(name(entry, *scan), "the gradient", "shares memory with " + where(a) + "; use a .clone() of it");
    }
    return true;
  };

  // What is known may be out of date for parameters that sit this step out: look anew before complaining.
  if (!scan->memory_changed && check_grads(scan->moved_grads, true)) return;
  rebuild();
  std::vector<size_t> with_grads;
  for (size_t n = 0; n < entries_.size(); ++n) {
    if (entries_[n].part == Part::kStep) with_grads.push_back(n);
  }
  check_grads(with_grads, false);
}

Stepper::OnDevice& Stepper::on_device(int device, DType dtype, int rule) {
  for (const auto& known : tables_) {
    if (known->device == device && known->dtype == dtype && known->rule == rule) return *known;
  }
  tables_.push_back(std::make_unique<OnDevice>());
  tables_.back()->device = device;
  tables_.back()->rule = rule;
  tables_.back()->dtype = dtype;
  return *tables_.back();
}

cuda::StepInfo Stepper::step_info(int rule, int device, DType dtype, bool counts_there, Scan* scan) {
  cuda::StepInfo info{};
  const bool is_average = rule == kAverageRule;
  const size_t common_size =
      dtype == DType::kFloat64 ? sizeof(Common::Scalars<double>) : sizeof(Common::Scalars<float>);
  info.rule = rule;
  info.dtype = dtype;
  info.scalars_size = is_average ? common_size : rule_->scalars_size(dtype);
  info.device = device;
  info.stream = current_stream(device);
  info.capturing = cuda::runtime()->is_capturing(info.stream);
  info.answer = answer_.device == device ? answer_.at : nullptr;
  info.norm = scan->wants_norm;  // the averages' too: they must know whether the step is skipped
  info.how = {scan->context.unscale != 0, scan->context.inv_scale, phase_.infinity_norm() || norm_is_double_};
  info.report_inf = scan->report_inf;
  info.stats = phase_.wants_stats() && !is_average && stats_.device == device ? stats_.at : nullptr;
  info.full = scan->wants_norm || info.stats || is_average || scan->averages;
  const cuda::Options options = {question_of(*scan, norm_is_double_)};
  options_.assign(sizeof options, std::byte{0});
  std::memcpy(options_.data(), &options, sizeof options);
  if (counts_there) {
    const std::vector<std::byte>& groups = rule_->device_groups(device);
    options_.insert(options_.end(), groups.begin(), groups.end());
  }
  info.options = options_.data();
  info.options_size = options_.size();
  const auto there = [&](py::object tensor, const char* what) -> const float* {
    if (tensor.is_none()) return nullptr;
    TensorView view = read_scalar(tensor, optimizer_, what);
    if (view.device != device) {
      tensor = tensor.attr("to")(device_name(device), py::arg("non_blocking") = true);
      view = read_scalar(tensor, optimizer_, what);
      scan->moved_scalars.push_back(tensor);
    }
    return reinterpret_cast<const float*>(view.data);
  };
  info.found_inf = there(scan->found_inf, "found_inf");
  info.grad_scale = there(scan->grad_scale, "grad_scale");
  return info;
}

// Gives every row that takes part its scalars and its place: in the CPU's running total, which it returns, or in the
// table of its device and dtype.
int64_t Stepper::prepare_rows(Scan* scan) {
  for (const auto& known : tables_) {
    known->table.begin();
    known->host_counted = nullptr;
  }
  OnDevice* there = nullptr;  // the last one's
  int64_t cost = 0;
  size_t group = SIZE_MAX;
  int options_device = kCpu;
  const Entry* last = nullptr;
  double last_step = 0;
  const void* scalars = nullptr;
  if (scan->wants_norm) norm_is_double_ = false;
  const bool beside = scan->wants_norm || phase_.wants_stats() || scan->has_averages;
  if (beside || has_beside_) {
    beside_.resize(entries_.size());
    for (size_t n = 0; n < entries_.size(); ++n) rows_[n].beside = beside ? &beside_[n] : nullptr;
    has_beside_ = beside;
  }
  for (size_t n = 0; n < entries_.size(); ++n) {
    Entry& entry = entries_[n];
    TensorRow& row = rows_[n];
    if (row.start != cost) row.start = cost;
    if (entry.part != Part::kStep) continue;
    const Ema ema = !entry.has_ema || entry.is_sparse ? Ema::kNone : starts(entry) ? Ema::kCopy : Ema::kMove;
    if (row.beside) {
      beside_[n] = {ema,
                    entry.device == kCpu ? target_->find_norm(entry.form ? entry.form->grad : entry.dtype) : nullptr,
                    nullptr, nullptr};
    }
    norm_is_double_ |= scan->wants_norm && entry.dtype == DType::kFloat64;
    if (entry.is_complex && scan->wants_norm && phase_.infinity_norm())
      fail(name(entry, *scan), "the parameter",
           "is complex, of which the largest magnitude is not known: norm_type=2.0");
    if (group != entry.group) {
      group = entry.group;
      options_device = rule_->options_device(group);
    }
    if (entry.step_on_device) {
      if (options_device != kCpu && options_device != entry.device)
        fail(name(entry, *scan), "the parameter",
             "is on '" + device_name(entry.device) +
                 "', but its group has an lr or beta on another GPU; move it there, "
                 "or give numbers or CPU tensors");
    } else {
      if (entry.device != kCpu && (phase_.skips() || scan->report_inf))
        fail(name(entry, *scan), "its step count",
             "is on the CPU, but the GPU decides whether this step is skipped: move state['step'] there (an optimizer "
             "made with skip_nonfinite=True, fused=True or capturable=True keeps it there)");
      if (scan->amp_on_device)
        fail(name(entry, *scan), "its step count",
             "is on the CPU, but GradScaler's tensors are on a GPU: move state['step'] there, or make the optimizer "
             "with fused=True or capturable=True");
      if (options_device != kCpu)
        fail(name(entry, *scan), "its step count",
             "is on the CPU, but its group has an lr or beta on a GPU: make the optimizer with capturable=True, or "
             "give numbers or CPU tensors");
      const double step = entry.next_step_count();
      if (!last || last->group != entry.group || last->dtype != entry.dtype || last_step != step) {
        scalars = rule_->scalars(entry.group, step, entry.dtype);
        last = &entry;
        last_step = step;
      }
    }
    if (entry.device == kCpu) {
      if (row.scalars != scalars) row.scalars = scalars;
      cost += row.numel + kRowCost;
      continue;
    }
    if (row.scalars) row.scalars = nullptr;  // not the CPU's
    if (!there || there->device != entry.device || there->dtype != entry.dtype)
      there = &on_device(entry.device, entry.dtype, rule_->id());
    if (!entry.step_on_device) there->host_counted = &entry;
    scan->averages |= ema != Ema::kNone;
    there->table.add(row, {entry.step_on_device ? nullptr : scalars, static_cast<int32_t>(entry.group), entry.variant,
                           entry.step_is_double, entry.step_on_device ? entry.step : nullptr, static_cast<int32_t>(n)});
  }
  const bool norm = scan->wants_norm, stats = phase_.wants_stats();
  if (norm || stats) place_parts(norm, stats);
  return cost;
}

// Makes the tables of the devices ready. All that can fail of them but the launches.
void Stepper::prepare_tables(Scan* scan, int64_t cost) {
  for (const auto& known : tables_) {
    if (known->table.empty()) continue;
    const TorchDevice current(known->device);
    const cuda::StepInfo info = step_info(known->rule, known->device, known->dtype, known->table.on_device(), scan);
    if (info.capturing && known->host_counted)
      fail(
          name(*known->host_counted, *scan), "its step count",
          "is on the CPU, and such a step cannot be captured in a CUDA graph: make the optimizer with capturable=True");
    if (info.capturing && cost > 0)
      throw std::runtime_error(optimizer_ + ": the step of a CPU parameter cannot be captured in a CUDA graph");
    known->table.prepare(info, refreshed_);
    if (!info.capturing) continue;
    // A graph may be replayed, and write there, for as long as the process lives.
    for (const py::object& tensor : {answer_.tensor, stats_.tensor}) {
      if (tensor) py::object(tensor).release();
    }
    captured_ = phase_of(*scan);
    if (known->rule == kAverageRule) captured_.averages_alone = true;
  }
  refreshed_ = false;
}

Stepper::Phase Stepper::phase_of(const Scan& scan) const {
  return {scan.wants_norm,      scan.report_inf != nullptr, phase_.infinity_norm(),
          phase_.wants_stats(), captured_.averages_alone,   scan.ema_decays,
          scan.precisions};
}

// The steps of all devices. What is decided by all gradients comes first, by their dtypes in order; averages of what a
// step writes come last.
void Stepper::launch_tables(const Scan& scan) {
  std::vector<OnDevice*> of_rule, of_average;
  for (const auto& known : tables_) {
    if (!known->table.empty()) (known->rule == kAverageRule ? of_average : of_rule).push_back(known.get());
  }
  const auto by_dtype = [](const OnDevice* a, const OnDevice* b) { return a->dtype < b->dtype; };
  if (of_rule.size() > 1) std::stable_sort(of_rule.begin(), of_rule.end(), by_dtype);
  if (scan.wants_norm) {
    for (OnDevice* table : of_rule) {
      const TorchDevice current(table->device);
      table->table.launch_norm(table == of_rule.front(), table == of_rule.back());
    }
  }
  // The last one where the answer lies counts the step of the averages.
  OnDevice* last = nullptr;
  for (const auto* tables : {&of_rule, &of_average}) {
    for (OnDevice* table : *tables) {
      if (scan.averages && answer_.at && table->device == answer_.device) last = table;
    }
  }
  bool counted = false;
  for (OnDevice* table : of_rule) {
    const TorchDevice current(table->device);
    const bool counts_skips = !scan.wants_norm && !scan.found_inf.is_none() && table->device == answer_.device;
    table->table.launch(counts_skips && !counted, table == last);
    counted |= counts_skips;
  }
  for (OnDevice* table : of_average) {
    const TorchDevice current(table->device);
    table->table.launch(false, table == last);
  }
}

void Stepper::update_captured(py::list param_groups) {
  const Busy busy(this);
  const FloatMode mode;
  Scan scan;
  scan.groups = std::move(param_groups);
  read_options(&scan);
  scan.wants_norm = captured_.norm;
  scan.is_update_of_reporting = captured_.reports;
  const bool measures = phase_.clips() || phase_.skips();
  const auto has_ema = [](double decay) { return decay >= 0; };
  const auto& before = captured_.ema_decays;
  bool same = captured_.norm || !measures;
  same &= !captured_.norm || captured_.infinity_norm == phase_.infinity_norm();
  same &= captured_.stats == phase_.wants_stats();
  if (before.size() == scan.ema_decays.size()) {
    same &= captured_.precisions == scan.precisions;
    for (size_t g = 0; g < before.size(); ++g) {
      same &= has_ema(before[g]) == has_ema(scan.ema_decays[g]);
      same &= !captured_.averages_alone || before[g] == scan.ema_decays[g];
    }
  }
  if (!before.empty() && !same)
    throw std::runtime_error(
        optimizer_ +
        ": what a step measures or averages has changed since it was captured (max_grad_norm, "
        "skip_nonfinite, ema_decay, stats switched on or off, norm_type, the ema_decay of parameters "
        "without gradients), or how parameters and state are stored; capture anew");
  for (const auto& known : tables_) {
    const TorchDevice current(known->device);
    if (known->rule == rule_->id())
      known->table.update_captured(step_info(known->rule, known->device, known->dtype, true, &scan));
  }
}

// Finds the tensors of the optimizer that the step writes beside parameters and state. False if one was made: that ran
// users' code perhaps, and the scan must begin anew.
bool Stepper::find_buffers(py::handle optimizer, Scan* scan) {
  const bool has_ema = scan->has_averages;
  const bool wants_answer = scan->wants_norm || !scan->found_inf.is_none() || has_ema;
  if (!wants_answer && !phase_.wants_stats()) return true;
  const Entry* first = nullptr;
  for (const Entry& entry : entries_) {
    if (entry.part != Part::kStep) continue;
    if (!first) first = &entry;
    if (first->device == entry.device || (!scan->wants_norm && !phase_.wants_stats())) continue;
    fail(
        name(entry, *scan), "the parameter",
        "is on '" + device_name(entry.device) + "' and another on '" + device_name(first->device) +
            "': max_grad_norm, skip_nonfinite, stats and fusedopt.GradScaler need all on one device; make an optimizer "
            "for each");
  }
  if (!first) return true;
  const int device = first->device;
  const auto has = [&](const Buffer& buffer, int64_t size) {
    return buffer.tensor && buffer.device == device && buffer.size == size;
  };
  const int64_t stats_size = static_cast<int64_t>(entries_.size()) * kStatsSize;
  bool found = true;
  if (wants_answer && !has(answer_, kAnswerSize)) {
    find_buffer(optimizer, "answer", kAnswerSize, device, &answer_);
    found = false;
  }
  if (has_ema && (!answer_knows_averages_ || !found)) {
    optimizer.attr("_set_averaged")(answer_.tensor, num_averaged_);
    answer_knows_averages_ = true;
    found = false;
  }
  if (phase_.wants_stats() && !has(stats_, stats_size)) {
    find_buffer(optimizer, "stats", stats_size, device, &stats_);
    found = false;
  }
  return found;
}

void Stepper::find_buffer(py::handle optimizer, const char* what, int64_t size, int device, Buffer* buffer) {
  if (device != kCpu) {
    const TorchDevice current(device);
    if (cuda::runtime()->is_capturing(current_stream(device)))
      throw std::runtime_error(optimizer_ + ": make a step with these options before capturing one");
  }
  *buffer = {};
  py::object tensor = optimizer.attr("_new_buffer")(size, torch_device(device));
  TensorView view;
  std::string why;
  if (!read_tensor(tensor.ptr(), &view, &why)) throw std::runtime_error(optimizer_ + ": " + what + " " + why);
  *buffer = {std::move(tensor), device, size, reinterpret_cast<double*>(view.data)};
}

// Says where each row of the host writes its parts.
void Stepper::place_parts(bool norm, bool stats) {
  int64_t count = 0;
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    const int64_t before = count;
    for (size_t n = 0; n < entries_.size(); ++n) {
      if (entries_[n].part != Part::kStep || !rows_[n].scalars || static_cast<int>(entries_[n].dtype) != dtype)
        continue;
      beside_[n].norm = norm ? norm_parts_.data() + count : nullptr;
      beside_[n].stats = stats ? stats_parts_.data() + count : nullptr;
      count += (rows_[n].numel + kPart - 1) / kPart;
    }
    num_parts_[dtype] = count - before;
  }
  const bool enough = (!norm || norm_parts_.size() >= static_cast<size_t>(count)) &&
                      (!stats || stats_parts_.size() >= static_cast<size_t>(count));
  if (enough) return;
  if (norm) norm_parts_.resize(count);
  if (stats) stats_parts_.resize(count);
  place_parts(norm, stats);  // elsewhere
}

// The moving averages that are not moved beside an update. Returns their cost.
int64_t Stepper::prepare_averages(Scan* scan) {
  average_rows_.clear();
  int64_t cost = 0;
  for (size_t n = 0; n < entries_.size() && !averages_.empty(); ++n) {
    const Entry& entry = entries_[n];
    if (entry.part != Part::kAverage && !(entry.part == Part::kStep && entry.is_sparse && entry.has_ema)) continue;
    TensorRow row = averages_.at(n).row;
    row.scalars = rule_->average_scalars(entry.group, entry.dtype, starts(entry));
    if (entry.device != kCpu) {
      scan->averages = true;
      static constexpr Beside kMoves = {Ema::kMove, nullptr, nullptr, nullptr};
      row.beside = &kMoves;
      OnDevice& there = on_device(entry.device, entry.dtype, kAverageRule);
      there.table.add(row, {row.scalars, static_cast<int32_t>(entry.group), 0, false, nullptr});
      continue;
    }
    row.update = target_->find(kAverageRule, 0, entry.dtype);
    row.start = cost;
    cost += row.numel + kRowCost;
    average_rows_.push_back(row);
  }
  return cost;
}

// Measures the gradients of the host and decides what depends on all of them. True: the step is to be skipped.
bool Stepper::is_to_be_skipped(Scan* scan, int64_t cost, int max_threads) {
  if (!scan->wants_norm || !answer_.at || answer_.device != kCpu) return false;
  const Question question = question_of(*scan, norm_is_double_);
  const NormOptions options = {scan->context.unscale != 0, scan->context.inv_scale, question.largest};
  scan->without_gil(
      [&] { measure_rows(rows_.data(), static_cast<int64_t>(rows_.size()), options, cost, max_threads); });
  NormPart all = {0, 0};
  const NormPart* parts = norm_parts_.data();
  for (const int64_t count : num_parts_) {
    all = combine(all, total(parts, count));
    parts += count;
  }
  answer_.at[kSum] = all.sum;
  answer_.at[kLargest] = all.largest;
  decide(question, false, answer_.at, scan->report_inf);
  if (answer_.at[kSkip] != 0) return true;
  if (phase_.clips()) rule_->clip(answer_.at[kClip]);
  return false;
}

// What is to be decided when all gradients have been read.
Question Stepper::question_of(const Scan& scan, bool any_double) const {
  Question question{};
  question.max_norm = phase_.max_grad_norm();
  question.infinity_norm = phase_.infinity_norm();
  question.largest = phase_.infinity_norm() || any_double;  // a sum of squares of doubles may overflow without an inf
  question.is_double = any_double;
  question.clip = phase_.clips();
  question.skip = phase_.skips() || scan.report_inf || scan.is_update_of_reporting;
  return question;
}

// Statistics of a step that was skipped: rows walk as ever, but nothing moves.
void Stepper::run_paused(Scan* scan, int64_t cost, int max_threads) {
  const auto set_rule = [&](bool paused) {
    for (size_t n = 0; n < entries_.size(); ++n) {
      const Entry& entry = entries_[n];
      if (entry.part != Part::kStep || entry.device != kCpu) continue;
      const int variant = !paused ? entry.variant : entry.is_sparse ? Pause::kSparseVariant : 0;
      rows_[n].update = target_->find(paused ? kPauseRule : rule_->id(), variant, entry.dtype);
      if (paused) beside_[n].ema = Ema::kNone;
    }
  };
  set_rule(true);
  scan->without_gil([&] { run_rows(rows_.data(), static_cast<int64_t>(rows_.size()), cost, max_threads); });
  set_rule(false);
  finish_stats();
}

// Writes the statistics of the host's rows to their tensor.
void Stepper::finish_stats() {
  for (size_t n = 0; n < entries_.size(); ++n) {
    double* const out = stats_.at + n * kStatsSize;
    const Entry& entry = entries_[n];
    StatsPart all{};
    if (entry.part != Part::kStep) continue;
    for (int64_t i = 0; i < rows_[n].numel; i += kPart) all = combine(all, beside_[n].stats[i / kPart]);
    write_stats(all, entry.dtype == DType::kFloat64, out);
  }
}

int Stepper::num_devices() const {
  std::vector<int> devices;
  for (const Entry& entry : entries_) {
    if (entry.known == Part::kNone) return 0;
    if (std::find(devices.begin(), devices.end(), entry.device) == devices.end()) devices.push_back(entry.device);
  }
  return static_cast<int>(devices.size());
}

void Stepper::forget() {
  for (Entry& entry : entries_) entry.param = nullptr;
  knows_averages_ = false;
}

// Does a parameter's average begin now, with what the weights will be? Where a device decides about steps, it knows.
bool Stepper::starts(const Entry& entry) const {
  return num_averaged_ == 0 && !(entry.device != kCpu && answer_.device == entry.device);
}

int64_t Stepper::step(py::handle optimizer, py::list param_groups, py::dict state, py::object grad_scale,
                      py::object found_inf, py::object report_inf, int max_threads) {
  const Busy busy(this);
  const FloatMode mode;  // the scalars too are computed in the default modes
  Scan scan;
  // torch's GradScaler gives this where no gradient was looked at.
  if (PyLong_CheckExact(found_inf.ptr()) && PyObject_IsTrue(found_inf.ptr()) == 0) found_inf = py::none();
  // What it says of gradients that were unscaled long ago may not be true of what has become of them.
  bool has_verdict = !found_inf.is_none() && !grad_scale.is_none();
  if (!found_inf.is_none()) {
    const TensorView view = read_scalar(found_inf, optimizer_, "found_inf");
    if (view.device != kCpu) {
      scan.found_inf = std::move(found_inf);
      scan.amp_on_device = true;
    } else if (view.first() != 0) {
      if (!answer_.at || answer_.device != kCpu) find_buffer(optimizer, "answer", kAnswerSize, kCpu, &answer_);
      answer_.at[kSkip] = 1;
      answer_.at[kSkippedSteps] += 1;
      return 0;
    }
  }
  if (!grad_scale.is_none()) {
    const TensorView view = read_scalar(grad_scale, optimizer_, "grad_scale");
    if (view.device != kCpu) {
      scan.grad_scale = std::move(grad_scale);
      scan.amp_on_device = true;
    } else {
      // The reciprocal in double, rounded to float: what GradScaler.unscale_ multiplies by.
      scan.context.unscale = true;
      scan.context.inv_scale = static_cast<float>(1.0 / view.first());
      has_verdict &= scan.context.inv_scale <= 1;  // a larger one may make an inf of what is none
    }
  }
  if (!report_inf.is_none()) {
    const TensorView view = read_scalar(report_inf, optimizer_, "found_inf");
    scan.report_inf = reinterpret_cast<float*>(view.data);
    scan.report_device = view.device;
  }

  scan.memory_changed = !memory_checked_;
  memory_checked_ = false;
  scan.groups = std::move(param_groups);
  scan.state = std::move(state);
  scan.hold = last_cost_ > kReleaseCost;
  scan.held.reserve(scan.hold ? entries_.size() * 6 : 0);
  scan.written.reserve(entries_.size());
  if (target_ != &current_target()) {
    target_ = &current_target();
    for (Entry& entry : entries_) entry.param = nullptr;
  }
  int64_t cost = 0, average_cost = 0;
  {
    const NoCollection no_collection;
    scan.has_same_states = states_ == scan.state.ptr() && num_states_ == PyDict_GET_SIZE(scan.state.ptr());
    for (;;) {
      scan.begin();
      read_groups(&scan);
      scan.has_averages =
          std::any_of(scan.ema_decays.begin(), scan.ema_decays.end(), [](double decay) { return decay >= 0; });
      if (!knows_averages_ && scan.has_averages) {
        num_averaged_ = optimizer.attr("_has_averages")().cast<bool>();
        knows_averages_ = true;
        answer_knows_averages_ = false;
        continue;
      }
      scan.wants_norm = phase_.clips() || scan.report_inf || (phase_.skips() && !has_verdict);
      if (scan.hold) {
        scan_holding(&scan);
        if (!refresh_dirty(optimizer, &scan)) continue;
      } else if (!scan_quickly(&scan, useful_threads(last_cost_, max_threads))) {
        scan.hold = true;
        continue;
      }
      if (find_buffers(optimizer, &scan)) break;
    }
    states_ = scan.state.ptr();
    num_states_ = PyDict_GET_SIZE(states_);
    check_memory(&scan);
    memory_checked_ = true;
    cost = prepare_rows(&scan);
    average_cost = prepare_averages(&scan);
    prepare_tables(&scan, cost);
  }
  has_norm_ |= scan.wants_norm && answer_.at;
  took_part_.assign(phase_.wants_stats() ? entries_.size() : 0, false);
  for (size_t n = 0; n < took_part_.size(); ++n) took_part_[n] = entries_[n].part == Part::kStep;
  if (is_to_be_skipped(&scan, cost, max_threads)) {
    if (phase_.wants_stats()) run_paused(&scan, cost, max_threads);
    return 0;
  }
  {
    const NoCollection no_collection;
    records::bump_versions(scan.written.data(), scan.written.size());
  }

  // Nothing below can fail, but a device that is out of order.
  scan.keep_state();
  ++num_averaged_;
  for (Entry& entry : entries_) {
    if (entry.part == Part::kStep && !entry.step_on_device) entry.set_step_count(entry.next_step_count());
  }
  last_cost_ = cost;
  launch_tables(scan);
  scan.without_gil([&] {
    run_rows(rows_.data(), static_cast<int64_t>(rows_.size()), cost, max_threads);
    // Of parameters with sparse gradients too, so not before these are done.
    run_rows(average_rows_.data(), static_cast<int64_t>(average_rows_.size()), average_cost, max_threads);
  });
  if (phase_.wants_stats() && stats_.device == kCpu && stats_.at) finish_stats();
  return static_cast<int64_t>(scan.written.size());
}

}  // namespace fusedopt
