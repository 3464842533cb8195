// clip_grad_norm_: the norm of gradients, and the gradients scaled by it in place.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "../cuda/driver.h"
#include "tensor.h"

namespace fusedopt {

class Clipper {
 public:
  // Clips the gradients of some parameters, and returns their norm before as (a tensor whose first element it is, or a
  // number; whether it is a double). `buffer(size, device)` makes a tensor of doubles. None where torch's own function
  // should be asked: other kinds of tensors, several devices, shared memory. `reduction`: None, or what adds up the
  // norm over processes (_sharding.Reduction), of the parameters that have gradients.
  py::object clip(py::list params, double max_norm, bool infinity_norm, bool error_if_nonfinite,
                  const py::function& buffer, const py::object& reduction, int max_threads);

 private:
  // Kernels of several streams may wait at once, so each has tables of its own.
  struct OnStream {
    int device;
    void* stream;
    py::object answer;
    std::unique_ptr<cuda::Table> tables[kNumDTypes];
  };
  struct Grads;
  py::object clip_on_host(Grads* grads, const struct Question& question, bool error_if_nonfinite,
                          const py::object& reduction, int max_threads);
  py::object clip_on_device(Grads* grads, const struct Question& question, const py::function& buffer,
                            const py::object& reduction);

  std::vector<std::unique_ptr<OnStream>> streams_;
};

}  // namespace fusedopt
