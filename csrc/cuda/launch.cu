// The kernel's entry point, its one launch, and the rest of what the driver needs of CUDA's runtime.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "runtime.h"
#include "step.cuh"

namespace fusedopt {
namespace cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it, if it can be forgotten
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Our copy of the runtime has a current device of its own. The caller has made it torch's current one, and puts that
// back.
void use(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

// Lets this thread do, while a stream is being captured, what is no part of the graph.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Blocks that a multiprocessor must have room for; 0 leaves it to the compiler. By what was found with
// tests/check_sass.py: nothing spills on any architecture, and each has room for two blocks at the least, whose loads
// are more than a memory with a latency of a microsecond needs to be busy.
template <class Rule, class S, bool kOnDevice>
constexpr int min_blocks() {
  constexpr bool many_scalars = sizeof(typename Rule::template Scalars<float>) > 40;
  constexpr bool has_sparse = Rule::kSparseVariant >= 0;
  if (kOnDevice) return sizeof(S) == 4 ? 3 : 2;
  return sizeof(S) == 2 ? (many_scalars ? 2 : 3) : sizeof(S) == 8 && has_sparse ? 3 : 0;
}

template <class Rule, class S, class T, bool kOnDevice>
__global__ void __launch_bounds__(kThreads, min_blocks<Rule, S, kOnDevice>())
    step_kernel(const __grid_constant__ Args<Rule, T> args) {
  step_thread<Rule, S, T, kOnDevice>(args, blockIdx.x, gridDim.x, threadIdx.x);
  if (!kOnDevice) return;
  // The last block to come here finds that all have read the step counts, and counts.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(args.at.blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  count_steps<Rule, T>(args, threadIdx.x);
  if (threadIdx.x == 0) *args.at.blocks_done = 0;
}

const char* why_not() {
  static const std::string reason = [] {
    int count = 0, driver = 0, built = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return std::string();
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&built);
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    if (driver == 0) return std::string("no CUDA driver on this machine");
    if (error == cudaErrorInsufficientDriver)
      return "the driver is for CUDA " + version(driver) + ", this build for " + version(built) +
             ": update the driver, or build with an older toolkit";
    return std::string("no CUDA device: ") + cudaGetErrorString(error);
  }();
  return reason.empty() ? nullptr : reason.c_str();
}

// Does something and waits for it. Not on the legacy stream, which must not be touched while another is captured.
template <class F>
void on_own_stream(const char* what, F f) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const cudaError_t error = f(stream);
  cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(error, what);
}

void* allocate(int device, size_t bytes) {
  use(device);
  const OutsideCapture outside;
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocating the table");
  on_own_stream("clearing the table", [&](cudaStream_t stream) { return cudaMemsetAsync(memory, 0, bytes, stream); });
  return memory;
}

void release(int device, void* memory) {
  use(device);
  const OutsideCapture outside;
  check(cudaFree(memory), "cudaFree");
}

void* allocate_pinned(size_t bytes) {
  const OutsideCapture outside;
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "allocating pinned memory");
  return memory;
}

void copy(int device, void* to, const void* from, size_t bytes, void* stream, void** event) {
  use(device);
  if (!*event) {
    cudaEvent_t made;
    check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreate");
    *event = made;
  }
  const auto on_stream = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, on_stream), "uploading the table");
  check(cudaEventRecord(static_cast<cudaEvent_t>(*event), on_stream), "cudaEventRecord");
}

void release_pinned(void* memory, void* event) {
  const OutsideCapture outside;
  if (event) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  check(cudaFreeHost(memory), "cudaFreeHost");
}

bool is_done(void* event) {
  const OutsideCapture outside;  // another thread may be capturing
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
  if (error == cudaErrorNotReady) return cudaGetLastError(), false;
  check(error, "an earlier kernel");
  return true;
}

void copy_now(int device, void* to, const void* from, size_t bytes) {
  use(device);
  const OutsideCapture outside;
  on_own_stream("uploading the table",
                [&](cudaStream_t stream) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream); });
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// As many blocks as the device holds at once.
template <class Rule, class S, class T, bool kOnDevice>
struct Resident {
  static inline int blocks[64] = {};

  static void call(int device) {
    if (blocks[device % 64]) return;
    int processors = 0, each = 0;
    const OutsideCapture outside;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, step_kernel<Rule, S, T, kOnDevice>, kThreads, 0),
          "this build has no kernel for the device; FUSEDOPT_CUDA_ARCHS");
    blocks[device % 64] = processors * each;
  }
};

template <class Rule, class S, class T, bool kOnDevice>
struct Launch {
  static void call(const void* raw, int device, void* stream) {
    const auto& args = *static_cast<const Args<Rule, T>*>(raw);
    const int64_t most = Resident<Rule, S, T, kOnDevice>::blocks[device % 64];
    const int64_t blocks = args.at.num_chunks < most ? args.at.num_chunks : most;
    step_kernel<Rule, S, T, kOnDevice>
        <<<static_cast<unsigned>(blocks > 0 ? blocks : 1), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check(cudaGetLastError(), "launching the step");
  }
};

void make_ready(int rule, DType dtype, bool on_device, int device) {
  use(device);
  dispatch<Resident>(Rules{}, rule, dtype, on_device, device);
}

void launch(int rule, DType dtype, bool on_device, const void* args, int device, void* stream) {
  use(device);
  dispatch<Launch>(Rules{}, rule, dtype, on_device, args, device, stream);
}

}  // namespace

const Runtime kGpu = {why_not, allocate, release,      allocate_pinned, release_pinned, copy,
                      is_done, copy_now, is_capturing, make_ready,      launch};

}  // namespace cuda
}  // namespace fusedopt
