#include "precision.h"

#include <stdexcept>
#include <tuple>

#include "../codecs.h"
#include "../cpu/float_mode.h"

namespace fusedopt {

static constexpr const char* kNames[] = {"master_weights", "rounding", "state_dtype", "seed"};

PrecisionOptions::PrecisionOptions() : str_nearest_(PyUnicode_InternFromString("nearest")) {
  for (int k = 0; k < kNumKeys; ++k) keys_[k] = PyUnicode_InternFromString(kNames[k]);
  const py::module_ torch = py::module_::import("torch");
  float32_ = py::object(torch.attr("float32")).release().ptr();
  bfloat16_ = py::object(torch.attr("bfloat16")).release().ptr();
}

Precision PrecisionOptions::read_group(PyObject* dict, const char* optimizer, size_t index) const {
  // Almost always all are at their defaults.
  const auto is = [&](Key key, PyObject* value) {
    PyObject* found = PyDict_GetItemWithError(dict, keys_[key]);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return !found || found == value;
  };
  if (is(kMasterWeights, Py_False) && is(kRounding, str_nearest_) && is(kStateDtype, Py_None)) {
    PyObject* seed = PyDict_GetItemWithError(dict, keys_[kSeed]);
    if (!seed || (PyLong_CheckExact(seed) && PyObject_IsTrue(seed) == 0)) return {};
  }
  return read(dict, std::string(optimizer) + ": param_groups[" + std::to_string(index) + "]");
}

Precision PrecisionOptions::read(PyObject* dict, const std::string& where) const {
  const bool in_group = where.back() == ']';
  const auto name = [&](Key key) { return where + (in_group ? "['" : "") + kNames[key] + (in_group ? "']" : ""); };
  const auto fail = [&](Key key, const char* wanted, PyObject* value) {
    const std::string problem = name(key) + " must be " + wanted + ", got " + py::repr(value).cast<std::string>();
    if (PyUnicode_Check(value) || PyLong_CheckExact(value) || PyFloat_Check(value)) throw py::value_error(problem);
    throw py::type_error(problem);
  };
  const auto get = [&](Key key) {
    PyObject* value = PyDict_GetItemWithError(dict, keys_[key]);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  };
  const auto is = [](PyObject* value, const char* text) {
    return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
  };

  Precision precision;
  if (PyObject* value = get(kMasterWeights)) {
    if (is(value, "split")) {
      precision.masters = Precision::kSplit;
    } else if (PyBool_Check(value)) {
      precision.masters = value == Py_True ? Precision::kWhole : Precision::kNone;
    } else {
      fail(kMasterWeights, "True, False or 'split'", value);
    }
  }
  if (PyObject* value = get(kRounding)) {
    if (is(value, "stochastic")) {
      precision.rounding = Precision::kStochastic;
    } else if (is(value, "kahan")) {
      precision.rounding = Precision::kKahan;
    } else if (!is(value, "nearest")) {
      fail(kRounding, "'nearest', 'stochastic' or 'kahan'", value);
    }
    if (precision.rounding != Precision::kNearest && precision.masters != Precision::kNone)
      throw py::value_error(name(kRounding) + " is " + py::repr(value).cast<std::string>() +
                            ", but with master_weights nothing is lost to rounding: choose one of the two");
  }
  if (PyObject* value = get(kStateDtype)) {
    if (value == float32_ || is(value, "float32")) {
      precision.state = Precision::kFloat32;
    } else if (value == bfloat16_ || is(value, "bfloat16")) {
      precision.state = Precision::kBFloat16;
    } else if (is(value, "int8")) {
      precision.state = Precision::kInt8;
    } else if (value != Py_None) {
      fail(kStateDtype, "None, torch.float32, torch.bfloat16 or 'int8'", value);
    }
  }
  if (PyObject* value = get(kSeed)) {
    if (!PyLong_CheckExact(value)) fail(kSeed, "an integer from 0 to 2**64 - 1", value);
    precision.seed = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      fail(kSeed, "an integer from 0 to 2**64 - 1", value);
    }
  }
  return precision;
}

// Elements of a row of dimension 0; 1 if there are none.
static int64_t row_numel(const TensorView& view) {
  int64_t numel = 1;
  for (int d = 1; d < view.ndim; ++d) numel *= view.shape[d];
  return numel > 0 ? numel : 1;
}

// A function of fusedopt/_sharding.py, whose ValueError is what is wrong with the parameter.
static py::object ask(const char* function, py::handle param, int64_t argument) {
  try {
    const py::object asked = py::module_::import("fusedopt._sharding").attr(function);
    return argument ? asked(param, argument) : asked(param);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError)) throw;
    throw std::runtime_error(py::str(error.value()).cast<std::string>());
  }
}

Place place_of(PyObject* param, const TensorView& view, DType grad, const Precision& precision) {
  Place place;
  place.row_numel = row_numel(view);
  const bool is_plain = precision == Precision{} && grad == view.dtype;
  if (is_plain || !is_distributed(param)) return place;
  place.cut = param;
  std::tie(place.first, place.run, place.stride, place.row_numel) =
      ask("place", param, 0).cast<std::tuple<int64_t, int64_t, int64_t, int64_t>>();
  return place;
}

