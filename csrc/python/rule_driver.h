// A rule as the stepper sees it: reads the groups' options and hands out each row's scalars.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda/runtime.h"
#include "../cuda/table.h"
#include "../rules/rules.h"
#include "../rules/tensor_lr.h"
#include "tensor.h"

namespace fusedopt {

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

  // An option that is a tensor on a device, which the kernel reads there.
  struct OnDevice {
    const void* at;
    DType dtype;
    int device;
  };
  // Those that were asked for, in the order of asking. The value of each is 0, of the one at `marked` 1.
  mutable std::vector<OnDevice> on_device;
  size_t marked = SIZE_MAX;

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
    if (is_tensor(value)) {
      const TensorView view = tensor(value, key);
      if (view.device == kCpu) return view.first();
      on_device.push_back({view.data, view.dtype, view.device});
      return on_device.size() - 1 == marked ? 1 : 0;
    }
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
  // Why a group's parameters cannot have sparse gradients; null if they can.
  virtual const char* sparse_problem(size_t group) const = 0;
  virtual int sparse_variant() const = 0;
  virtual bool ascends(size_t group) const = 0;
  virtual int max_states() const = 0;
  virtual const char* state_name(int k) const = 0;
  virtual int num_states(int variant) const = 0;
  virtual bool is_signed(int k) const = 0;
  virtual void begin_step() = 0;
  // Reads the options of the next group; returns the variant its rows need.
  virtual int read_group(PyObject* dict, const char* optimizer, const Context& context) = 0;
  // The scalars for a step count, in the opmath of the dtype; valid until begin_step.
  virtual const void* scalars(size_t group, double step, DType dtype) = 0;
  virtual size_t scalars_size(DType dtype) const = 0;
  // The same for the rule Average, which depend on no step count.
  virtual const void* average_scalars(size_t group, DType dtype, bool starts) const = 0;
  // Clips the gradients of all scalars handed out since begin_step.
  virtual void clip(double coefficient) = 0;
  // The device that the group's lr or another option lies on, which scalars() then cannot know; kCpu if there is none,
  // kSeveral if they lie on different ones.
  static constexpr int kSeveral = -2;
  virtual int options_device(size_t group) const = 0;
  // All groups as a kernel on that device wants them: cuda::Group<Rule>[].
  virtual const std::vector<std::byte>& device_groups(int device) = 0;
};

template <class Rule, int rule_id>
class RuleDriverOf final : public RuleDriver {
 public:
  RuleDriverOf() {
    for (int k = 0; k < Rule::kNumKeys; ++k) keys_[k] = PyUnicode_InternFromString(Rule::kKeys[k]);
  }

  int id() const override { return rule_id; }
  const char* sparse_problem(size_t group) const override { return groups_[group].sparse_problem; }
  bool ascends(size_t group) const override { return groups_[group].options.maximize; }
  int sparse_variant() const override { return Rule::kSparseVariant; }
  int max_states() const override { return Rule::kNumStates; }
  const char* state_name(int k) const override { return Rule::kStateNames[k]; }
  int num_states(int variant) const override { return Rule::num_states(variant); }
  bool is_signed(int k) const override { return Rule::is_signed(k); }

  void begin_step() override { num_groups_ = 0; }

