#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

namespace sppo {

static Capability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kDefault;
}

Capability cpu_capability() {
  static const Capability chosen = [] {
    Capability have = detect();
    const char* asked = std::getenv("SPPO_KERNELS_CPU_CAPABILITY");
    if (asked != nullptr) {
      Capability want = have;
      if (std::strcmp(asked, "default") == 0) want = Capability::kDefault;
      if (std::strcmp(asked, "avx2") == 0) want = Capability::kAvx2;
      if (static_cast<int>(want) < static_cast<int>(have)) return want;
    }
    return have;
  }();
  return chosen;
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512: return "avx512";
    case Capability::kAvx2: return "avx2";
    default: return "default";
  }
}

}  // namespace sppo
