// A rule as the stepper sees it: reads the groups' options and hands out each row's scalars.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../lanes/lane.h"
#include "../rules/rules.h"
#include "tensor.h"

namespace fusedopt {

// What GradScaler leaves on the optimizer, for one step.
struct Unscale {
  bool wanted = false;
  double inv_scale = 1;
};

// A learning rate that is a tensor: torch rounds the result of every operation on it to the tensor's dtype.
struct TensorLr {
  double value;
  DType dtype;

  TensorLr rounded(double x) const {
    switch (dtype) {
      case DType::kFloat64: return {x, dtype};
      case DType::kFloat32: return {static_cast<float>(x), dtype};
      case DType::kBFloat16: return {to_float(to_bfloat16(static_cast<float>(x))), dtype};
      case DType::kFloat16: return {to_float(to_half(static_cast<float>(x))), dtype};
    }
    return {x, dtype};
  }
  // The other operand of torch's kernel is the number in the tensor's opmath.
  double operand(double x) const { return dtype == DType::kFloat64 ? x : static_cast<float>(x); }

  friend TensorLr operator*(TensorLr lr, double x) { return lr.rounded(lr.value * lr.operand(x)); }
  friend TensorLr operator/(TensorLr lr, double x) { return lr.rounded(lr.value / lr.operand(x)); }
  friend TensorLr operator-(double x, TensorLr lr) { return lr.rounded(x - lr.value); }
  friend TensorLr operator-(TensorLr lr) { return {-lr.value, lr.dtype}; }
  explicit operator double() const { return value; }
  explicit operator float() const { return static_cast<float>(value); }
};

// One parameter group's dict, for Rule::options.
class Group {
 public:
  Group(PyObject* dict, PyObject* const* keys, const char* const* key_names, const char* optimizer, size_t index)
      : dict_(dict), keys_(keys), key_names_(key_names), optimizer_(optimizer), index_(index) {}

  PyObject* get(int key) const {
    PyObject* value = PyDict_GetItemWithError(dict_, keys_[key]);
    if (value) return value;
    if (PyErr_Occurred()) throw py::error_already_set();
    throw py::key_error(where(key) + " is missing");
  }

  double number(int key) const { return as_number(get(key), key); }

  // One of a pair of numbers.
  double number(int key, Py_ssize_t item) const {
    PyObject* pair = get(key);
    if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) > item) return as_number(PyTuple_GET_ITEM(pair, item), key);
    const py::object value = py::reinterpret_steal<py::object>(PySequence_GetItem(pair, item));
    if (value) return as_number(value.ptr(), key);
    const bool short_pair = PyErr_ExceptionMatches(PyExc_IndexError);
    PyErr_Clear();
    const std::string problem = where(key) + " must be a pair of numbers, got " + py::repr(pair).cast<std::string>();
    if (short_pair) throw py::index_error(problem);
    throw py::type_error(problem);
  }

  // A number that is a tensor.
  TensorView tensor(PyObject* value, int key) const {
    TensorView view;
    std::string why;
    if (!read_number(value, &view, &why)) throw py::type_error(where(key) + " " + why);
    return view;
  }

  bool flag(int key) const {
    PyObject* value = get(key);
    if (value == Py_False) return false;
    if (value == Py_True) return true;
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw py::error_already_set();
    return truth;
  }

  std::string where(int key) const {
    return std::string(optimizer_) + ": param_groups[" + std::to_string(index_) + "]['" + key_names_[key] + "']";
  }

 private:
  double as_number(PyObject* value, int key) const {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (is_tensor(value)) return tensor(value, key).first();
    const double number = PyFloat_AsDouble(value);  // int, NumPy scalar
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(where(key) + " must be a number or a one-element tensor, got " +
                           py::repr(value).cast<std::string>());
    }
    return number;
  }

  PyObject* dict_;
  PyObject* const* keys_;
  const char* const* key_names_;
  const char* optimizer_;
  size_t index_;
};

