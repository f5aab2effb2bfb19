// The solvers on the GPU. K <= 8: a thread a game, its tableau in local memory (indexed by the
// pivots, so registers cannot hold it). K <= 32: a warp a game in shared memory. Beyond: a warp a
// game in global memory.
#include <algorithm>

#include "cuda/game_launch.h"
#include "cuda/game_warp.h"
#include "game/aggregate.h"
#include "game/bradley_terry.h"
#include "game/mirror.h"
#include "game/regularized.h"
#include "game/simplex.h"
#include "game/tournament.h"

namespace sppo {
namespace game {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 20;

int blocks_for(int64_t items, int64_t per_block) {
  return static_cast<int>(std::min<int64_t>((items + per_block - 1) / per_block, kMaxBlocks));
}

// Warps of a block that share 46 KiB, at most four.
template <class Solver, int K>
struct Block {
  static constexpr int64_t kFit = 46 * 1024 / (8 * Solver::doubles(K) + 4 * (Solver::ints(K) + 1));
  static constexpr int kWarps = kFit > 4 ? 4 : static_cast<int>(kFit);
};

template <class Solver, class T>
__global__ void __launch_bounds__(kThreads, 1) thread_kernel(SolverArgs<T> a) {
  double work[Solver::doubles(kThreadGame)];
  int ints[Solver::ints(kThreadGame) + 1];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < a.games;
       g += step) {
    Solver::run(Solo(), a, g, work, ints);
  }
}

template <class Solver, int K, class T>
__global__ void __launch_bounds__(32 * Block<Solver, K>::kWarps, 1) shared_kernel(SolverArgs<T> a) {
  constexpr int kWarps = Block<Solver, K>::kWarps;
  __shared__ double work[kWarps][Solver::doubles(K)];
  __shared__ int ints[kWarps][Solver::ints(K) + 1];
  const int warp = threadIdx.x / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kWarps + warp; g < a.games; g += step) {
    Solver::run(Warp(), a, g, work[warp], ints[warp]);
  }
}

template <class Solver, class T>
__global__ void __launch_bounds__(128, 1) global_kernel(SolverArgs<T> a, Scratch s) {
  const int64_t slot = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (slot >= s.slots) return;
  double* work = s.work + slot * Solver::doubles(a.k);
  int* ints = s.ints + slot * (Solver::ints(a.k) + 1);
  for (int64_t g = slot; g < a.games; g += s.slots) Solver::run(Warp(), a, g, work, ints);
}

template <class T>
__global__ void __launch_bounds__(128, 1) aggregate_kernel(AggregateArgs<T> a, Scratch s) {
  const int64_t slot = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (slot >= s.slots) return;
  double* work = s.work + slot * 2 * a.k * a.k;
  for (int64_t g = slot; g < a.games; g += s.slots) aggregate_team(Warp(), a, g, work);
}

template <class Solver, int K, class T>
void launch_shared(const SolverArgs<T>& a, cudaStream_t stream) {
  constexpr int kWarps = Block<Solver, K>::kWarps;
  shared_kernel<Solver, K, T><<<blocks_for(a.games, kWarps), 32 * kWarps, 0, stream>>>(a);
}

// `Small`: whether the solver is ever asked to play games that fit in shared memory.
template <class Solver, bool Small, class T>
cudaError_t launch(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  if (a.games == 0) return cudaSuccess;
  if constexpr (Small) {
    if (a.k <= kThreadGame) {
      thread_kernel<Solver, T><<<blocks_for(a.games, kThreads), kThreads, 0, stream>>>(a);
      return cudaGetLastError();
    }
    if (a.k <= 16) {
      launch_shared<Solver, 16>(a, stream);
      return cudaGetLastError();
    }
    if (a.k <= kSharedGame) {
      launch_shared<Solver, kSharedGame>(a, stream);
      return cudaGetLastError();
    }
  }
  global_kernel<Solver, T><<<blocks_for(s.slots, 4), 128, 0, stream>>>(a, s);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t launch_simplex(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  return launch<Simplex, true>(a, s, stream);
}
template <class T>
cudaError_t launch_mirror(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  return launch<Mirror, false>(a, s, stream);
}
template <class T>
cudaError_t launch_regularized(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  return launch<Regularized, true>(a, s, stream);
}
template <class T>
cudaError_t launch_bradley_terry(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  return launch<BradleyTerry, true>(a, s, stream);
}
template <class T>
cudaError_t launch_tournament(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  return launch<Tournament, true>(a, s, stream);
}
template <class T>
cudaError_t launch_aggregate(const AggregateArgs<T>& a, const Scratch& s, cudaStream_t stream) {
  if (a.games == 0) return cudaSuccess;
  aggregate_kernel<T><<<blocks_for(s.slots, 4), 128, 0, stream>>>(a, s);
  return cudaGetLastError();
}

#define SPPO_SOLVERS(T)                                                                          \
  template cudaError_t launch_simplex(const SolverArgs<T>&, const Scratch&, cudaStream_t);       \
  template cudaError_t launch_mirror(const SolverArgs<T>&, const Scratch&, cudaStream_t);        \
  template cudaError_t launch_regularized(const SolverArgs<T>&, const Scratch&, cudaStream_t);   \
  template cudaError_t launch_bradley_terry(const SolverArgs<T>&, const Scratch&, cudaStream_t); \
  template cudaError_t launch_tournament(const SolverArgs<T>&, const Scratch&, cudaStream_t);    \
  template cudaError_t launch_aggregate(const AggregateArgs<T>&, const Scratch&, cudaStream_t)
SPPO_SOLVERS(float);
SPPO_SOLVERS(double);

}  // namespace game
}  // namespace sppo
