// The options that say how parameters and their state are stored, and the form that they come to.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../form.h"
#include "tensor.h"

namespace fusedopt {

// A group's.
struct Precision {
  enum Masters : uint8_t { kNone, kWhole, kSplit };
  enum Rounding : uint8_t { kNearest, kStochastic, kKahan };
  enum State : uint8_t { kAsIs, kFloat32, kBFloat16, kInt8 };
  Masters masters = kNone;
  Rounding rounding = kNearest;
  State state = kAsIs;
  uint64_t seed = 0;

  bool operator==(const Precision& o) const {
    return masters == o.masters && rounding == o.rounding && state == o.state && seed == o.seed;
  }
};

class PrecisionOptions {
 public:
  PrecisionOptions();
  // Throws, naming the option: `where` is what comes before it.
  Precision read(PyObject* dict, const std::string& where) const;
  Precision read_group(PyObject* dict, const char* optimizer, size_t index) const;

 private:
  enum Key { kMasterWeights, kRounding, kStateDtype, kSeed, kNumKeys };
  PyObject* keys_[kNumKeys];
  PyObject *str_nearest_, *float32_ = nullptr, *bfloat16_ = nullptr;
};

// Which part of a larger tensor a parameter is, if it is a DTensor: form.h's first, run and stride; elements of a whole
// row of dimension 0. Throws runtime_error, with what is wrong with the parameter.
struct Place {
  int64_t first = 0, run = 0, stride = 0, row_numel = 0;
  py::handle cut;  // the DTensor
};
Place place_of(PyObject* param, const TensorView& view, DType grad, const Precision& precision);

// The form of a parameter; false if it is a plain one. Throws runtime_error, with what is wrong with the parameter.
bool find_form(const Precision& precision, const TensorView& param, const Place& place, DType grad, int num_states,
               size_t position, Form* form);

// A state tensor of float32 in codes, rounded to nearest, with column k of the scales; and back. CPU, contiguous.
void encode_state(py::handle values, bool is_signed, int k, py::handle codes, py::handle scales);
void decode_state(py::handle codes, bool is_signed, int k, py::handle scales, py::handle values);

}  // namespace fusedopt