class RuleDriver {
 public:
  virtual ~RuleDriver() = default;
  virtual int id() const = 0;
  virtual const char* no_sparse() const = 0;
  virtual int max_states() const = 0;
  virtual const char* state_name(int k) const = 0;
  virtual int num_states(int variant) const = 0;
  virtual void begin_step(Unscale unscale) = 0;
  // Reads the options of the next group; returns the variant its rows need.
  virtual int read_group(PyObject* dict, const char* optimizer) = 0;
  // The scalars for a step count, in the opmath of the dtype; valid until begin_step.
  virtual const void* scalars(size_t group, double step, DType dtype) = 0;
};

template <class Rule, int rule_id>
class RuleDriverOf final : public RuleDriver {
 public:
  RuleDriverOf() {
    for (int k = 0; k < Rule::kNumKeys; ++k) keys_[k] = PyUnicode_InternFromString(Rule::kKeys[k]);
  }

  int id() const override { return rule_id; }
  const char* no_sparse() const override { return Rule::kNoSparse; }
  int max_states() const override { return Rule::kNumStates; }
  const char* state_name(int k) const override { return Rule::kStateNames[k]; }
  int num_states(int variant) const override { return Rule::num_states(variant); }

  void begin_step(Unscale unscale) override {
    unscale_ = unscale;
    num_groups_ = 0;
  }

  int read_group(PyObject* dict, const char* optimizer) override {
    const Group group(dict, keys_, Rule::kKeys, optimizer, num_groups_);
    if (num_groups_ == groups_.size()) groups_.emplace_back();
    PerGroup& g = groups_[num_groups_++];
    g.options = Rule::options(group);
    g.by_step.clear();
    g.num_slots = 0;
    PyObject* lr = group.get(Rule::kLr);
    g.lr_is_tensor = is_tensor(lr);
    if (g.lr_is_tensor) {
      const TensorView view = group.tensor(lr, Rule::kLr);
      g.lr = view.first();
      g.lr_dtype = view.dtype;
    } else {
      g.lr = group.number(Rule::kLr);
    }
    return Rule::variant(group);
  }

  const void* scalars(size_t group, double step, DType dtype) override {
    PerGroup& g = groups_[group];
    PerStep*& found = g.by_step[step];
    if (!found) {
      if (g.num_slots == g.slots.size()) g.slots.emplace_back();
      found = &g.slots[g.num_slots++];
      *found = {};
    }
    PerStep& at = *found;
    if (dtype == DType::kFloat64) {
      if (!at.has_f64) at.f64 = make<double>(g, step), at.has_f64 = true;
      return &at.f64;
    }
    if (!at.has_f32) at.f32 = make<float>(g, step), at.has_f32 = true;
    return &at.f32;
  }

 private:
  struct PerStep {
    bool has_f32 = false, has_f64 = false;
    typename Rule::template Scalars<float> f32;
    typename Rule::template Scalars<double> f64;
  };
  struct PerGroup {
    typename Rule::Options options;
    double lr;
    bool lr_is_tensor;
    DType lr_dtype;
    std::unordered_map<double, PerStep*> by_step;
    std::deque<PerStep> slots;  // used again in every step, so that the rows' pointers to them stay
    size_t num_slots = 0;
  };

  template <class T>
  typename Rule::template Scalars<T> make(const PerGroup& g, double step) const {
    if (g.lr_is_tensor) {
      return Rule::template scalars<T>(g.options, TensorLr{g.lr, g.lr_dtype}, step, unscale_.wanted,
                                       unscale_.inv_scale);
    }
    return Rule::template scalars<T>(g.options, g.lr, step, unscale_.wanted, unscale_.inv_scale);
  }

  PyObject* keys_[Rule::kNumKeys];
  Unscale unscale_;
  std::vector<PerGroup> groups_;
  size_t num_groups_ = 0;
};

template <int id = 0, class First, class... Rest>
std::unique_ptr<RuleDriver> make_rule_driver(RuleList<First, Rest...>, const std::string& name) {
  if (name == First::kName) return std::make_unique<RuleDriverOf<First, id>>();
  if constexpr (sizeof...(Rest) > 0) return make_rule_driver<id + 1>(RuleList<Rest...>{}, name);
  throw py::value_error("no update rule is called '" + name + "'");
}

}  // namespace fusedopt
