// The loops for AVX512; nothing here may run before csrc/cpu/capability.h has chosen it.
#if defined(__x86_64__)
#define SPPO_GAME_ISA avx512
#define SPPO_LANE_BYTES 64
#define SPPO_GAME_TABLE game_table_avx512
#include "cpu/game_loops.h"
#endif
