// The Python module fusedopt._C.
#include <pybind11/pybind11.h>

#include "../cpu/run.h"
#include "../cpu/target.h"
#include "stepper.h"

namespace py = pybind11;
using namespace fusedopt;

#ifndef FUSEDOPT_CUDA_STATUS
#define FUSEDOPT_CUDA_STATUS "no: not part of this version"
#endif

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
  return counts;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core of fusedopt.";
  m.def(
      "bind_torch",
      [](py::handle torch) {
        bind_tensors(torch);
        records::find(torch);
      },
      "Called once, at import.");
  m.def("build_info", &build_info);
  m.def("set_cpu_capability", &set_current_target, "False if this build or this processor does not have it.");
  m.def("units_run", &units_run, "Units of work that each instruction set's own code has run.");
  m.def("chunk_size", &chunk_size);
  m.def("set_chunk_size", &set_chunk_size, "For tests: elements in a unit of work.");
  m.def("set_signatures", &records::set_enabled, "For tests: False reads every tensor anew in every step.");
  py::class_<Stepper>(m, "Stepper")
      .def(py::init<const std::string&, std::string>(), py::arg("rule"), py::arg("optimizer"))
      .def("step", &Stepper::step);
}
