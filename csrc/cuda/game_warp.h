// A warp that works on one game: the members of game::Solo, for 32 lanes. Ties in `argmin` go to
// the lower index, so that a warp and a single thread walk the same path.
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {

struct Warp {
  static constexpr unsigned kAll = 0xffffffffu;

  __device__ __forceinline__ int rank() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int size() const { return 32; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }

  __device__ __forceinline__ void argmin(double& v, int& i) const {
    for (int o = 16; o > 0; o >>= 1) {
      const double other = __shfl_xor_sync(kAll, v, o);
      const int at = __shfl_xor_sync(kAll, i, o);
      if (other < v || (other == v && at < i)) {
        v = other;
        i = at;
      }
    }
  }
  __device__ __forceinline__ double max(double v) const {
    for (int o = 16; o > 0; o >>= 1) {
      const double other = __shfl_xor_sync(kAll, v, o);
      v = other > v ? other : v;
    }
    return v;
  }
  __device__ __forceinline__ bool any(bool v) const { return __any_sync(kAll, v); }
  __device__ __forceinline__ int64_t sum(int64_t v) const {
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(kAll, static_cast<long long>(v), o);
    return v;
  }
};

}  // namespace game
}  // namespace sppo
