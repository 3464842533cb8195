// A learning rate that is a tensor: torch rounds the result of every operation on it to the tensor's dtype.
#pragma once

#include "../lanes/lane.h"
#include "../table.h"

namespace fusedopt {

struct TensorLr {
  double value;
  DType dtype;

  FUSEDOPT_HD TensorLr rounded(double x) const {
    switch (dtype) {
      case DType::kFloat64: return {x, dtype};
      case DType::kFloat32: return {static_cast<float>(x), dtype};
      case DType::kBFloat16: return {to_float(to_bfloat16(static_cast<float>(x))), dtype};
      case DType::kFloat16: return {to_float(to_half(static_cast<float>(x))), dtype};
      default: break;
    }
    return {x, dtype};
  }
  // The other operand of torch's kernel is the number in the tensor's opmath.
  FUSEDOPT_HD double operand(double x) const { return dtype == DType::kFloat64 ? x : static_cast<float>(x); }

  FUSEDOPT_HD friend TensorLr operator*(TensorLr lr, double x) { return lr.rounded(lr.value * lr.operand(x)); }
  FUSEDOPT_HD friend TensorLr operator/(TensorLr lr, double x) { return lr.rounded(lr.value / lr.operand(x)); }
  FUSEDOPT_HD friend TensorLr operator-(double x, TensorLr lr) { return lr.rounded(x - lr.value); }
  FUSEDOPT_HD friend TensorLr operator-(TensorLr lr) { return {-lr.value, lr.dtype}; }
  FUSEDOPT_HD explicit operator double() const { return value; }
  FUSEDOPT_HD explicit operator float() const { return static_cast<float>(value); }
};

}  // namespace fusedopt
