// One launch a device and dtype: keeps the kernel's table, finds out what changed in it, uploads that, launches.
#pragma once

#include <cstddef>
#include <unordered_map>
#include <vector>

#include "runtime.h"
#include "table.h"

namespace fusedopt {
namespace cuda {

// Shares rows out into chunks: first_chunk of each row, and the row of each chunk.
void plan_chunks(const int64_t* numel, int64_t num_rows, int64_t* first_chunk, std::vector<int32_t>* row_of_chunk);

// Launches so far, by all tables.
int64_t launches();

// What a step knows of one row beside its TensorRow.
struct RowInfo {
  const void* scalars;  // null: the kernel computes them
  int32_t group;
  int16_t variant;
  bool step_is_double;
  void* step;         // null: the host counts
  int32_t entry = 0;  // its place in the statistics
  bool elsewhere = false;
};

// What is the same for all rows of a launch.
struct StepInfo {
  int rule;
  DType dtype;
  size_t scalars_size;
  const std::byte* options;  // Options and Group<Rule>[]
  size_t options_size;
  const float *found_inf, *grad_scale;
  bool full;       // the step needs what only the full kernels have, beside counts on the device
  double* answer;  // null if nothing is decided
  bool norm;       // measure it first
  NormOptions how;
  float* report_inf;
  double* stats;  // null if they are not wanted
  int device;
  void* stream;
  bool capturing;  // the stream is being captured in a graph
};

// The table of one device and dtype.
class Table {
 public:
  Table() : cuda_(runtime()) {}
  ~Table();
  Table(const Table&) = delete;

  void begin() { num_rows_ = 0; }
  void add(const TensorRow& row, const RowInfo& info);
  // All that can fail but the launch. `changed`: a row's layout may have changed with everything else alike.
  void prepare(const StepInfo& info, bool changed);
  // The norm of all gradients: of the tables of several dtypes, one after the other.
  void launch_norm(bool is_first, bool is_last);
  // Decides by the totals that the answer has: where not all gradients are this process's.
  void launch_decision();
  void launch(bool counts_skips, bool counts_averages);
  // Uploads the groups' options to the tables of captured graphs.
  void update_captured(const StepInfo& info);
  bool empty() const { return num_rows_ == 0; }
  // Do some of the rows count their steps on the device?
  bool on_device() const { return on_device_; }

 private:
  struct Captured {
    std::byte* memory;
    size_t options_at, options_size;
  };
  // Pinned memory that a copy to the device reads; used again only when that copy is done.
  struct Staging {
    std::byte* at;
    size_t capacity;
    void* event;
  };

  void build(const StepInfo& info);
  void upload(const StepInfo& info, std::byte* to, const std::byte* from, size_t bytes);

  const Runtime* cuda_;

  // The rows as they were last given, and what of them is not in the table yet.
  std::vector<Row> rows_;
  std::vector<std::byte*> grads_;
  std::vector<const Layout*> layouts_;
  size_t num_rows_ = 0;
  bool rows_changed_ = true, grads_changed_ = true;
  bool on_device_ = false;  // some count their steps on the device
  bool full_ = false;
  std::vector<const void*> scalars_;  // the sets in use
  std::unordered_map<const void*, int32_t> scalars_index_;

  // The table's image: gradients, scalars, options and groups (what changes often: the hot part), then rows,
  // dimensions, sparse gradients, chunks. Behind it lie the parts that kernels write.
  std::vector<std::byte> image_;
  size_t scalars_at_ = 0, options_at_ = 0, rows_at_ = 0, dims_at_ = 0, sparse_at_ = 0, chunks_at_ = 0, hot_size_ = 0;
  size_t norm_at_ = 0, stats_at_ = 0, size_ = 0;  // of all
  size_t num_more_ = 0, options_size_ = 0;
  int64_t num_chunks_ = 0;

  std::byte* memory_ = nullptr;  // the table
  size_t capacity_ = 0;
  std::vector<std::byte*> retired_;  // outgrown ones, which a kernel may still be reading
  std::vector<Captured> captured_;   // those of graphs, which may be replayed for as long as the process lives
  std::vector<Staging> staging_;
  std::vector<std::byte> args_;
  StepInfo info_{};
};

}  // namespace cuda
}  // namespace fusedopt
