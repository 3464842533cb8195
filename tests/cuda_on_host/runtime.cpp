// CUDA's part played by the host: "device" memory is malloc's, copies are memcpy, and a launch runs csrc/cuda/step.cuh,
// the kernel's own source, for one thread of one block after the other. Loaded by tests/conftest.py.
//
// What it can not show: races, memory order, speed, what nvcc makes of the source.
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <vector>

#include "../../csrc/cpu/float_mode.h"
#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/runtime.h"
#include "../../csrc/cuda/step.cuh"

using namespace fusedopt;
using namespace fusedopt::cuda;

// What happened, for tests.
extern "C" {
int64_t fusedopt_launches = 0, fusedopt_copies = 0, fusedopt_bytes_copied = 0, fusedopt_copies_now = 0;
int64_t fusedopt_pinned = 0, fusedopt_unpinned = 0;
int64_t fusedopt_blocks = 3, fusedopt_first_block = 0;
int64_t fusedopt_capturing = 0, fusedopt_copies_pending = 0;
int64_t fusedopt_fail_allocations = 0, fusedopt_fail_launches = 0;
}

namespace {

// As on a GPU, the source is read some time before the next launch: now, or while copies are pending, then.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
std::vector<Copy> queue;

void run_copies() {
  for (const Copy& copy : queue) std::memcpy(copy.to, copy.from, copy.bytes);
  queue.clear();
}

const char* why_not() { return nullptr; }

void* allocate(int, size_t bytes) {
  if (fusedopt_fail_allocations) throw std::runtime_error("CUDA: allocating the table: out of memory");
  return std::calloc(1, bytes);
}

void release(int, void* memory) { std::free(memory); }

void* allocate_pinned(size_t bytes) {
  ++fusedopt_pinned;
  return std::malloc(bytes);
}

void release_pinned(void* memory, void*) {
  ++fusedopt_unpinned;
  run_copies();
  std::free(memory);
}

void copy(int, void* to, const void* from, size_t bytes, void*, void** event) {
  if (fusedopt_capturing) std::abort();  // it would be repeated at every replay
  ++fusedopt_copies;
  fusedopt_bytes_copied += static_cast<int64_t>(bytes);
  queue.push_back({to, from, bytes});
  if (!fusedopt_copies_pending) run_copies();
  *event = to;
}

bool is_done(void*) { return !fusedopt_copies_pending; }

void copy_now(int, void* to, const void* from, size_t bytes) {
  ++fusedopt_copies_now;
  std::memcpy(to, from, bytes);
}

bool is_capturing(void*) { return fusedopt_capturing; }

// A recorded graph: the launches of a capture, to be replayed.
struct Node {
  void (*run)(const void*);
  std::byte args[4096];
};
std::vector<Node> graph;

template <class Rule, class S, class T, bool kFull>
struct Launch {
  static void run(const void* raw) {
    const FloatMode mode;
    const auto& args = *static_cast<const Args<Rule, T>*>(raw);
    // The last block first: none may depend on another.
    for (int64_t block = fusedopt_blocks - 1; block >= fusedopt_first_block; --block) {
      for (int thread = 0; thread < kThreads; ++thread)
        step_thread<Rule, S, T, kFull>(args, block, fusedopt_blocks, thread);
    }
    if (!kFull) return;
    for (int thread = 0; thread < kThreads; thread += 32) finish_stats(args.at, sizeof(T) == sizeof(double), thread);
    for (int thread = 0; thread < kThreads; ++thread) count_steps<Rule, T>(args, thread);
  }

  static void call(const void* args) {
    static_assert(sizeof(Args<Rule, T>) <= sizeof Node::args, "a kernel's argument has at most 4 KB");
    ++fusedopt_launches;
    if (!fusedopt_capturing) return run(args);
    graph.push_back({run, {}});
    std::memcpy(graph.back().args, args, sizeof(Args<Rule, T>));
  }
};

template <class S, class T>
struct Norm {
  static void run(const void* raw) {
    const FloatMode mode;
    const auto& args = *static_cast<const NormArgs*>(raw);
    const int64_t warps = fusedopt_blocks * kThreads / 32;
    for (int64_t warp = warps - 1; warp >= fusedopt_first_block; --warp) norm_warp<S, T>(args, warp, warps, 0);
    finish_norm(args, total(args.at.norm_parts, args.at.num_chunks));
  }

  static void call(const NormArgs* args) {
    ++fusedopt_launches;
    if (!fusedopt_capturing) return run(args);
    graph.push_back({run, {}});
    std::memcpy(graph.back().args, args, sizeof *args);
  }
};

void make_ready(int, DType, bool, int) {
  if (fusedopt_fail_launches) throw std::runtime_error("CUDA: no kernel image is available for the device");
}

void launch(int rule, DType dtype, bool full, const void* args, int, void*) {
  run_copies();
  dispatch<Launch>(Rules{}, rule, dtype, full, args);
}

void launch_norm(DType dtype, const NormArgs& args, int, void*) {
  run_copies();
  dispatch_norm<Norm>(dtype, &args);
}

}  // namespace

extern "C" void fusedopt_replay() {
  for (const Node& node : graph) node.run(node.args);
}
extern "C" void fusedopt_forget_graph() { graph.clear(); }

extern "C" const Runtime fusedopt_cuda_on_host;
const Runtime fusedopt_cuda_on_host = {why_not, allocate, release,      allocate_pinned, release_pinned, copy,
                                       is_done, copy_now, is_capturing, make_ready,      launch,         launch_norm};
