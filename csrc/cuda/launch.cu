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
// tests/check_sass.py: nothing spills on any architecture, and each but the full ones of float64 has room for two
// blocks at the least, whose loads are more than a memory with a latency of a microsecond needs to be busy.
template <class Rule, class S, bool kFull>
constexpr int min_blocks() {
  constexpr bool many_scalars = sizeof(typename Rule::template Scalars<float>) > 56;
  constexpr bool has_sparse = Rule::kSparseVariant >= 0;
  if (kFull) return sizeof(S) == 8 ? 1 : 2;
  return sizeof(S) == 2 ? (many_scalars ? 2 : 3) : has_sparse ? 3 : 0;
}

// Is this the last block to come here? Then it finds what all others have written.
__device__ bool is_last_block(unsigned* blocks_done) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(blocks_done, 1u) == gridDim.x - 1;
    if (is_last) *blocks_done = 0;
  }
  __syncthreads();
  __threadfence();
  return is_last;
}

template <class Rule, class S, class T, bool kFull>
__global__ void __launch_bounds__(kThreads, min_blocks<Rule, S, kFull>())
    step_kernel(const __grid_constant__ Args<Rule, T> args) {
  step_thread<Rule, S, T, kFull>(args, blockIdx.x, gridDim.x, threadIdx.x);
  if (!kFull || !is_last_block(args.at.blocks_done)) return;
  // All blocks have read the step counts.
  if (Rule::kHasCompany) finish_stats(args.at, sizeof(T) == sizeof(double), threadIdx.x);
  count_steps<Rule, T>(args, threadIdx.x);
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs args) {
  constexpr int kWarps = kThreads / 32;
  norm_warp<S, T>(args, int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, int64_t{gridDim.x} * kWarps, threadIdx.x);
  if (!is_last_block(args.at.blocks_done + 1)) return;
  static_assert(kThreads == kColumns, "a column a thread");
  __shared__ NormPart columns[kColumns];
  const int mine = threadIdx.x;
  columns[mine] = column(args.at.norm_parts, args.at.num_chunks, mine);
  for (int apart = kColumns / 2; apart > 0; apart /= 2) {
    __syncthreads();
    if (mine < apart) columns[mine] = combine(columns[mine], columns[mine + apart]);
  }
  if (mine == 0) finish_norm(args, columns[0]);
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

// As many blocks of a kernel as the device holds at once.
template <class Kernel>
int64_t resident(Kernel* kernel, int device, int* known) {
  if (known[device % 64]) return known[device % 64];
  int processors = 0, each = 0;
  const OutsideCapture outside;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0),
        "this build has no kernel for the device; FUSEDOPT_CUDA_ARCHS");
  return known[device % 64] = processors * each;
}

unsigned num_blocks(int64_t wanted, int64_t most) {
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

template <class Rule, class S, class T, bool kFull>
struct Step {
  static inline int blocks[64] = {};
  static void call(int device) { resident(step_kernel<Rule, S, T, kFull>, device, blocks); }

  static void call(const void* raw, int device, void* stream) {
    const auto& args = *static_cast<const Args<Rule, T>*>(raw);
    const int64_t most = resident(step_kernel<Rule, S, T, kFull>, device, blocks);
    step_kernel<Rule, S, T, kFull>
        <<<num_blocks(args.at.num_chunks, most), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check(cudaGetLastError(), "launching the step");
  }
};

template <class S, class T>
struct NormOf {
  static inline int blocks[64] = {};
  static void call(int device) { resident(norm_kernel<S, T>, device, blocks); }

  static void call(const NormArgs* args, int device, void* stream) {
    const int64_t most = resident(norm_kernel<S, T>, device, blocks);
    norm_kernel<S, T>
        <<<num_blocks((args->at.num_chunks + 7) / 8, most), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
    check(cudaGetLastError(), "launching the norm");
  }
};

void make_ready(int rule, DType dtype, bool full, int device) {
  use(device);
  dispatch<Step>(Rules{}, rule, dtype, full, device);
  dispatch_norm<NormOf>(dtype, device);
}

void launch(int rule, DType dtype, bool full, const void* args, int device, void* stream) {
  use(device);
  dispatch<Step>(Rules{}, rule, dtype, full, args, device, stream);
}

void launch_norm(DType dtype, const NormArgs& args, int device, void* stream) {
  use(device);
  dispatch_norm<NormOf>(dtype, &args, device, stream);
}

}  // namespace

const Runtime kGpu = {why_not, allocate, release,      allocate_pinned, release_pinned, copy,
                      is_done, copy_now, is_capturing, make_ready,      launch,         launch_norm};

}  // namespace cuda
}  // namespace fusedopt
