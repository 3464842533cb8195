// One optimizer's step: finds out what changed since the last one, checks it, and runs the kernels once.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda/driver.h"
#include "check.h"
#include "records.h"
#include "rule_driver.h"
#include "sparse.h"

namespace fusedopt {

class Stepper {
 public:
  // `rule`: its name in the registry; `optimizer`: the class to name in errors.
  Stepper(const std::string& rule, std::string optimizer);
  ~Stepper();

  // One step over all groups; torch.optim's param_groups and state. `new_states` makes the state of parameters that
  // have none: it takes [(parameter, (state name, ...)), ...] and returns [{name: tensor}, ...]. Returns how many
  // parameters were updated. If it throws, no parameter, state or step count was changed.
  int64_t step(py::list param_groups, py::dict state, py::function new_states, py::object grad_scale,
               py::object found_inf, int max_threads);
  // Writes the groups' options of now to the tables of captured CUDA graphs: their next replays use them.
  void update_captured(py::list param_groups);

 private:
  struct Entry;
  class Scan;
  class Busy;
  struct OnDevice {
    int device;
    DType dtype;
    cuda::Table table;
    const Entry* host_counted = nullptr;  // a row of this step whose count is the host's
  };
  struct Dirty {
    size_t entry;
    PyObject *param, *grad;  // held by the scan
  };

  enum class Look : uint8_t { kNoGrad, kUnchanged, kGradMoved, kChanged };

  void read_options(Scan* scan);
  void read_groups(Scan* scan);
  bool scan_quickly(Scan* scan, int max_threads);
  void scan_holding(Scan* scan);
  void take_part(size_t n, PyObject* param, Look found, Scan* scan);
  Look look(size_t n, size_t group, size_t index, PyObject* param, Scan* scan, PyObject** grad);
  bool unchanged(const Entry& entry, const TensorRow& row, PyObject* param, Scan* scan) const;
  bool refresh_dirty(const py::function& new_states, Scan* scan);
  void refresh(const Dirty& dirty, PyObject* param_state, Scan* scan);
  void check_memory(Scan* scan);
  int64_t prepare_rows(Scan* scan);
  OnDevice& on_device(int device, DType dtype);
  cuda::StepInfo step_info(int device, DType dtype, bool counts_there, Scan* scan);
  bool is_sparse(size_t n) const;
  // What WrittenMemory is told of a parameter, and of its gradient.
  const TensorRow& written_row(size_t n) const;
  const TensorRow& grad_row(size_t n) const;
  ParamName name(const Entry& entry, const Scan& scan) const;

  std::unique_ptr<RuleDriver> rule_;
  std::string optimizer_;
  PyObject* str_step_;
  PyObject* str_params_;
  PyObject* state_names_[kMaxStates];

  const struct Target* target_ = nullptr;
  std::vector<Entry> entries_;  // one for each parameter, in the groups' order
  std::vector<TensorRow> rows_;
  std::unordered_map<size_t, SparseRow> sparse_;  // of entries that have had a sparse gradient; they do not move
  std::vector<Look> looks_;                       // a scan's finding for each entry
  std::vector<std::unique_ptr<OnDevice>> tables_;
  WrittenMemory memory_;
  bool refreshed_ = false;         // a parameter was read anew since the tables were last prepared
  bool memory_checked_ = false;    // a step that fails leaves it to the next one to look at all memory anew
  int64_t last_cost_ = INT64_MAX;  // foretells this step's
  bool busy_ = false;
};

}  // namespace fusedopt
