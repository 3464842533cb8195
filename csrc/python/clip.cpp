#include "clip.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "../cpu/float_mode.h"
#include "../cpu/run.h"
#include "../cpu/target.h"
#include "../measures.h"
#include "../rules/rules.h"
#include "check.h"
#include "records.h"

namespace fusedopt {

// The gradients of one call, by dtype and in their order.
struct Clipper::Grads {
  struct ByDtype {
    std::vector<TensorRow> rows;
    std::vector<bool> elsewhere;  // another process measures it
    std::vector<std::unique_ptr<Layout>> layouts;
  };
  std::array<ByDtype, kNumDTypes> by_dtype;
  std::vector<PyObject*> tensors;
  int device = kCpu;
  WrittenMemory memory;
  size_t count = 0;

  Grads() = default;
  Grads(const Grads&) = delete;
  ~Grads() {
    for (PyObject* tensor : tensors) Py_DECREF(tensor);
  }

  // False if they are not all of the usual kind.
  bool read(const py::list& params, bool infinity_norm, const py::object& reduction) {
    py::list counts;
    if (!reduction.is_none()) counts = reduction.attr("counts");
    const Signature* known = nullptr;
    TensorView view;
    for (size_t n = 0; n < params.size(); ++n) {
      const py::handle param = params[n];
      if (!is_tensor(param.ptr())) return false;
      PyObject* grad = get_grad(param.ptr());
      if (!grad) throw py::error_already_set();
      tensors.push_back(grad);
      if (grad == Py_None) continue;
      const bool elsewhere = !reduction.is_none() && !counts[n].cast<bool>();
      grad = reduction.is_none() ? grad : local_part(grad);
      // Many look like the one before.
      std::byte* data;
      if (known && is_plain_tensor(grad) && known->matches(records::of(grad), &data)) {
        view.data = data;
      } else {
        std::string why;
        if (!is_plain_tensor(grad) || py::handle(grad).attr("is_sparse").cast<bool>() ||
            !read_tensor(grad, &view, &why) || is_lazy_view(grad)) {
          return false;
        }
        known = records::available() ? Signature::of(grad, view) : nullptr;
      }
      if (view.is_complex && infinity_norm) return false;  // the largest of absolute values there
      if (count++ == 0) device = view.device;
      if (view.device != device) return false;
      ByDtype& group = by_dtype[static_cast<int>(view.dtype)];
      Streams streams;
      streams.count = kGrad + 1;
      streams.view[kParam] = streams.view[kGrad] = view;
      TensorRow row{};
      group.layouts.push_back(plan_row(streams, &row));
      row.layout = group.layouts.back().get();
      group.rows.push_back(row);
      group.elsewhere.push_back(elsewhere);
    }
    const auto is_none = [](PyObject* tensor) {
      const bool none = tensor == Py_None;
      if (none) Py_DECREF(tensor);
      return none;
    };
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_none), tensors.end());
    size_t owner = 0;
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const TensorRow& row : by_dtype[dtype].rows) memory.add(row, kGrad + 1, static_cast<DType>(dtype), owner++);
    }
    WrittenMemory::Region a, b;
    return (count > 0 || !reduction.is_none()) && !memory.find_overlap(&a, &b);
  }
};

py::object Clipper::clip(py::list params, double max_norm, bool infinity_norm, bool error_if_nonfinite,
                         const py::function& buffer, const py::object& reduction, int max_threads) {
  const FloatMode mode;
  Grads grads;
  if (!grads.read(params, infinity_norm, reduction)) return py::none();
  Question question{};
  question.is_double = !grads.by_dtype[static_cast<int>(DType::kFloat64)].rows.empty() ||
                       (!reduction.is_none() && reduction.attr("is_double").cast<bool>());
  question.infinity_norm = question.largest = infinity_norm;
  question.clip = true;
  question.max_norm = max_norm;
  if (grads.device == kCpu) return clip_on_host(&grads, question, error_if_nonfinite, reduction, max_threads);
  if (error_if_nonfinite) return py::none();  // it waits for the device, so there is nothing to be gained
  return clip_on_device(&grads, question, buffer, reduction);
}

