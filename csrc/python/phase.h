// The options around the update that all rules share: the gradients' norm, what is decided by it, the moving average of
// the weights, statistics.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "../measures.h"
#include "../rules/common.h"

namespace fusedopt {

namespace py = pybind11;

class PhaseOptions {
 public:
  PhaseOptions();

  void begin() { num_groups_ = 0; }
  // Reads the next group's, which must be those of the first but for ema_decay. Throws, naming the group.
  void read_group(PyObject* dict, const char* optimizer);
  // The same for a constructor's arguments.
  void check(PyObject* dict, const std::string& optimizer) { read(dict, optimizer + ": "); }

  bool clips() const { return clip_; }
  bool skips() const { return skip_; }
  bool wants_stats() const { return stats_; }
  bool infinity_norm() const { return infinity_norm_; }
  double max_grad_norm() const { return max_grad_norm_; }
  // Of the group that was read last.
  bool has_ema() const { return has_ema_; }
  double ema_decay() const { return ema_decay_; }

 private:
  // `where`: what an error says before the option's name.
  void read(PyObject* dict, const std::string& where);

  enum Key { kMaxGradNorm, kNormType, kSkipNonfinite, kEmaDecay, kStats, kNumKeys };
  PyObject* get(PyObject* dict, Key key) const;

  PyObject* keys_[kNumKeys];
  size_t num_groups_ = 0;
  bool clip_ = false, infinity_norm_ = false, skip_ = false, stats_ = false, has_ema_ = false;
  double max_grad_norm_ = 0, ema_decay_ = 0;
};

}  // namespace fusedopt
