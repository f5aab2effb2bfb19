// Which instruction set the CPU kernels use: chosen once at run time from what the processor has,
// lowered by SPPO_KERNELS_CPU_CAPABILITY=default|avx2|avx512.
#pragma once

namespace sppo {

enum class Capability { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

Capability cpu_capability();
const char* capability_name(Capability capability);

}  // namespace sppo