py::object Clipper::clip_on_host(Grads* grads, const Question& question, bool error_if_nonfinite,
                                 const py::object& reduction, int max_threads) {
  const Target& target = current_target();
  std::vector<TensorRow> rows;
  std::vector<Beside> beside;
  std::vector<size_t> first_parts, num_parts(kNumDTypes);
  size_t all_parts = 0;
  int64_t cost = 0;
  Common::Scalars<float> scalars_f32 = Common::scalars<float>({}, false, 0);
  Common::Scalars<double> scalars_f64 = Common::scalars<double>({}, false, 0);
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    const DType type = static_cast<DType>(dtype);
    const auto& group = grads->by_dtype[dtype];
    for (size_t i = 0; i < group.rows.size(); ++i) {
      TensorRow row = group.rows[i];
      row.scalars = type == DType::kFloat64 ? static_cast<const void*>(&scalars_f64) : &scalars_f32;
      row.update = target.find(kScaleRule, 0, type);
      row.start = cost;
      cost += row.numel + kRowCost;
      rows.push_back(row);
      beside.push_back({Ema::kNone, group.elsewhere[i] ? nullptr : target.find_norm(type), nullptr, nullptr});
      first_parts.push_back(all_parts);
      const size_t parts = static_cast<size_t>((row.numel + kPart - 1) / kPart);
      num_parts[dtype] += parts;
      all_parts += parts;
    }
  }
  std::vector<NormPart> parts(all_parts);
  for (size_t i = 0; i < rows.size(); ++i) {
    beside[i].norm = parts.data() + first_parts[i];
    rows[i].beside = &beside[i];
  }

  const auto num_rows = static_cast<int64_t>(rows.size());
  double answer[kAnswerSize] = {};
  {
    py::gil_scoped_release release;
    measure_rows(rows.data(), num_rows, {false, 1, question.largest}, cost, max_threads);
    NormPart all = {0, 0};
    const NormPart* at = parts.data();
    for (const size_t count : num_parts) {
      all = combine(all, total(at, static_cast<int64_t>(count)));
      at += count;
    }
    answer[kSum] = all.sum;
    answer[kLargest] = all.largest;
  }
  if (!reduction.is_none()) {
    const auto found = reduction.attr("add_up_numbers")(answer[kSum], answer[kLargest]).cast<std::array<double, 2>>();
    answer[kSum] = found[0];
    answer[kLargest] = found[1];
  }
  decide(question, false, answer, nullptr);
  const py::object norm = py::make_tuple(answer[kNorm], question.is_double);
  if (error_if_nonfinite && !std::isfinite(answer[kNorm])) return norm;  // the caller raises
  records::bump_versions(grads->tensors.data(), grads->tensors.size());
  if (answer[kClip] == 1) return norm;
  for (TensorRow& row : rows) row.beside = nullptr;
  scalars_f32.clip = static_cast<float>(answer[kClip]);
  scalars_f64.clip = answer[kClip];
  py::gil_scoped_release release;
  run_rows(rows.data(), num_rows, cost, max_threads);
  return norm;
}

py::object Clipper::clip_on_device(Grads* grads, const Question& question, const py::function& buffer,
                                   const py::object& reduction) {
  const int device = grads->device;
  const TorchDevice current(device);
  void* const stream = current_stream(device);
  const auto is_it = [&](const auto& known) { return known->device == device && known->stream == stream; };
  auto found = std::find_if(streams_.begin(), streams_.end(), is_it);
  if (found == streams_.end()) {
    auto made = std::make_unique<OnStream>();
    made->device = device;
    made->stream = stream;
    made->answer = buffer(static_cast<int>(kAnswerSize), torch_device(device));
    found = streams_.insert(streams_.end(), std::move(made));
  }
  OnStream& here = **found;
  TensorView answer;
  std::string why;
  if (!read_tensor(here.answer.ptr(), &answer, &why)) throw std::runtime_error("clip_grad_norm_: " + why);
  const cuda::Options options = {question};
  const Common::Scalars<float> scalars_f32 = Common::scalars<float>({}, false, 0);
  const Common::Scalars<double> scalars_f64 = Common::scalars<double>({}, false, 0);
  std::vector<cuda::Table*> tables;
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    const auto& rows = grads->by_dtype[dtype].rows;
    if (rows.empty()) continue;
    const DType type = static_cast<DType>(dtype);
    if (!here.tables[dtype]) here.tables[dtype] = std::make_unique<cuda::Table>();
    cuda::Table& table = *here.tables[dtype];
    const bool is_double = type == DType::kFloat64;
    table.begin();
    const std::vector<bool>& elsewhere = grads->by_dtype[dtype].elsewhere;
    for (size_t i = 0; i < rows.size(); ++i) {
      const void* scalars = is_double ? static_cast<const void*>(&scalars_f64) : &scalars_f32;
      table.add(rows[i], {scalars, 0, 0, false, nullptr, 0, elsewhere[i]});
    }
    cuda::StepInfo info{};
    info.rule = kScaleRule;
    info.dtype = type;
    info.scalars_size = is_double ? sizeof scalars_f64 : sizeof scalars_f32;
    info.options = reinterpret_cast<const std::byte*>(&options);
    info.options_size = sizeof options;
    info.full = info.norm = true;
    info.how = {false, 1, question.largest};
    info.answer = reinterpret_cast<double*>(answer.data);
    info.device = device;
    info.stream = stream;
    info.capturing = cuda::runtime()->is_capturing(info.stream);
    table.prepare(info, true);
    tables.push_back(&table);
  }
  records::bump_versions(grads->tensors.data(), grads->tensors.size());
  const bool adds_up = !reduction.is_none();
  for (cuda::Table* table : tables) table->launch_norm(table == tables.front(), table == tables.back() && !adds_up);
  if (adds_up) {
    reduction.attr("add_up")(here.answer.attr("narrow")(0, static_cast<int>(kSum), 2));
    tables.back()->launch_decision();
  }
  for (cuda::Table* table : tables) table->launch(false, false);
  return py::make_tuple(here.answer, question.is_double);
}

}  // namespace fusedopt
