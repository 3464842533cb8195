// Stepper: reads parameters that changed anew, and checks all that it is given.
#include <algorithm>

#include "../cpu/target.h"
#include "stepper_scan.h"

namespace fusedopt {

static py::module_ sharding() { return py::module_::import("fusedopt._sharding"); }

// Of a DTensor, for an error.
static std::string placement(PyObject* tensor) {
  const py::handle t(tensor);
  return py::str(t.attr("placements")).cast<std::string>() + " on " +
         py::str(t.attr("device_mesh")).cast<std::string>();
}

// Makes words of 16 bits of a tensor of bytes that has two for each of the parameter's elements.
static bool as_words(TensorView* bytes, const TensorView& param, int64_t* strides) {
  const int ndim = param.ndim;
  if (bytes->ndim != ndim + 1 || !std::equal(param.shape, param.shape + ndim, bytes->shape)) return false;
  if (bytes->shape[ndim] != 2 || bytes->strides[ndim] != 1) return false;
  if (bytes->device != kCpu && reinterpret_cast<uintptr_t>(bytes->data) % 2 != 0) return false;
  for (int d = 0; d < ndim; ++d) {
    if (bytes->shape[d] > 1 && bytes->strides[d] % 2 != 0) return false;
    strides[d] = bytes->strides[d] / 2;
  }
  bytes->dtype = DType::kBFloat16;  // of as many bytes
  bytes->ndim = ndim;
  bytes->shape = param.shape;
  bytes->strides = strides;
  return true;
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
  const bool parted = is_distributed(dirty.param);
  // What is here of a DTensor, which the state of one must be, placed as it is.
  const auto part_of = [&](PyObject* tensor, const std::string& what) {
    if (is_distributed(tensor) != parted)
      fail(who, what,
           parted ? "is no DTensor, and the parameter is one: distribute it as the parameter is (checkpoints: "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict does that)"
                  : "is a DTensor, and the parameter is none: take its .full_tensor() or .to_local()");
    if (!parted) return tensor;
    if (tensor != dirty.param && spec_of(tensor) != spec_of(dirty.param) &&
        !sharding().attr("same_place")(py::handle(tensor), py::handle(dirty.param)).cast<bool>())
      fail(who, what,
           "is placed as " + placement(tensor) + ", and the parameter as " + placement(dirty.param) +
               ": redistribute it");
    return scan->hold_part(tensor);
  };
  const auto read = [&](int stream, PyObject* tensor, const std::string& what, bool may_be_lazy) -> PyObject* {
    tensor = part_of(tensor, what);
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

  PyObject* const param = read(kParam, dirty.param, "the parameter", false);
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
    grad = read(kGrad, redistributed(dirty, who, scan), "the gradient", true);
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
    const Place place = place_of(dirty.param, streams.view[kParam], streams.view[kGrad].dtype, precision);
    if (!find_form(precision, streams.view[kParam], place, streams.view[kGrad].dtype, all_states,
                   first_.position + dirty.entry, form.get()))
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
  PyObject* tensors[kMaxStreams] = {param, grad};
  TensorView read_as[kMaxStreams];  // the state
  int64_t word_strides[kMaxDims];
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
    tensor = read(kState + k, tensor, what, false);
    const TensorView &got = streams.view[kState + k], &param = streams.view[kParam];
    const bool is_remainder =
        formed && formed->companion == Companion::kRemainder && kState + k == formed->companion_stream();
    must_be(kState + k, what,
            is_remainder ? DType::kCode
            : formed     ? formed->dtype(kState + k)
                         : param.dtype,
            param.is_complex);
    read_as[kState + k] = got;
    if (is_remainder) {
      const auto wanted = [&] {
        std::string shape = param.shape_string();
        shape.pop_back();
        return shape + (param.ndim > 1 ? ", 2)" : param.ndim == 1 ? " 2)" : "2,)");
      };
      if (!as_words(&streams.view[kState + k], param, word_strides))
        fail(who, what,
             "has shape " + got.shape_string() + ", not the " + wanted() +
                 " of the two bytes of each element, side by side and at even strides");
    } else if (key == str_scales_) {
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
  entry.is_distributed = parted;
  reduction_is_stale_ |= entry.spec.ptr() != (parted ? spec_of(dirty.param) : nullptr);
  entry.spec = parted ? py::reinterpret_borrow<py::object>(spec_of(dirty.param)) : py::object();
  // Another placement than the parameter's is brought to it in every step.
  const bool as_is = parted && grad && !scan->redistributed.count(dirty.grad);
  entry.grad_spec = as_is ? py::reinterpret_borrow<py::object>(spec_of(dirty.grad)) : py::object();
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
    entry.signature[k] = tensors[k] ? Signature::of(tensors[k], k < kState ? streams.view[k] : read_as[k]) : nullptr;
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

// The gradient of a DTensor, with its parts where the parameter's are, which may take a collective: once a step.
PyObject* Stepper::redistributed(const Dirty& dirty, const ParamName& who, Scan* scan) const {
  if (!is_distributed(dirty.param) || !is_distributed(dirty.grad) || spec_of(dirty.param) == spec_of(dirty.grad) ||
      sharding().attr("same_place")(py::handle(dirty.grad), py::handle(dirty.param)).cast<bool>())
    return dirty.grad;
  PyObject*& placed = scan->redistributed[dirty.grad];
  if (!placed) {
    const py::object made = sharding().attr("placed_as")(py::handle(dirty.grad), py::handle(dirty.param));
    if (made.is_none())
      fail(who, "the gradient", "is on another device mesh than the parameter: " + placement(dirty.grad));
    scan->held.keep(made.ptr());
    placed = made.ptr();
  }
  return placed;
}

// The form of a parameter that has been checked; without states if it is plain.
Form Stepper::form_of(const Dirty& dirty, const Scan& scan) const {
  const Entry& entry = entries_[dirty.entry];
  TensorView param, grad;
  std::string why;
  Form form;
  if (!read_tensor(local_part(dirty.param), &param, &why)) fail(name(entry, scan), "the parameter", why);
  const bool has_grad = dirty.grad != Py_None && !py::handle(dirty.grad).attr("is_sparse").cast<bool>();
  if (!has_grad || !read_tensor(local_part(dirty.grad), &grad, &why)) grad = param;
  const int num_states = rule_->num_states(scan.variants[entry.group]);
  const Precision& precision = scan.precisions[entry.group];
  const Place place = place_of(dirty.param, param, grad.dtype, precision);
  if (!find_form(precision, param, place, grad.dtype, num_states, first_.position + dirty.entry, &form))
    form.num_states = 0;
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
      add(str_companions_[static_cast<int>(form.companion)],
          form.companion == Companion::kRemainder ? DType::kCode : form.dtype(form.companion_stream()));
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
  PyObject* const part = is_distributed(param.ptr()) ? local_part(param.ptr()) : param.ptr();
  if (!read_tensor(part, &view, &why)) throw std::runtime_error(optimizer_ + ": a parameter " + why);
  const Precision precision = precision_.read(group.ptr(), optimizer_ + ": ");
  try {
    const Place place = place_of(param.ptr(), view, view.dtype, precision);
    if (!find_form(precision, view, place, view.dtype, rule_->num_states(variant), 0, &form)) form.num_states = 0;
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
    if (!read_tensor(local_part(dirty.param), &view, &why) || view.device == looked_at || view.device == kCpu) continue;
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
    const ParamName at = name(entries_[region.owner], *scan);
    return "param_groups[" + std::to_string(at.group) + "]['params'][" + std::to_string(at.index) + "]" +
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

}  // namespace fusedopt
