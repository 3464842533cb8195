#include "phase.h"

#include <cmath>

namespace fusedopt {

static constexpr const char* kNames[] = {"max_grad_norm", "norm_type", "skip_nonfinite", "ema_decay", "stats"};

PhaseOptions::PhaseOptions() {
  for (int k = 0; k < kNumKeys; ++k) keys_[k] = PyUnicode_InternFromString(kNames[k]);
}

// Null for None, and where a group that was not made by this library lacks it.
PyObject* PhaseOptions::get(PyObject* dict, Key key) const {
  PyObject* value = PyDict_GetItemWithError(dict, keys_[key]);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value == Py_None ? nullptr : value;
}

void PhaseOptions::read_group(PyObject* dict, const char* optimizer) {
  const size_t index = num_groups_++;
  const auto where = [&](Key key) {
    return std::string(optimizer) + ": param_groups[" + std::to_string(index) + "]['" + kNames[key] + "']";
  };
  const auto got = [](PyObject* value) { return ", got " + py::repr(value).cast<std::string>(); };
  const auto number = [&](Key key, PyObject* value, const char* wanted) {
    const double x = PyFloat_AsDouble(value);
    if (x == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(where(key) + " must be " + wanted + got(value));
    }
    return x;
  };
  const auto flag = [&](Key key) {
    PyObject* value = get(dict, key);
    const int truth = value ? PyObject_IsTrue(value) : 0;
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  };

  constexpr const char* kNormWanted = "a number that is not negative, or None";
  PyObject* value = get(dict, kMaxGradNorm);
  const bool clip = value != nullptr;
  const double max_grad_norm = clip ? number(kMaxGradNorm, value, kNormWanted) : 0;
  if (!(max_grad_norm >= 0)) throw py::value_error(where(kMaxGradNorm) + " must be " + kNormWanted + got(value));

  value = get(dict, kNormType);
  const double norm_type = value ? number(kNormType, value, "2.0 or inf") : 2;
  if (norm_type != 2 && !(std::isinf(norm_type) && norm_type > 0))
    throw py::value_error(where(kNormType) + " must be 2.0 or inf" + got(value) +
                          "; fusedopt.clip_grad_norm_ knows others");

  constexpr const char* kDecayWanted = "a number from 0 to 1, or None";
  value = get(dict, kEmaDecay);
  has_ema_ = value != nullptr;
  ema_decay_ = has_ema_ ? number(kEmaDecay, value, kDecayWanted) : 0;
  if (!(ema_decay_ >= 0 && ema_decay_ <= 1))
    throw py::value_error(where(kEmaDecay) + " must be " + kDecayWanted + got(value));

  const bool infinity_norm = norm_type != 2, skip = flag(kSkipNonfinite), stats = flag(kStats);
  if (index > 0) {
    const auto must_agree = [&](Key key, bool same) {
      if (!same) throw py::value_error(where(key) + " is not that of param_groups[0]: it concerns all groups at once");
    };
    must_agree(kMaxGradNorm, clip == clip_ && max_grad_norm == max_grad_norm_);
    must_agree(kNormType, infinity_norm == infinity_norm_);
    must_agree(kSkipNonfinite, skip == skip_);
    must_agree(kStats, stats == stats_);
  }
  clip_ = clip;
  max_grad_norm_ = max_grad_norm;
  infinity_norm_ = infinity_norm;
  skip_ = skip;
  stats_ = stats;
}

}  // namespace fusedopt
