// Stepper: the tables of devices, and their launches.
#include <algorithm>

#include "../cpu/float_mode.h"
#include "stepper_scan.h"

namespace fusedopt {

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

// Those of this step: of the averages alone, or of the rule, by their dtypes in order.
std::vector<Stepper::OnDevice*> Stepper::tables_of(bool averages) const {
  std::vector<OnDevice*> found;
  for (const auto& known : tables_) {
    if (!known->table.empty() && (known->rule == kAverageRule) == averages) found.push_back(known.get());
  }
  const auto by_dtype = [](const OnDevice* a, const OnDevice* b) { return a->dtype < b->dtype; };
  if (!averages && found.size() > 1) std::stable_sort(found.begin(), found.end(), by_dtype);
  return found;
}

// What is decided by all gradients comes first.
void Stepper::launch_norms(const Scan& scan) {
  if (!scan.wants_norm) return;
  const std::vector<OnDevice*> tables = tables_of(false);
  for (OnDevice* table : tables) {
    const TorchDevice current(table->device);
    table->table.launch_norm(table == tables.front(), table == tables.back() && !scan.adds_up);
  }
  if (!scan.adds_up || answer_.device == kCpu) return;
  const TorchDevice current(answer_.device);
  if (!tables.empty()) {
    add_up();
    tables.back()->table.launch_decision();
    return;
  }
  // No gradient is this process's, but the averages too stand still in a skipped step.
  reduction_.attr("tell")(totals(), scan.report);
  const std::vector<OnDevice*> averages = tables_of(true);
  if (!averages.empty()) averages.front()->table.launch_decision();
}

// The steps of all devices. Averages of what a step writes come last.
void Stepper::launch_tables(const Scan& scan) {
  const std::vector<OnDevice*> of_rule = tables_of(false), of_average = tables_of(true);
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

}  // namespace fusedopt
