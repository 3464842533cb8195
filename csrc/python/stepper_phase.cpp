// Stepper: what is around the update. Norms, averages, statistics, skipped steps.
#include <algorithm>

#include "../cpu/run.h"
#include "../cpu/target.h"
#include "stepper_scan.h"

namespace fusedopt {

// Finds the tensors of the optimizer that the step writes beside parameters and state. False if one was made: that ran
// users' code perhaps, and the scan must begin anew.
bool Stepper::find_buffers(py::handle optimizer, Scan* scan) {
  if (!find_reduction(scan)) return false;
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
  if (!first && !scan->adds_up) return true;  // else the others wait for what this process has not
  const int device = first ? first->device : reduction_device_;
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

// Finds out over which processes a norm is added up, if parameters are DTensors. False if that was not known.
bool Stepper::find_reduction(Scan* scan) {
  scan->adds_up = scan->wants_norm && has_distributed_;
  if (!scan->adds_up || (reduction_ && !reduction_is_stale_ && elsewhere_.size() == entries_.size())) return true;
  py::list params;
  PyObject* parted = nullptr;
  for (const Scan::List& list : scan->lists) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.params); ++i) {
      PyObject* param = PyList_GET_ITEM(list.params, i);
      params.append(py::handle(param));
      if (!parted && is_distributed(param)) parted = param;
    }
  }
  if (!parted) {  // there was one, once
    scan->adds_up = has_distributed_ = false;
    return true;
  }
  TensorView view;
  std::string why;
  if (!read_tensor(local_part(parted), &view, &why)) throw std::runtime_error(optimizer_ + ": a DTensor's part " + why);
  reduction_device_ = view.device;
  reduction_ = py::module_::import("fusedopt._sharding").attr("Reduction")(params);
  reduction_is_double_ = reduction_.attr("is_double").cast<bool>();
  elsewhere_.clear();
  for (const py::handle counts : reduction_.attr("counts")) elsewhere_.push_back(!counts.cast<bool>());
  reduction_is_stale_ = false;
  return false;
}

bool Stepper::is_elsewhere(size_t n, const Scan& scan) const { return scan.adds_up && elsewhere_[n]; }

// The totals of the answer become those of all processes.
py::object Stepper::totals() const { return answer_.tensor.attr("narrow")(0, static_cast<int>(kSum), 2); }
void Stepper::add_up() const { reduction_.attr("add_up")(totals()); }

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
  for (size_t n = 0; n < entries_.size() && scan->adds_up; ++n) {
    if (entries_[n].part == Part::kStep && elsewhere_[n])
      std::fill_n(beside_[n].norm, (rows_[n].numel + kPart - 1) / kPart, NormPart{0, 0});
  }
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
  if (scan->adds_up) add_up();
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

}  // namespace fusedopt
