// What every game header shares: host/device markers, the arguments of a batch, and the "team" that
// works on one game. Free of torch and of the standard library's inline functions, so that the same
// text can be compiled for several instruction sets and for CUDA within one binary.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define SPPO_HD __host__ __device__ __forceinline__
#else
#define SPPO_HD inline
#endif

// Each translation unit with its own instruction set names it here; otherwise the linker could keep
// the AVX-512 copy of an inline function for every caller.
#ifndef SPPO_GAME_ISA
#define SPPO_GAME_ISA base
#endif

namespace sppo {
namespace game {

enum Mode : int { kAsGiven = 0, kProb = 1, kLogit = 2, kUclaml = 3 };

// Arguments of the fused path for a batch x[games, k, k]; outputs that are null are not written.
template <class T>
struct TargetsArgs {
  const T* x;
  const int64_t* lengths;  // [games] or null: every game has k responses
  int64_t games;
  int k;
  int mode;
  bool include_self;
  double eta;
  T* win;          // [games, k]
  T* target;       // [games, k]
  int64_t* best;   // [games]
  int64_t* worst;  // [games]
  T* prob;         // [games]
};

// Arguments of the solvers for a batch x[games, k, k]; each solver uses what it needs.
template <class T>
struct SolverArgs {
  const T* x;
  const int64_t* lengths;  // [games] or null
  int64_t games;
  int k;
  const T* counts;       // [games, k, k] or null, Bradley-Terry: comparisons behind each entry
  const double* log_mu;  // [games or 1, k], regularised Nash
  int64_t mu_stride;     // k, or 0 when all games share one mu
  double tau;
  double tol;
  int64_t max_iter;
  double* out;       // [games, k] strategy or strengths
  double* residual;  // [games]
  bool* flag;        // [games] connected
  int64_t* winner;   // [games]
  bool* smith;       // [games, k]
  int64_t* cycles;   // [games]
};

// Arguments of aggregation; comparisons of game g are those at order[indptr[g] .. indptr[g+1]).
template <class T>
struct AggregateArgs {
  const int64_t* i;
  const int64_t* j;
  const double* outcome;
  const double* weight;  // or null: 1 each
  const int64_t* indptr;
  const int64_t* order;  // or null: already in game order
  int64_t games;
  int k;
  T* p;       // [games, k, k]
  T* counts;  // [games, k, k]
  T* macro;   // [games, k]
  T* micro;   // [games, k]
  T* total;   // [games, k]
};

inline namespace SPPO_GAME_ISA {

// Responses of game g. Clamped, so that a length nobody checked cannot leave the game's memory.
template <class Args>
SPPO_HD int length_of(const Args& a, int64_t g) {
  const int64_t n = a.lengths ? a.lengths[g] : a.k;
  return static_cast<int>(n < 1 ? 1 : n > a.k ? a.k : n);
}

// One thread plays the whole game. A CUDA warp offers the same members (csrc/cuda/game_warp.h);
// every reduction here gives the same bits whatever the size of the team.
struct Solo {
  SPPO_HD int rank() const { return 0; }
  SPPO_HD int size() const { return 1; }
  SPPO_HD void sync() const {}
  SPPO_HD void argmin(double&, int&) const {}
  SPPO_HD double max(double v) const { return v; }
  SPPO_HD bool any(bool v) const { return v; }
  SPPO_HD int64_t sum(int64_t v) const { return v; }
};

SPPO_HD double abs_of(double x) { return x < 0 ? -x : x; }

SPPO_HD int popcount(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

// A_ij = (P_ij - P_ji) / 2: the antisymmetric payoff of row i against column j, 0 on the diagonal.
template <class T>
SPPO_HD double payoff(const T* x, int k, int i, int j) {
  const double a = static_cast<double>(x[static_cast<int64_t>(i) * k + j]);
  const double b = static_cast<double>(x[static_cast<int64_t>(j) * k + i]);
  return 0.5 * (a - b);
}

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
