// Body of the CPU loops. Included once by each game_<isa>.cpp, which names its instruction set
// (SPPO_GAME_ISA), its vector width (SPPO_LANE_BYTES) and the function that returns its table.
#pragma once

#include "cpu/game_kernels.h"
#include "game/aggregate.h"
#include "game/bradley_terry.h"
#include "game/mirror.h"
#include "game/regularized.h"
#include "game/simplex.h"
#include "game/targets.h"
#include "game/tournament.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

typedef float FloatLanes __attribute__((vector_size(SPPO_LANE_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(SPPO_LANE_BYTES)));
typedef int32_t Int32Lanes __attribute__((vector_size(SPPO_LANE_BYTES)));
typedef int64_t Int64Lanes __attribute__((vector_size(SPPO_LANE_BYTES)));
typedef uint32_t UInt32Lanes __attribute__((vector_size(SPPO_LANE_BYTES)));
typedef uint64_t UInt64Lanes __attribute__((vector_size(SPPO_LANE_BYTES)));

template <>
struct Lanes<FloatLanes> {
  using Scalar = float;
  using Int = Int32Lanes;
  using Unsigned = UInt32Lanes;
  using IntScalar = int32_t;
  static constexpr int kWidth = SPPO_LANE_BYTES / sizeof(float);
};
template <>
struct Lanes<DoubleLanes> {
  using Scalar = double;
  using Int = Int64Lanes;
  using Unsigned = UInt64Lanes;
  using IntScalar = int64_t;
  static constexpr int kWidth = SPPO_LANE_BYTES / sizeof(double);
};
template <class T>
struct LanesFor;
template <>
struct LanesFor<float> {
  using V = FloatLanes;
};
template <>
struct LanesFor<double> {
  using V = DoubleLanes;
};

// Beyond this K a game fills the vectors by itself no better, and its lanes would leave the cache.
constexpr int kLaneLimit = 64;

static int64_t lane_bytes(int k) {
  const int64_t values = static_cast<int64_t>(k) * k + 2 * k + 4;
  return k <= kLaneLimit ? values * SPPO_LANE_BYTES : 2 * static_cast<int64_t>(k) * 8;
}

// Games first .. first + W - 1, one a lane; lanes past `last` repeat the last game.
template <class T>
static void load_lanes(const T* x, int64_t first, int64_t last, int64_t size,
                       typename LanesFor<T>::V* lanes) {
  constexpr int W = Lanes<typename LanesFor<T>::V>::kWidth;
  const T* source[W];
  for (int l = 0; l < W; ++l) source[l] = x + (first + l < last ? first + l : last - 1) * size;
  for (int64_t c = 0; c < size; ++c) {
    typename LanesFor<T>::V v;
    for (int l = 0; l < W; ++l) v[l] = source[l][c];
    lanes[c] = v;
  }
}

template <class T>
static void targets(const TargetsArgs<T>& a, int64_t begin, int64_t end, void* work) {
  using V = typename LanesFor<T>::V;
  using I = IntOf<V>;
  constexpr int W = Lanes<V>::kWidth;
  const int k = a.k;
  if (k > kLaneLimit) {
    T* win = static_cast<T*>(work);
    for (int64_t g = begin; g < end; ++g) targets_team(Solo(), a, g, win, win + k);
    return;
  }
  V* x = static_cast<V*>(work);
  V* win = x + static_cast<int64_t>(k) * k;
  V* score = win + k;
  for (int64_t g = begin; g < end; g += W) {
    load_lanes<T>(a.x, g, end, static_cast<int64_t>(k) * k, x);
    const int filled = end - g < W ? static_cast<int>(end - g) : W;
    I length = I{} + k;
    V count = V{} + static_cast<T>(k);
    for (int l = 0; a.lengths && l < filled; ++l) {
      length[l] = length_of(a, g + l);
      count[l] = static_cast<T>(length_of(a, g + l));
    }
    Picked<V> picked;
    const auto at = [x, k](int i, int j) { return x[i * k + j]; };
    targets_solo<V>(at, k, length, count, a.mode, a.include_self, win, score, picked);

    const T* win_of = reinterpret_cast<const T*>(win);
    const T eta = static_cast<T>(a.eta);
    for (int l = 0; l < filled; ++l) {
      for (int i = 0; i < k; ++i) {
        const T w = win_of[i * W + l];
        if (a.win) a.win[(g + l) * k + i] = w;
        if (a.target) a.target[(g + l) * k + i] = eta * (w - T(0.5));
      }
      if (a.best) a.best[g + l] = picked.best[l];
      if (a.worst) a.worst[g + l] = picked.worst[l];
    }
    if (!a.prob) continue;
    V upper = picked.most - picked.least, lower = -upper;
    if (a.mode != kUclaml) {
      const T* x_of = reinterpret_cast<const T*>(x);
      for (int l = 0; l < W; ++l) {
        upper[l] = x_of[(picked.best[l] * k + picked.worst[l]) * W + l];
        lower[l] = x_of[(picked.worst[l] * k + picked.best[l]) * W + l];
      }
    }
    const V prob = chosen_probability<V>(upper, lower, a.mode);
    for (int l = 0; l < filled; ++l) a.prob[g + l] = prob[l];
  }
}

template <class T>
static void symmetrize(const SymmetrizeArgs<T>& a, int64_t begin, int64_t end, void* work) {
  using V = typename LanesFor<T>::V;
  constexpr int W = Lanes<V>::kWidth;
  const int k = a.k;
  const int64_t size = static_cast<int64_t>(k) * k;
  if (k > kLaneLimit) {
    for (int64_t g = begin; g < end; ++g) {
      const T* x = a.x + g * size;
      T* out = a.out + g * size;
      for (int64_t i = 0; i < k; ++i) {
        out[i * k + i] = T(0.5);
        for (int64_t j = i + 1; j < k; ++j) {
          symmetric_pair<T>(x[i * k + j], x[j * k + i], a.mode, out[i * k + j], out[j * k + i]);
        }
      }
    }
    return;
  }
  V* x = static_cast<V*>(work);
  for (int64_t g = begin; g < end; g += W) {
    load_lanes<T>(a.x, g, end, size, x);
    for (int i = 0; i < k; ++i) {
      x[i * k + i] = V{} + T(0.5);
      for (int j = i + 1; j < k; ++j) {
        V p, q;
        symmetric_pair<V>(x[i * k + j], x[j * k + i], a.mode, p, q);
        x[i * k + j] = p;
        x[j * k + i] = q;
      }
    }
    const T* x_of = reinterpret_cast<const T*>(x);
    const int filled = end - g < W ? static_cast<int>(end - g) : W;
    for (int l = 0; l < filled; ++l) {
      T* out = a.out + (g + l) * size;
      for (int64_t c = 0; c < size; ++c) out[c] = x_of[c * W + l];
    }
  }
}

// First entry outside [low, high] off the diagonal (NaN is outside), or -1.
template <class T>
static int64_t first_bad(const CheckArgs<T>& a, int64_t g, int n) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const int64_t at = (g * a.k + i) * a.k + j;
      if (i != j && !(a.x[at] >= a.low && a.x[at] <= a.high)) return at;
    }
  }
  return -1;
}