bool find_form(const Precision& precision, const TensorView& param, const Place& place, DType grad, int num_states,
               size_t position, Form* form) {
  const bool is_half = !param.is_complex && (param.dtype == DType::kBFloat16 || param.dtype == DType::kFloat16);
  const bool is_single = !param.is_complex && param.dtype == DType::kFloat32;
  if (!is_half && !is_single) {
    if (precision.state != Precision::kAsIs)
      throw std::runtime_error(std::string("has dtype ") + dtype_name(param.dtype, param.is_complex) +
                               ", whose state cannot have a state_dtype of its own: use None in its group");
    return false;
  }
  const Precision::Masters masters = is_half ? precision.masters : Precision::kNone;
  const Precision::Rounding rounding = is_half ? precision.rounding : Precision::kNearest;
  if (masters == Precision::kSplit && param.dtype != DType::kBFloat16)
    throw std::runtime_error("has dtype torch.float16, which master_weights='split' is not for: use True");

  Form& f = *form;
  f = {};
  f.param = param.dtype;
  f.grad = grad;
  f.num_states = static_cast<int8_t>(num_states);
  f.position = static_cast<uint32_t>(position);
  f.seed = precision.seed;
  f.first = place.first;
  f.run = place.run;
  f.stride = place.stride;
  f.row_numel = row_numel(param);
  f.companion = masters == Precision::kWhole    ? Companion::kMaster
                : masters == Precision::kSplit  ? Companion::kRemainder
                : rounding == Precision::kKahan ? Companion::kCompensation
                                                : Companion::kNone;
  f.stochastic_param = rounding == Precision::kStochastic;
  switch (precision.state) {
    case Precision::kAsIs: f.state = masters == Precision::kNone ? param.dtype : DType::kFloat32; break;
    case Precision::kFloat32: f.state = DType::kFloat32; break;
    case Precision::kBFloat16: f.state = DType::kBFloat16; break;
    case Precision::kInt8: f.state = place.row_numel < kCodeBlock ? DType::kFloat32 : DType::kCode; break;
  }
  if (f.is_coded() && place.cut) ask("check_blocks", place.cut, kCodeBlock);
  f.ema = masters == Precision::kNone ? param.dtype : DType::kFloat32;
  const bool asked = grad != param.dtype || precision.state != Precision::kAsIs || masters != Precision::kNone ||
                     rounding != Precision::kNearest;
  f.stochastic_state = asked && (f.state == DType::kBFloat16 || f.state == DType::kFloat16);
  return f.state != param.dtype || f.companion != Companion::kNone || f.stochastic_param || f.stochastic_state ||
         grad != param.dtype;
}

namespace {

struct Coded {
  TensorView values, codes, scales;
  Form form;

  Coded(py::handle values_of, py::handle codes_of, py::handle scales_of, int k) {
    std::string why;
    for (const auto& [tensor, view, dtype] :
         {std::tuple{values_of, &values, DType::kFloat32}, std::tuple{codes_of, &codes, DType::kCode},
          std::tuple{scales_of, &scales, DType::kFloat32}}) {
      if (!read_tensor(tensor.ptr(), view, &why, true)) throw std::runtime_error("fusedopt: state " + why);
      if (view->dtype != dtype || !view->is_contiguous()) throw std::runtime_error("fusedopt: state of another dtype");
    }
    const int64_t rows = codes.ndim == 0 ? 1 : codes.shape[0], numel = codes.numel();
    form.row_numel = row_numel(codes);
    if (values.numel() != numel || scales.ndim != 3 || scales.shape[0] != rows || k >= scales.shape[2] ||
        scales.shape[1] != form.blocks_per_row())
      throw std::runtime_error("fusedopt: the scales, of shape " + scales.shape_string() +
                               ", are not those of codes of shape " + codes.shape_string());
  }

  // Calls f(values, codes, count, scale) for each block.
  template <class F>
  void each_block(int k, F f) const {
    const int64_t numel = codes.numel();
    for (int64_t at = 0; at < numel; at = form.block_end(at))
      f(reinterpret_cast<float*>(values.data) + at, reinterpret_cast<uint8_t*>(codes.data) + at,
        form.block_end(at) - at, reinterpret_cast<float*>(scales.data) + form.block_of(at) * scales.shape[2] + k);
  }
};

using One = portable::Lane<float, 1>;
constexpr uint32_t kHalf = 0x8000;  // the draw that rounds to nearest

template <class C>
void encode_all(const Coded& coded, int k) {
  coded.each_block(k, [](const float* values, uint8_t* codes, int64_t count, float* scale) {
    One largest(0.0f);
    for (int64_t i = 0; i < count; ++i) largest = maximum(largest, abs(One(values[i])));
    const BlockScale found = block_scale<C>(largest.v[0]);
    *scale = found.scale;
    const One::Bits noise = One::Bits::noise(One::Bits(kHalf));
    for (int64_t i = 0; i < count; ++i) {
      const One::Bits code = C::encode(One(values[i]), One(found.inverse), noise);
      codes[i] = found.inverse == 0 ? 0 : static_cast<uint8_t>(code.v[0] >> 24);
    }
  });
}

template <class C>
void decode_all(const Coded& coded, int k) {
  coded.each_block(k, [](float* values, const uint8_t* codes, int64_t count, const float* scale) {
    for (int64_t i = 0; i < count; ++i) values[i] = C::template decode<One>(One::Bits(codes[i]), *scale).v[0];
  });
}

}  // namespace

void encode_state(py::handle values, bool is_signed, int k, py::handle codes, py::handle scales) {
  const Coded coded(values, codes, scales, k);
  const FloatMode mode;
  is_signed ? encode_all<SignedCode>(coded, k) : encode_all<UnsignedCode>(coded, k);
}

void decode_state(py::handle codes, bool is_signed, int k, py::handle scales, py::handle values) {
  const Coded coded(values, codes, scales, k);
  const FloatMode mode;
  is_signed ? decode_all<SignedCode>(coded, k) : decode_all<UnsignedCode>(coded, k);
}

}  // namespace fusedopt
