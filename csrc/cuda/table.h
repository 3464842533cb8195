// What the kernel reads: plain data, made by driver.cpp on the host and uploaded as it is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../form.h"
#include "../measures.h"
#include "../rules/common.h"
#include "../rules/tensor_lr.h"
#include "../table.h"

namespace fusedopt {
namespace cuda {

constexpr int kThreads = 256;       // of a block
constexpr int64_t kChunk = kPart;   // elements that a block takes at a time, all of one row
constexpr int kInlineScalars = 32;  // sets of scalars that travel with the launch itself
constexpr int kMaxNumbers = 4;      // options of a group that may be tensors on the device

// A row of the table. Its gradient's address lies in a list of its own, which changes more often.
struct Row {
  std::byte* data[kMaxStreams];
  void* step;  // the step count, where it lives on the device; else null
  int64_t numel;
  int64_t first_chunk;
  int64_t layout;   // where its dimensions begin in the list of all, -1 if all streams are dense in one common order
  int64_t sparse;   // which of the sparse gradients, whose dimensions lie before the layout's; -1 if it has none
  int32_t ndim;     // of the layout
  int32_t scalars;  // which set; with a step count on the device: which group
  int32_t entry;    // the parameter's place in the statistics
  int16_t variant;
  Ema ema;  // what becomes of the average, the stream behind the states
  bool step_is_double;
  bool elsewhere;  // its gradient's norm is measured by another process
  Form form;       // of a kMixed one
};

// A group whose scalars the kernel computes itself, because its step counts, or its lr, live on the device.
template <class Rule>
struct Group {
  typename Rule::Options options;
  Context context;  // but for what GradScaler left on the device
  double lr;
  const void* lr_at;  // null: lr is `lr`
  DType lr_dtype;
  bool lr_is_tensor;
  // Options that are tensors on the device: where, of what dtype, and the byte of `options` they belong at.
  int32_t num_numbers;
  const void* number_at[kMaxNumbers];
  DType number_dtype[kMaxNumbers];
  int32_t number_offset[kMaxNumbers];
  // corrections[t] for the step counts t = 0 to num_corrections - 1, computed by the host, whose pow is torch's; the
  // last one holds for all later counts if it is `final`. Null if an option is on the device.
  const typename Rule::Corrections* corrections;
  int64_t num_corrections;
  bool final;
};

// What the host tells the kernels in memory, before the groups: also graphs can have it changed.
struct alignas(16) Options {
  Question question;
};

// The kernel's argument: where the table lies, then the first kInlineScalars sets of scalars.
struct Where {
  const Row* rows;
  std::byte* const* grads;
  const Layout::Dim* dims;
  const SparseGrad* sparse;
  const int32_t* row_of_chunk;
  int64_t num_rows, num_chunks;
  const void* groups;        // Group<Rule>[], null if all step counts are the host's
  const void* more_scalars;  // Scalars[], null if those that travel with the launch are all
  // What GradScaler left, null if nothing: a step with *found_inf != 0 changes nothing; gradients are multiplied by
  // the reciprocal of *grad_scale.
  const float* found_inf;
  const float* grad_scale;
  unsigned* blocks_done;  // zero between launches; the second is the norm's
  // For what is decided when all gradients have been read (measures.h); null if nothing is.
  const Options* options;
  double* answer;
  NormPart* norm_parts;  // one a chunk, as the next
  // Null if they are not wanted: parts, and a row for each parameter.
  StatsPart* stats_parts;
  double* stats;
  bool counts_skips;     // that found_inf says; those of the answer are counted
  bool counts_averages;  // the last launch of a step does
};

// The argument of the kernel that measures the gradients' norm. Those of several dtypes are launched one after the
// other, and the last one decides.
struct NormArgs {
  Where at;
  NormOptions how;
  bool is_first, is_last;
  float* report_inf;  // null, or where GradScaler looks for it
};

template <class Rule, class T>
struct Args {
  using Scalars = typename Rule::template Scalars<T>;
  Where at;
  Scalars scalars[kInlineScalars];
};

}  // namespace cuda
}  // namespace fusedopt
