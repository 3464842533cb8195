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
  const PhaseOptions first = *this;
  const size_t index = num_groups_++;
  const std::string where = std::string(optimizer) + ": param_groups[" + std::to_string(index) + "]";
  read(dict, where);
  if (index == 0) return;
  const auto must_agree = [&](Key key, bool same) {
    if (same) return;
    PyObject* value = get(dict, key);
    throw py::value_error(where + "['" + kNames[key] + "'] is " +
                          (value ? py::repr(value).cast<std::string>() : std::string("None")) +
                          ", not what it is in param_groups[0]; it concerns all groups at once: set it in all");
  };
  must_agree(kMaxGradNorm, clip_ == first.clip_ && max_grad_norm_ == first.max_grad_norm_);
  must_agree(kNormType, infinity_norm_ == first.infinity_norm_);
  must_agree(kSkipNonfinite, skip_ == first.skip_);
  must_agree(kStats, stats_ == first.stats_);
}

void PhaseOptions::read(PyObject* dict, const std::string& where) {
  const bool in_group = where.back() == ']';
  const auto name = [&](Key key) { return where + (in_group ? "['" : "") + kNames[key] + (in_group ? "']" : ""); };
  const auto fail = [&](Key key, const char* wanted, PyObject* value, const char* more = "") {
    const std::string problem =
        name(key) + " must be " + wanted + ", got " + py::repr(value).cast<std::string>() + more;
    if (PyFloat_Check(value) || PyLong_CheckExact(value)) throw py::value_error(problem);
    throw py::type_error(problem);
  };
  const auto number = [&](Key key, PyObject* value, const char* wanted) {
    const double x = PyBool_Check(value) ? -1.0 : PyFloat_AsDouble(value);
    if (PyBool_Check(value) || (x == -1.0 && PyErr_Occurred())) {
      PyErr_Clear();
      fail(key, wanted, value);
    }
    return x;
  };
  const auto flag = [&](Key key) {
    PyObject* value = get(dict, key);
    if (value && !PyBool_Check(value)) fail(key, "True or False", value);
    return value == Py_True;
  };

  constexpr const char* kNormWanted = "a number that is not negative, or None";
  PyObject* value = get(dict, kMaxGradNorm);
  clip_ = value != nullptr;
  max_grad_norm_ = clip_ ? number(kMaxGradNorm, value, kNormWanted) : 0;
  if (!(max_grad_norm_ >= 0)) fail(kMaxGradNorm, kNormWanted, value);

  value = get(dict, kNormType);
  const double norm_type = value ? number(kNormType, value, "2.0 or inf") : 2;
  infinity_norm_ = std::isinf(norm_type) && norm_type > 0;
  if (norm_type != 2 && !infinity_norm_)
    fail(kNormType, "2.0 or inf", value, " (fusedopt.clip_grad_norm_ knows others)");

  constexpr const char* kDecayWanted = "a number from 0 to 1, or None";
  value = get(dict, kEmaDecay);
  has_ema_ = value != nullptr;
  ema_decay_ = has_ema_ ? number(kEmaDecay, value, kDecayWanted) : 0;
  if (!(ema_decay_ >= 0 && ema_decay_ <= 1)) fail(kEmaDecay, kDecayWanted, value);

  skip_ = flag(kSkipNonfinite);
  stats_ = flag(kStats);
}

}  // namespace fusedopt
