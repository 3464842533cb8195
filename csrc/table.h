// What a step works on: plain data, shared by the drivers of every device. No torch, no CUDA, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedopt {

// Memory streams of one parameter, in this order: param, grad, then the rule's state tensors.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kState = 2;
constexpr int kMaxStates = 3;
constexpr int kMaxStreams = kState + kMaxStates;
constexpr int kMaxDims = 64;  // torch's own limit

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDTypes = 4;

// The dimensions of a parameter whose streams are not all dense in one common order: sorted by the parameter's
// strides, those that can be walked as one merged, strides in elements.
struct Layout {
  struct Dim {
    int64_t size;
    int64_t stride[kMaxStreams];
  };
  int ndim = 0;
  Dim dim[kMaxDims];  // the last one varies fastest
};

struct TensorRow;

// Updates elements [begin, end) of a row, counted in the order of its layout.
using UpdateFn = void (*)(const TensorRow& row, int64_t begin, int64_t end);

struct TensorRow {
  std::byte* data[kMaxStreams];
  int64_t numel;
  const Layout* layout;  // null when all streams are dense in one common order: the usual case
  const void* scalars;   // the rule's, for this row's group and step, in opmath; null: the row sits this step out
  UpdateFn update;
  int64_t start;  // where this row begins in the step's running total of cost
};

}  // namespace fusedopt
