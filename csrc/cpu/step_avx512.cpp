#include "../lanes/avx512.h"
#include "step.h"

namespace fusedopt {

static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

extern const Target kAvx512Target;
const Target kAvx512Target = {
    "avx512", supported, Kernels<avx512::F32, avx512::F64>::find, Kernels<avx512::F32, avx512::F64>::find_norm,
    run,      units_run};

}  // namespace fusedopt
