#include "../lanes/scalar.h"
#include "step.h"

namespace fusedopt {

static bool supported() { return true; }

extern const Target kDefaultTarget;
const Target kDefaultTarget = {
    "default", supported, Kernels<portable::F32, portable::F64>::find, Kernels<portable::F32, portable::F64>::find_norm,
    run,       units_run};

}  // namespace fusedopt
