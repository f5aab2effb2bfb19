// The CPU loops over games, compiled once for each instruction set and chosen at run time.
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {

// Where the first bad entry and the largest |P_ij + P_ji - 1| are; indices are flat, -1 for none.
struct CheckReport {
  int64_t bad;
  double gap;
  int64_t gap_at;
};

template <class T>
struct CheckArgs {
  const T* x;
  const int64_t* lengths;
  int64_t games;
  int k;
  T low, high;
  bool want_gap;
};

template <class T>
struct SymmetrizeArgs {
  const T* x;
  T* out;
  int64_t games;
  int k;
  int mode;
};

// Games [begin, end) of a batch; `work` is scratch of the size the wrapper was told, 64-byte
// aligned.
template <class T>
struct GameKernels {
  int64_t (*lane_bytes)(int k);
  void (*targets)(const TargetsArgs<T>&, int64_t begin, int64_t end, void* work);
  void (*symmetrize)(const SymmetrizeArgs<T>&, int64_t begin, int64_t end, void* work);
  CheckReport (*check)(const CheckArgs<T>&, int64_t begin, int64_t end, void* work);
  void (*simplex)(const SolverArgs<T>&, int64_t begin, int64_t end, double* work, int* ints);
  void (*mirror)(const SolverArgs<T>&, int64_t begin, int64_t end, double* work, int* ints);
  void (*regularized)(const SolverArgs<T>&, int64_t begin, int64_t end, double* work, int* ints);
  void (*bradley_terry)(const SolverArgs<T>&, int64_t begin, int64_t end, double* work, int* ints);
  void (*tournament)(const SolverArgs<T>&, int64_t begin, int64_t end, double* work, int* ints);
  void (*aggregate)(const AggregateArgs<T>&, int64_t begin, int64_t end, double* work);
};

struct GameTable {
  GameKernels<float> f32;
  GameKernels<double> f64;
};

const GameTable& game_table_base();
#if defined(__x86_64__)
const GameTable& game_table_avx2();
const GameTable& game_table_avx512();
#endif

}  // namespace game
}  // namespace sppo
