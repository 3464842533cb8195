// One optimizer's step: finds out what changed since the last one, checks it, and runs the kernels once.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda/driver.h"
#include "check.h"
#include "phase.h"
#include "precision.h"
#include "records.h"
#include "rule_driver.h"
#include "sparse.h"

namespace fusedopt {

class Stepper {
 public:
  // `rule`: its name in the registry; `optimizer`: the class to name in errors. `first`: where the first parameter of
  // the first group is in an optimizer that has more, for errors and for draws.
  struct Seat {
    size_t group = 0, index = 0, position = 0;
  };
  Stepper(const std::string& rule, std::string optimizer, const Seat& first);
  ~Stepper();

  // One step over all groups; torch.optim's param_groups and state. Of the optimizer it calls _new_states, for what
  // parameters have not, and _new_buffer. `report_inf`: a tensor to be told whether a gradient was inf or nan, or None.
  // Returns how many parameters were updated. If it throws, no parameter, state or step count was changed.
  int64_t step(py::handle optimizer, py::list param_groups, py::dict state, py::object grad_scale, py::object found_inf,
               py::object report_inf, int max_threads);
  // Whether a norm was ever measured, and whether the last is a double (a gradient was).
  bool has_norm() const { return has_norm_; }
  bool norm_is_double() const { return norm_is_double_; }
  // How many devices the parameters lie on; 0 if some have never been read.
  int num_devices() const;
  // Which parameters the last step with statistics updated.
  const std::vector<bool>& took_part() const { return took_part_; }
  // The tensors that the steps left their findings in; null if there was nothing.
  py::object answer() const { return answer_.tensor ? answer_.tensor : py::none(); }
  py::object stats() const { return stats_.tensor ? stats_.tensor : py::none(); }
  // The names of a parameter's state in a group: "step", then names, or, if it is not plain, names with dtypes.
  py::list state_names(py::handle param, py::dict group);
  // Reads everything anew in the next step.
  void forget();
  // Writes the groups' options of now to the tables of captured CUDA graphs: their next replays use them.
  void update_captured(py::list param_groups);

 private:
  struct Entry;
  class Scan;
  class Busy;
  struct OnDevice {
    int device, rule;
    DType dtype;
    cuda::Table table;
    const Entry* host_counted = nullptr;  // a row of this step whose count is the host's
  };
  struct Dirty {
    size_t entry;
    PyObject *param, *grad;  // held by the scan
  };

  enum class Look : uint8_t { kSitsOut, kUnchanged, kGradMoved, kChanged };
  // What of a step a parameter takes part in: nothing, the moving average alone, all.
  enum class Part : uint8_t { kNone, kAverage, kStep };
  // What update_captured() cannot change.
  struct Phase {
    bool norm = false, reports = false, infinity_norm = false, stats = false, averages_alone = false;
    std::vector<double> ema_decays;
    std::vector<Precision> precisions;
  };
  // The row of the moving average alone: of a parameter that has no gradient, or a sparse one.
  struct AverageRow {
    TensorRow row{};
    std::unique_ptr<Layout> layout;
    std::unique_ptr<Form> form;
  };

