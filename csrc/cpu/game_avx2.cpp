// The loops for AVX2; nothing here may run before csrc/cpu/capability.h has chosen it.
#if defined(__x86_64__)
#define SPPO_GAME_ISA avx2
#define SPPO_LANE_BYTES 32
#define SPPO_GAME_TABLE game_table_avx2
#include "cpu/game_loops.h"
#endif
