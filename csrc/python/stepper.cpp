#include "stepper.h"

#include <algorithm>
#include <atomic>

#include "../cpu/float_mode.h"
#include "../cpu/run.h"
#include "../cpu/target.h"
#include "stepper_scan.h"

namespace fusedopt {

namespace {

// Elements of cost, about half a millisecond: more than this runs without the GIL.
constexpr int64_t kReleaseCost = 1 << 20;
// Parameters that a thread looks at in one go, some 10 microseconds.
constexpr int64_t kLookUnit = 64;

}  // namespace

Stepper::Stepper(const std::string& rule, std::string optimizer, const Seat& first)
    : rule_(make_rule_driver(Rules{}, rule)),
      optimizer_(std::move(optimizer)),
      first_(first),
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
  return {optimizer_.c_str(), first_.group + entry.group, (entry.group == 0 ? first_.index : 0) + entry.index,
          PyList_GET_ITEM(scan.groups.ptr(), entry.group)};
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
  // Of a DTensor the part may have been replaced, and it has a record of its own.
  const auto part_of = [&](PyObject* tensor) {
    return entry.is_distributed && tensor ? is_distributed(tensor) ? local_part(tensor) : nullptr : tensor;
  };
  if (entry.is_distributed && entry.spec.ptr() != spec_of(param)) return false;
  if (!still(entry.signature[kParam], part_of(param), row.data[kParam])) return false;

  PyObject* param_state = value_at(scan->state.ptr(), entry.state_at, param);
  if (!param_state || !PyDict_Check(param_state)) return false;
  if (!still(entry.step_signature, value_at(param_state, entry.step_at, str_step_), entry.step)) return false;
  for (int k = 0; k < entry.num_streams - kState; ++k) {
    PyObject* tensor = value_at(param_state, entry.item_at[k], state_name(entry, k));
    if (!still(entry.signature[kState + k], part_of(tensor), row.data[kState + k])) return false;
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
    const bool parted = is_distributed(param);
    has_distributed_ |= parted;
    *grad = scan->hold_grad(param);
    if (*grad == Py_None) return without_grad();
    if (records::available() && is_tensor(*grad)) grad_record = records::of(*grad);
    if (parted) {
      if (grad_record && is_distributed(*grad) && entry.grad_spec.ptr() == spec_of(*grad)) {
        PyObject* part = scan->hold_part(*grad);
        grad_record = records::of(part);
      } else {
        grad_record = nullptr;
      }
    }
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
  if (scan->wants_norm) norm_is_double_ = scan->adds_up && reduction_is_double_;
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
      const bool measured = entry.device == kCpu && !is_elsewhere(n, *scan);
      beside_[n] = {ema, measured ? target_->find_norm(entry.form ? entry.form->grad : entry.dtype) : nullptr, nullptr,
                    nullptr};
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
                           entry.step_is_double, entry.step_on_device ? entry.step : nullptr, static_cast<int32_t>(n),
                           is_elsewhere(n, *scan)});
  }
  const bool norm = scan->wants_norm, stats = phase_.wants_stats();
  if (norm || stats) place_parts(norm, stats);
  return cost;
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
    scan.report = report_inf;
    scan.report_device = view.device;
  }

  scan.memory_changed = !memory_checked_;
  memory_checked_ = false;
  scan.groups = std::move(param_groups);
  scan.state = std::move(state);
  scan.hold = last_cost_ > kReleaseCost || has_distributed_;
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
  launch_norms(scan);
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
