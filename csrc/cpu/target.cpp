#include "target.h"

#include <cstring>

namespace fusedopt {

extern const Target kDefaultTarget;
#ifdef FUSEDOPT_X86
extern const Target kAvx512Target, kAvx2Target;
const Target* const kTargets[] = {&kAvx512Target, &kAvx2Target, &kDefaultTarget};
#else
const Target* const kTargets[] = {&kDefaultTarget};
#endif
const int kNumTargets = sizeof kTargets / sizeof kTargets[0];

static const Target* current = nullptr;

const Target& current_target() {
  for (int i = 0; !current; ++i) {
    if (kTargets[i]->supported()) current = kTargets[i];
  }
  return *current;
}

bool set_current_target(const char* name) {
  for (const Target* target : kTargets) {
    if (std::strcmp(target->name, name) != 0 || !target->supported()) continue;
    current = target;
    return true;
  }
  return false;
}

}  // namespace fusedopt
