// Launchers of the game kernels: raw pointers and a stream, no torch. They return the CUDA error.
#pragma once

#include <cuda_runtime_api.h>

#include "game/common.h"

namespace sppo {
namespace game {

constexpr int kThreadGame = 8;   // up to this K a thread plays a game
constexpr int kSharedGame = 32;  // up to this K a warp plays it in shared memory, beyond in global

template <class T>
cudaError_t launch_targets(const TargetsArgs<T>& a, cudaStream_t stream);
template <class T>
cudaError_t launch_symmetrize(const T* x, T* out, int64_t games, int k, int mode,
                              cudaStream_t stream);

// `work` (slots x doubles) and `ints` (slots x ints) are needed for K > kSharedGame only.
struct Scratch {
  double* work;
  int* ints;
  int64_t slots;
};
template <class T>
cudaError_t launch_simplex(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream);
template <class T>
cudaError_t launch_mirror(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream);
template <class T>
cudaError_t launch_regularized(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream);
template <class T>
cudaError_t launch_bradley_terry(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream);
template <class T>
cudaError_t launch_tournament(const SolverArgs<T>& a, const Scratch& s, cudaStream_t stream);

// `work` holds slots x 2 k^2 doubles, whatever K.
template <class T>
cudaError_t launch_aggregate(const AggregateArgs<T>& a, const Scratch& s, cudaStream_t stream);

}  // namespace game
}  // namespace sppo
