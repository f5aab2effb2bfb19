// The loops for any processor of this architecture.
#define SPPO_GAME_ISA base
#define SPPO_LANE_BYTES 16
#define SPPO_GAME_TABLE game_table_base
#include "cpu/game_loops.h"