template <class T>
static CheckReport check(const CheckArgs<T>& a, int64_t begin, int64_t end) {
  CheckReport report = {-1, 0.0, -1};
  const int64_t size = static_cast<int64_t>(a.k) * a.k;
  for (int64_t g = begin; g < end; ++g) {
    const T* x = a.x + g * size;
    const int n = length_of(a, g);
    int suspicious = 0;
    for (int64_t c = 0; c < size; ++c) suspicious |= !((x[c] >= a.low) & (x[c] <= a.high));
    if (suspicious && report.bad < 0) report.bad = first_bad(a, g, n);
    if (!a.want_gap) continue;
    for (int i = 0; i < n; ++i) {
      for (int j = i + 1; j < n; ++j) {
        const T gap = x[i * int64_t(a.k) + j] + x[j * int64_t(a.k) + i] - T(1);
        const double distance = abs_of(static_cast<double>(gap));
        if (distance > report.gap) {
          report.gap = distance;
          report.gap_at = g * size + i * int64_t(a.k) + j;
        }
      }
    }
  }
  return report;
}

template <class Solver, class T>
static void solve(const SolverArgs<T>& a, int64_t begin, int64_t end, double* work, int* ints) {
  for (int64_t g = begin; g < end; ++g) Solver::run(Solo(), a, g, work, ints);
}

template <class T>
static void aggregate(const AggregateArgs<T>& a, int64_t begin, int64_t end, double* work) {
  for (int64_t g = begin; g < end; ++g) aggregate_game(a, g, work);
}

template <class T>
static constexpr GameKernels<T> kernels() {
  return {lane_bytes,         targets<T>,           symmetrize<T>,
          check<T>,           solve<Simplex, T>,    solve<Mirror, T>,
          solve<Regularized, T>, solve<BradleyTerry, T>, solve<Tournament, T>,
          aggregate<T>};
}

}  // namespace SPPO_GAME_ISA

const GameTable& SPPO_GAME_TABLE() {
  static constexpr GameTable table = {kernels<float>(), kernels<double>()};
  return table;
}

}  // namespace game
}  // namespace sppo
