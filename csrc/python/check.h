// From what tensors are to what the kernels walk; and every error about a tensor, naming it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../table.h"
#include "tensor.h"

namespace fusedopt {

// Which parameter an error is about.
struct ParamName {
  const char* optimizer;  // the class, as the user knows it
  size_t group, index;    // param_groups[group]["params"][index]
  PyObject* param_group;  // the dict: holds "param_names" for named parameters

  // "AdamW: param_groups[0]['params'][3] ('layer.weight')"
  std::string text() const;
};

// Throws RuntimeError: "<name>: <what> <problem>".
[[noreturn]] void fail(const ParamName& name, const std::string& what, const std::string& problem);

// One parameter's streams, as read.
struct Streams {
  TensorView view[kMaxStreams];
  int count;
};

// Fills row->data and row->numel and returns the layout, null where all streams are dense in one common order. Walked
// in row-major order, or, if any will do, in the parameter's.
std::unique_ptr<Layout> plan_row(const Streams& streams, TensorRow* row, bool any_order = true);

// What an element of a row's stream takes. dtype: of a row without a form.
int64_t itemsize(const TensorRow& row, DType dtype, int stream);

// The memory that the step writes, to find out whether two elements share a byte, or a gradient lies in it.
class WrittenMemory {
 public:
  struct Region {
    const std::byte *begin, *end;
    size_t owner;  // the caller's number for the parameter
    int stream;
    const std::byte* reach;  // the furthest end of this and all earlier regions
  };

  // The stream of a region that is a parameter's step count.
  static constexpr int kStepCount = kMaxStreams;

  void clear();
  // The row and its layout are kept by address.
  void add(const TensorRow& row, int num_streams, DType dtype, size_t owner);
  void add_step_count(const std::byte* step, int64_t itemsize, size_t owner);
  // Sorts, and finds two elements in one place: true, with the two regions they belong to (one and the same if a
  // tensor overlaps itself).
  bool find_overlap(Region* a, Region* b);

  // A stretch of memory around an address that nothing written reaches into.
  struct Gap {
    const std::byte *begin = nullptr, *end = nullptr;
    bool holds(const std::byte* from, const std::byte* to) const { return begin <= from && to <= end; }
  };
  // Does a gradient share memory with what is written? Not if it is, element for element, a stream of its own row:
  // every lane is read before it is written. Call find_overlap first. `gap` is set if the answer is a plain no.
  bool gradient_overlaps(const TensorRow& row, DType dtype, size_t owner, Gap* gap, Region* touched) const;

 private:
  struct Shape {
    const TensorRow* row;
    DType dtype;
  };
  template <class Visit>
  bool any_byte(const Region& region, Visit visit) const;
  bool elements_overlap(size_t from, size_t to, Region* a, Region* b) const;

  size_t first_from(const std::byte* p) const;

  std::vector<Region> regions_;
  mutable size_t cursor_ = 0;
  std::vector<Shape> shapes_;
};

// Do two layouts, null for dense ones, walk what is written the same way?
bool same_written_layout(const Layout* a, const Layout* b, int num_streams);

// The bytes from the first element of a stream to behind its last.
void stream_extent(const TensorRow& row, int stream, DType dtype, const std::byte** begin, const std::byte** end);

}  // namespace fusedopt
