// The common path on the GPU: a thread a game while its rows fit in registers, else a warp a game.
#include <algorithm>

#include "cuda/game_launch.h"
#include "cuda/game_warp.h"
#include "game/targets.h"

namespace sppo {
namespace game {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = 4;
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond that, blocks take several games

int blocks_for(int64_t items, int64_t per_block) {
  return static_cast<int>(std::min<int64_t>((items + per_block - 1) / per_block, kMaxBlocks));
}

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 1) targets_thread_kernel(TargetsArgs<T> a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < a.games;
       g += step) {
    targets_thread<K, T>(a, g);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1) targets_warp_kernel(TargetsArgs<T> a) {
  extern __shared__ double shared[];
  T* win = reinterpret_cast<T*>(shared) + 2 * static_cast<int64_t>(threadIdx.x / 32) * a.k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  for (int64_t g = first; g < a.games; g += step) targets_team(Warp(), a, g, win, win + a.k);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    symmetrize_kernel(const T* x, T* out, int64_t games, int k, int mode) {
  const int64_t size = static_cast<int64_t>(k) * k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < games * size;
       at += step) {
    const int64_t g = at / size, i = (at - g * size) / k, j = at - g * size - i * k;
    T p = T(0.5), q = T(0.5);
    if (i != j) {
      const int64_t lo = i < j ? i : j, hi = i < j ? j : i;
      const T* game = x + g * size;
      symmetric_pair<T>(game[lo * k + hi], game[hi * k + lo], mode, p, q);
    }
    out[at] = i < j ? p : q;
  }
}

template <int K, class T>
void launch_thread(const TargetsArgs<T>& a, cudaStream_t stream) {
  targets_thread_kernel<K, T><<<blocks_for(a.games, kThreads), kThreads, 0, stream>>>(a);
}

}  // namespace

template <class T>
cudaError_t launch_targets(const TargetsArgs<T>& a, cudaStream_t stream) {
  if (a.games == 0) return cudaSuccess;
  switch (a.k) {
    case 2: launch_thread<2>(a, stream); break;
    case 3: launch_thread<3>(a, stream); break;
    case 4: launch_thread<4>(a, stream); break;
    case 5: launch_thread<5>(a, stream); break;
    case 6: launch_thread<6>(a, stream); break;
    case 7: launch_thread<7>(a, stream); break;
    case 8: launch_thread<8>(a, stream); break;
    default: {
      const size_t a_warp = 2 * sizeof(T) * a.k;
      const int warps = a_warp * kWarps <= 48 * 1024 ? kWarps : 1;
      targets_warp_kernel<T><<<blocks_for(a.games, warps), 32 * warps, a_warp * warps, stream>>>(a);
    }
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_symmetrize(const T* x, T* out, int64_t games, int k, int mode,
                              cudaStream_t stream) {
  if (games == 0) return cudaSuccess;
  const int blocks = blocks_for(games * k * k, kThreads);
  symmetrize_kernel<T><<<blocks, kThreads, 0, stream>>>(x, out, games, k, mode);
  return cudaGetLastError();
}

template cudaError_t launch_targets(const TargetsArgs<float>&, cudaStream_t);
template cudaError_t launch_targets(const TargetsArgs<double>&, cudaStream_t);
template cudaError_t launch_symmetrize(const float*, float*, int64_t, int, int, cudaStream_t);
template cudaError_t launch_symmetrize(const double*, double*, int64_t, int, int, cudaStream_t);

}  // namespace game
}  // namespace sppo