  void read_options(Scan* scan);
  void read_groups(Scan* scan);
  bool scan_quickly(Scan* scan, int max_threads);
  void scan_holding(Scan* scan);
  void take_part(size_t n, PyObject* param, Look found, Scan* scan);
  Look look(size_t n, size_t group, size_t index, PyObject* param, Scan* scan, PyObject** grad);
  bool unchanged(const Entry& entry, const TensorRow& row, PyObject* param, Scan* scan) const;
  bool refresh_dirty(py::handle optimizer, Scan* scan);
  void refresh(const Dirty& dirty, PyObject* param_state, Scan* scan);
  PyObject* redistributed(const Dirty& dirty, const ParamName& who, Scan* scan) const;
  Form form_of(const Dirty& dirty, const Scan& scan) const;
  py::list names_of(const Form& form, int variant, bool wants_state, bool wants_ema) const;
  void plan_average(size_t n, const Streams& streams, int ema, const Form* form);
  void check_memory(Scan* scan);
  bool find_buffers(py::handle optimizer, Scan* scan);
  int64_t prepare_rows(Scan* scan);
  int64_t prepare_averages(Scan* scan);
  void place_parts(bool norm, bool stats);
  bool is_to_be_skipped(Scan* scan, int64_t cost, int max_threads);
  bool starts(const Entry& entry) const;
  Phase phase_of(const Scan& scan) const;
  Question question_of(const Scan& scan, bool any_double) const;
  void run_paused(Scan* scan, int64_t cost, int max_threads);
  void finish_stats();
  OnDevice& on_device(int device, DType dtype, int rule);
  void prepare_tables(Scan* scan, int64_t cost);
  void launch_norms(const Scan& scan);
  void launch_tables(const Scan& scan);
  std::vector<OnDevice*> tables_of(bool averages) const;
  bool find_reduction(Scan* scan);
  // Is the gradient's norm another process's to measure?
  bool is_elsewhere(size_t n, const Scan& scan) const;
  py::object totals() const;
  void add_up() const;
  cuda::StepInfo step_info(int rule, int device, DType dtype, bool counts_there, Scan* scan);
  bool is_sparse(size_t n) const;
  // Of a state tensor: of stream kState + k.
  PyObject* state_name(const Entry& entry, int k) const;
  // What WrittenMemory is told of a parameter, and of its gradient.
  const TensorRow& written_row(size_t n) const;
  const TensorRow& grad_row(size_t n) const;
  ParamName name(const Entry& entry, const Scan& scan) const;

  std::unique_ptr<RuleDriver> rule_;
  std::string optimizer_;
  Seat first_;
  PyObject* str_step_;
  PyObject* str_params_;
  PyObject* str_ema_;
  PyObject* str_scales_;
  PyObject* str_companions_[4];
  PyObject* state_names_[kMaxStates];

  const struct Target* target_ = nullptr;
  std::vector<Entry> entries_;  // one for each parameter, in the groups' order
  std::vector<TensorRow> rows_;
  std::unordered_map<size_t, SparseRow> sparse_;     // of entries that have had a sparse gradient; they do not move
  std::unordered_map<size_t, AverageRow> averages_;  // of entries that have had one
  std::vector<TensorRow> average_rows_;              // of this step
  PhaseOptions phase_;
  PrecisionOptions precision_;
  std::vector<Precision> precisions_;  // of the groups, at the last step
  std::vector<Beside> beside_;         // of the rows, where something is wanted
  std::vector<NormPart> norm_parts_;
  std::vector<StatsPart> stats_parts_;
  // Tensors of the optimizer: the answer (measures.h) and the statistics, and where they lie.
  struct Buffer {
    py::object tensor;
    int device = kCpu;
    int64_t size = 0;
    double* at = nullptr;
  };
  Buffer answer_, stats_;
  std::vector<std::byte> options_;  // for the kernels: cuda::Options, groups
  std::vector<bool> took_part_;
  Phase captured_;            // of the step that was captured last
  int64_t num_averaged_ = 0;  // steps of the averages, as far as the host knows; 0: they begin with the next
  bool knows_averages_ = false, answer_knows_averages_ = false;
  PyObject* states_ = nullptr;  // the dict of the last scan, and its size
  Py_ssize_t num_states_ = -1;
  void find_buffer(py::handle optimizer, const char* what, int64_t size, int device, Buffer* buffer);
  int64_t num_parts_[kNumDTypes] = {};
  bool has_beside_ = false, has_norm_ = false, norm_is_double_ = false;
  std::vector<Look> looks_;  // a scan's finding for each entry
  std::vector<std::unique_ptr<OnDevice>> tables_;
  WrittenMemory memory_;
  bool refreshed_ = false;         // a parameter was read anew since the tables were last prepared
  bool memory_checked_ = false;    // a step that fails leaves it to the next one to look at all memory anew
  int64_t last_cost_ = INT64_MAX;  // foretells this step's
  bool busy_ = false;
  bool has_distributed_ = false;  // a parameter is a DTensor: its gradient is found through Python
  // Of the parameters: over which processes a norm is added up, and which of them others count (_sharding.Reduction).
  py::object reduction_;
  std::vector<bool> elsewhere_;
  bool reduction_is_stale_ = false, reduction_is_double_ = false;
  int reduction_device_ = kCpu;
};

}  // namespace fusedopt
