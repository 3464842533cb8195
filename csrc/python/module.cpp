// The Python module fusedopt._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include "../cpu/run.h"
#include "../cpu/target.h"
#include "../cuda/driver.h"
#include "clip.h"
#include "stepper.h"

namespace py = pybind11;
using namespace fusedopt;

static py::dict build_info() {
  py::dict info;
  info["version"] = FUSEDOPT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cuda"] = FUSEDOPT_CUDA_STATUS;
  py::list built, usable;
  for (int i = 0; i < kNumTargets; ++i) {
    built.append(kTargets[i]->name);
    if (kTargets[i]->supported()) usable.append(kTargets[i]->name);
  }
  info["cpu_built"] = built;
  info["cpu_usable"] = usable;
  info["cpu_capability"] = current_target().name;
  info["threads"] = can_use_threads();
  info["signatures"] = records::available();
  return info;
}

static py::dict units_run() {
  py::dict counts;
  for (int i = 0; i < kNumTargets; ++i) counts[kTargets[i]->name] = kTargets[i]->units_run();
  counts["cuda"] = cuda::launches();
  return counts;
}

// Why steps on CUDA tensors cannot run here, or None. The first call wakes the driver.
static py::object why_no_cuda() {
  if (!cuda::runtime()) return py::str("this build has no CUDA kernels");
  const char* reason = cuda::runtime()->why_not();
  return reason ? py::object(py::str(reason)) : py::none();
}

// For tests: the CUDA driver on host memory, with the runtime that a library built from tests/cuda_on_host holds.
static void set_cuda_on_host(const std::string& library, bool numbers) {
  static const cuda::Runtime* const real = cuda::runtime();
  if (library.empty()) {
    cuda::set_runtime(real);
    pretend_cuda(Pretend::kNothing);
    return;
  }
  void* handle = dlopen(library.c_str(), RTLD_NOW);
  const void* found = handle ? dlsym(handle, "fusedopt_cuda_on_host") : nullptr;
  if (!found) throw std::runtime_error(dlerror());
  cuda::set_runtime(static_cast<const cuda::Runtime*>(found));
  pretend_cuda(numbers ? Pretend::kNumbers : Pretend::kTensors);
}

// For tests: first_chunk of each row, and the row of each chunk as bytes of int32.
static py::tuple plan_chunks(const std::vector<int64_t>& numel) {
  std::vector<int64_t> first(numel.size());
  std::vector<int32_t> row_of_chunk;
  cuda::plan_chunks(numel.data(), static_cast<int64_t>(numel.size()), first.data(), &row_of_chunk);
  const auto* bytes = reinterpret_cast<const char*>(row_of_chunk.data());
  return py::make_tuple(first, py::bytes(bytes, row_of_chunk.size() * sizeof(int32_t)));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core of fusedopt.";
#ifdef FUSEDOPT_CUDA
  cuda::set_runtime(&cuda::kGpu);
#endif
  m.def(
      "bind_torch",
      [](py::handle torch) {
        bind_tensors(torch);
        records::find(torch);
      },
      "Called once, at import.");
  m.def("build_info", &build_info);
  m.def("set_cpu_capability", &set_current_target, "False if this build or this processor does not have it.");
  m.def("units_run", &units_run,
        "Units of work that each instruction set's own code has run, and launches of CUDA kernels.");
  m.def("chunk_size", &chunk_size);
  m.def("set_chunk_size", &set_chunk_size, "For tests: elements in a unit of work.");
  m.def("why_no_cuda", &why_no_cuda);
  m.def("set_cuda_on_host", &set_cuda_on_host);
  m.def("plan_chunks", &plan_chunks);
  m.attr("cuda_chunk") = cuda::kChunk;
  m.attr("code_block") = kCodeBlock;
  m.def("set_signatures", &records::set_enabled, "For tests: False reads every tensor anew in every step.");
  m.def(
      "check_options",
      [](const py::dict& options, const std::string& optimizer) {
        PhaseOptions().check(options.ptr(), optimizer);
        PrecisionOptions().read(options.ptr(), optimizer + ": ");
      },
      "Raises what a step would, but for the name of the group.");
  m.def("encode_state", &encode_state,
        "Codes of a float32 tensor, rounded to nearest; fills its column of the scales. All contiguous, on the CPU.");
  m.def("decode_state", &decode_state, "The reverse.");
  py::class_<Clipper>(m, "Clipper").def(py::init<>()).def("clip", &Clipper::clip);
  py::class_<Stepper>(m, "Stepper")
      .def(py::init([](const std::string& rule, std::string optimizer, size_t group, size_t index, size_t position) {
             return std::make_unique<Stepper>(rule, std::move(optimizer), Stepper::Seat{group, index, position});
           }),
           py::arg("rule"), py::arg("optimizer"), py::arg("group") = 0, py::arg("index") = 0, py::arg("position") = 0)
      .def("step", &Stepper::step)
      .def_property_readonly("has_norm", &Stepper::has_norm)
      .def_property_readonly("norm_is_double", &Stepper::norm_is_double)
      .def_property_readonly("num_devices", &Stepper::num_devices)
      .def("took_part", &Stepper::took_part)
      .def_property_readonly("answer", &Stepper::answer)
      .def_property_readonly("stats", &Stepper::stats)
      .def("forget", &Stepper::forget)
      .def("state_names", &Stepper::state_names)
      .def("update_captured", &Stepper::update_captured);
}