  int read_group(PyObject* dict, const char* optimizer, const Context& context) override {
    Group group(dict, keys_, Rule::kKeys, optimizer, num_groups_);
    if (num_groups_ == groups_.size()) groups_.emplace_back();
    PerGroup& g = groups_[num_groups_++];
    g.context = context;
    for (const bool starts : {false, true}) {
      g.average_f32[starts] = Common::scalars<float>(context, false, 0);
      g.average_f64[starts] = Common::scalars<double>(context, false, 0);
    }
    g.average_f32[true].flags |= Common::kAverageStarts;
    g.average_f64[true].flags |= Common::kAverageStarts;
    g.options = Rule::options(group);
    g.sparse_problem = Rule::sparse_problem(g.options);
    g.on_device = std::move(group.on_device);
    g.lr_at = nullptr;
    if (!g.on_device.empty()) find_offsets(group, &g);
    g.by_step.clear();
    g.num_slots = 0;
    PyObject* lr = group.get(Rule::kLr);
    g.lr_is_tensor = is_tensor(lr);
    if (g.lr_is_tensor) {
      const TensorView view = group.tensor(lr, Rule::kLr);
      g.lr_dtype = view.dtype;
      if (view.device == kCpu) {
        g.lr = view.first();
      } else {
        g.lr_at = view.data;
        g.lr_device = view.device;
        g.lr = 0;
      }
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

  const void* average_scalars(size_t group, DType dtype, bool starts) const override {
    const PerGroup& g = groups_[group];
    return dtype == DType::kFloat64 ? static_cast<const void*>(&g.average_f64[starts]) : &g.average_f32[starts];
  }

  void clip(double coefficient) override {
    for (size_t g = 0; g < num_groups_; ++g) {
      for (size_t i = 0; i < groups_[g].num_slots; ++i) {
        PerStep& slot = groups_[g].slots[i];
        slot.f32.clip = static_cast<float>(coefficient);
        slot.f64.clip = coefficient;
        slot.f32.flags |= Common::kClip;
        slot.f64.flags |= Common::kClip;
      }
    }
  }

  size_t scalars_size(DType dtype) const override {
    return dtype == DType::kFloat64 ? sizeof(typename Rule::template Scalars<double>)
                                    : sizeof(typename Rule::template Scalars<float>);
  }

  int options_device(size_t group) const override {
    const PerGroup& g = groups_[group];
    int device = g.lr_at ? g.lr_device : kCpu;
    for (const Group::OnDevice& number : g.on_device) {
      if (device != kCpu && device != number.device) return kSeveral;
      device = number.device;
    }
    return device;
  }

  const std::vector<std::byte>& device_groups(int device) override {
    device_groups_.assign(num_groups_ * sizeof(cuda::Group<Rule>), std::byte{0});  // padding too: it is compared
    for (size_t i = 0; i < num_groups_; ++i) {
      const PerGroup& g = groups_[i];
      auto& out = reinterpret_cast<cuda::Group<Rule>*>(device_groups_.data())[i];
      out.options = g.options;
      out.context = g.context;
      out.lr = g.lr;
      out.lr_at = g.lr_at;
      out.lr_dtype = g.lr_dtype;
      out.lr_is_tensor = g.lr_is_tensor;
      out.num_numbers = static_cast<int32_t>(g.on_device.size());
      for (size_t k = 0; k < g.on_device.size(); ++k) {
        out.number_at[k] = g.on_device[k].at;
        out.number_dtype[k] = g.on_device[k].dtype;
        out.number_offset[k] = g.offsets[k];
      }
      if constexpr (Rule::kTabulated) {
        if (!g.on_device.empty()) continue;
        const Corrections* found = corrections(g.options, device);
        if (!found) continue;
        out.corrections = static_cast<const typename Rule::Corrections*>(found->at);
        out.num_corrections = found->count;
        out.final = found->final;
      }
    }
    return device_groups_;
  }

 private:
  struct PerStep {
    bool has_f32 = false, has_f64 = false;
    typename Rule::template Scalars<float> f32;
    typename Rule::template Scalars<double> f64;
  };
  struct PerGroup {
    Context context;
    Common::Scalars<float> average_f32[2];  // [starts]
    Common::Scalars<double> average_f64[2];
    typename Rule::Options options;
    double lr = 0;
    const char* sparse_problem = nullptr;
    bool lr_is_tensor = false;
    DType lr_dtype = DType::kFloat32;
    const void* lr_at;  // an lr on a device
    int lr_device;
    std::vector<Group::OnDevice> on_device;
    std::vector<int32_t> offsets;  // in options, of those on a device
    std::unordered_map<double, PerStep*> by_step;
    std::deque<PerStep> slots;  // used again in every step, so that the rows' pointers to them stay
    size_t num_slots = 0;
  };

  template <class T>
  typename Rule::template Scalars<T> make(const PerGroup& g, double step) const {
    const typename Rule::Corrections at_step = Rule::corrections(g.options, step);
    if (const char* problem = Rule::problem(at_step)) throw std::domain_error(problem);
    auto scalars = g.lr_is_tensor ? Rule::template scalars<T>(g.options, TensorLr{g.lr, g.lr_dtype}, at_step, g.context)
                                  : Rule::template scalars<T>(g.options, g.lr, at_step, g.context);
    scalars.step = step_of_draws(step);
    return scalars;
  }

  // Which bytes of the options an option on a device belongs in: those that change when its value does.
  static void find_offsets(Group& group, PerGroup* g) {
    const auto* before = reinterpret_cast<const char*>(&g->options);
    g->offsets.clear();
    if (g->on_device.size() > cuda::kMaxNumbers) throw py::type_error("fusedopt: too many options on a device");
    for (group.marked = 0; group.marked < g->on_device.size(); ++group.marked) {
      group.on_device.clear();
      const typename Rule::Options marked = Rule::options(group);
      if (!g->sparse_problem) g->sparse_problem = Rule::sparse_problem(marked);  // it is not known to be zero
      const auto* after = reinterpret_cast<const char*>(&marked);
      size_t at = 0;
      while (at < sizeof marked && std::memcmp(before + at, after + at, sizeof(double)) == 0) at += sizeof(double);
      g->offsets.push_back(static_cast<int32_t>(at));
    }
  }

  // The corrections for the step counts to come, computed here and kept on the device for the life of the process: a
  // graph may read them.
  struct Corrections {
    const cuda::Runtime* runtime;
    int device;
    typename Rule::Powers powers;  // what they depend on
    void* at;
    int64_t count;
    bool final;
  };
  const Corrections* corrections(const typename Rule::Options& options, int device) {
    if (const char* problem = Rule::problem(Rule::corrections(options, 1))) throw std::domain_error(problem);
    const typename Rule::Powers powers = Rule::powers(options);
    const auto is_wanted = [&](const Corrections& c) {
      return c.runtime == cuda::runtime() && c.device == device && c.powers == powers;
    };
    int used_here = 0;
    for (const Corrections* known : used_) {
      if (is_wanted(*known)) return known;
      used_here += known->device == device;
    }
    // So many different betas of one optimizer are a schedule's: the device uses its own pow for the rest.
    if (used_here >= 16) return nullptr;
    for (const Corrections& known : corrections_) {
      if (is_wanted(known)) return used_.push_back(&known), &known;
    }
    // Beyond this many, too; reached only with a beta above 0.99996.
    constexpr double kMost = 1 << 20;
    const double last = Rule::last_step(options);
    const bool final = last < kMost;
    std::vector<typename Rule::Corrections> all(static_cast<size_t>(final ? std::max(last, 1.0) : kMost) + 1);
    for (size_t t = 0; t < all.size(); ++t) all[t] = Rule::corrections(options, static_cast<double>(t));
    const size_t bytes = all.size() * sizeof all[0];
    void* at = cuda::runtime()->allocate(device, bytes);
    cuda::runtime()->copy_now(device, at, all.data(), bytes);
    corrections_.push_back({cuda::runtime(), device, powers, at, static_cast<int64_t>(all.size()), final});
    used_.push_back(&corrections_.back());
    return used_.back();
  }

  PyObject* keys_[Rule::kNumKeys];
  static inline std::deque<Corrections> corrections_;
  std::vector<const Corrections*> used_;  // by this optimizer: what others did must not change its bits
  std::vector<std::byte> device_groups_;
  std::vector<PerGroup> groups_;
  size_t num_groups_ = 0;
};

template <int id = 0, class First, class... Rest>
std::unique_ptr<RuleDriver> make_rule_driver(RuleList<First, Rest...>, const std::string& name) {
  if constexpr (First::kCountsSteps) {
    if (name == First::kName) return std::make_unique<RuleDriverOf<First, id>>();
  }
  if constexpr (sizeof...(Rest) > 0) return make_rule_driver<id + 1>(RuleList<Rest...>{}, name);
  throw py::value_error("no update rule is called '" + name + "'");
}

}  // namespace fusedopt
