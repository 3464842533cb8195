// What the driver needs of CUDA: launch.cu has it of a GPU, tests/cuda_on_host of the host. All throw runtime_error,
// and all leave `device` the current one.
#pragma once

#include <cstddef>

#include "../table.h"

namespace fusedopt {
namespace cuda {

struct Runtime {
  // Null if there is a device to run on; else why not.
  const char* (*why_not)();
  void* (*allocate)(int device, size_t bytes);  // zeroed; also while a stream is being captured
  void (*release)(int device, void* memory);    // waits until the device is done with it
  void* (*allocate_pinned)(size_t bytes);
  void (*release_pinned)(void* memory, void* event);
  // Starts a copy from pinned memory; `event` tells when it is done: null to make one.
  void (*copy)(int device, void* to, const void* from, size_t bytes, void* stream, void** event);
  bool (*is_done)(void* event);
  // A copy that is done on return and is no part of a graph that is being captured.
  void (*copy_now)(int device, void* to, const void* from, size_t bytes);
  bool (*is_capturing)(void* stream);
  // All that can keep a kernel from being launched: asked before anything is changed.
  void (*make_ready)(int rule, DType dtype, bool full, int device);
  // args: an Args<Rule, T>. full: with what only the full kernels have (step_thread).
  void (*launch)(int rule, DType dtype, bool full, const void* args, int device, void* stream);
  void (*launch_norm)(DType dtype, const struct NormArgs& args, int device, void* stream);
};

// The one in use; null if this build has none.
const Runtime* runtime();
void set_runtime(const Runtime* runtime);

// Of launch.cu.
extern const Runtime kGpu;

}  // namespace cuda
}  // namespace fusedopt
