// What a step works on: plain data, shared by the drivers of every device. No torch, no CUDA, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedopt {

// Memory streams of one parameter, in this order: param, grad, the rule's state tensors, what else its form has
// (form.h), the weights' moving average.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kState = 2;
constexpr int kMaxStates = 3;
constexpr int kMaxStreams = kState + kMaxStates + 3;
constexpr int kMaxDims = 64;  // torch's own limit

// Of a row: what all of its streams are, or kMixed, which form.h has more about. Codes are state's alone.
enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kMixed, kCode };
constexpr int kNumDTypes = 5;

// The dimensions of a parameter whose streams are not all dense in one common order: sorted by the parameter's
// strides, those that can be walked as one merged, strides in elements.
struct SparseGrad;

struct Layout {
  struct Dim {
    int64_t size;
    int64_t stride[kMaxStreams];
  };
  const SparseGrad* sparse = nullptr;  // then the dimensions are those of one of its rows; none if all are dense there
  int ndim = 0;
  Dim dim[kMaxDims];  // the last one varies fastest
};

// A sparse (COO) gradient. Value v is a row of elements which belongs where indices[.][v] says, one index for each
// sparse dimension. A TensorRow walks the rows that it touches, one behind the other, and no others.
struct SparseGrad {
  const int64_t* indices;
  int64_t dim_stride, value_stride;  // from one index of a value to its next, from one value's to the next value's
  int64_t grad_stride;               // elements from one value to the next
  int64_t row_numel;                 // elements of a row
  bool is_one_element;               // all that it touches, of a contiguous parameter
  int num_dims;
  const Layout::Dim* dims;  // the sparse ones of the parameter and its state
  // Values that belong in one place are added up: row r is the sum of the values order[first[r]] to
  // order[first[r + 1] - 1], in this order. Null: row r is value r alone.
  const int64_t* order;
  const int64_t* first;
};

struct Form;
struct TensorRow;
struct NormPart;
struct NormOptions;
struct StatsPart;

// Updates elements [begin, end) of a row, counted in the order of its layout.
using UpdateFn = void (*)(const TensorRow& row, int64_t begin, int64_t end);
// Adds up what belongs to a norm, of elements that begin at a multiple of kPart (measures.h).
using MeasureFn = void (*)(const TensorRow& row, const NormOptions& options, int64_t begin, int64_t end);

// What becomes of the weights' moving average, the stream behind the states.
enum class Ema : uint8_t { kNone, kCopy, kMove };

// What is wanted of a row beside its update.
struct Beside {
  Ema ema = Ema::kNone;
  MeasureFn measure = nullptr;  // null: it is another process's to measure
  NormPart* norm = nullptr;     // one for each kPart elements, where measure() writes
  StatsPart* stats = nullptr;   // the same, where update() writes; null: they are not wanted
};

struct TensorRow {
  std::byte* data[kMaxStreams];
  int64_t numel;
  const Layout* layout;  // null when all streams are dense in one common order: the usual case
  const void* scalars;   // the rule's, for this row's group and step, in opmath; null: the row sits this step out
  UpdateFn update;
  int64_t start;         // where this row begins in the step's running total of cost
  const Beside* beside;  // null: nothing
  const Form* form;      // null unless the row is kMixed
};

}  // namespace fusedopt
