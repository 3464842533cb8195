#include "../lanes/avx2.h"
#include "step.h"

namespace fusedopt {

// Every processor with AVX2 has F16C.
static bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Target kAvx2Target;
const Target kAvx2Target = {
    "avx2", supported, Kernels<avx2::F32, avx2::F64>::find, Kernels<avx2::F32, avx2::F64>::find_norm, run, units_run};

}  // namespace fusedopt
