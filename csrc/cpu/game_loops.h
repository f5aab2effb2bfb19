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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPPO_HAS_SHUFFLE 1
#endif
#endif

#if defined(SPPO_HAS_SHUFFLE)
template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

// a0 b0 a1 b1 ... from the first halves of a and b, and likewise from the second halves.
template <class V, int... I>
static inline void interleave(V a, V b, V& low, V& high, Indices<I...>) {
  constexpr int W = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
}

// Transposes W vectors of W lanes: log2(W) rounds of a perfect shuffle.
template <class V>
static inline void transpose(V* rows) {
  constexpr int W = Lanes<V>::kWidth;
  for (int round = 1; round < W; round *= 2) {
    V next[W];
    for (int i = 0; i < W / 2; ++i) {
      interleave<V>(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1],
                    typename Count<W>::type());
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}
#endif

// Games first .. first + W - 1, one a lane; lanes past `last` repeat the last game.
template <class T>
static void load_lanes(const T* x, int64_t first, int64_t last, int64_t size,
                       typename LanesFor<T>::V* lanes) {
  using V = typename LanesFor<T>::V;
  constexpr int W = Lanes<V>::kWidth;
  const T* source[W];
  for (int l = 0; l < W; ++l) source[l] = x + (first + l < last ? first + l : last - 1) * size;
  int64_t done = 0;
#if defined(SPPO_HAS_SHUFFLE)
  while (size >= W && done < size) {
    const int64_t at = done + W <= size ? done : size - W;  // the last block overlaps the one before
    V rows[W];
    for (int l = 0; l < W; ++l) __builtin_memcpy(&rows[l], source[l] + at, sizeof(V));
    transpose<V>(rows);
    for (int c = 0; c < W; ++c) lanes[at + c] = rows[c];
    done = at + W;
  }
#endif
  for (int64_t c = done; c < size; ++c) {
    V v;
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
static int64_t first_bad(const CheckArgs<T>& a, int64_t g) {
  const int n = length_of(a, g);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const int64_t at = (g * a.k + i) * a.k + j;
      if (i != j && !(a.x[at] >= a.low && a.x[at] <= a.high)) return at;
    }
  }
  return -1;
}

// Raises the report to the largest gap of game g.
template <class T>
static void widest_gap(const CheckArgs<T>& a, int64_t g, CheckReport& report) {
  const int n = length_of(a, g);
  const T* x = a.x + g * a.k * a.k;
  for (int i = 0; i < n; ++i) {
    for (int j = i + 1; j < n; ++j) {
      const T gap = x[i * int64_t(a.k) + j] + x[j * int64_t(a.k) + i] - T(1);
      const double distance = abs_of(static_cast<double>(gap));
      if (distance > report.gap) {
        report.gap = distance;
        report.gap_at = (g * a.k + i) * a.k + j;
      }
    }
  }
}

// Whether a game of this group of lanes has a gap above `most`.
template <class T>
static bool gap_grows(const CheckArgs<T>& a, int64_t g, int64_t end, typename LanesFor<T>::V* x,
                      T most) {
  using V = typename LanesFor<T>::V;
  constexpr int W = Lanes<V>::kWidth;
  load_lanes<T>(a.x, g, end, static_cast<int64_t>(a.k) * a.k, x);
  IntOf<V> length = IntOf<V>{} + a.k;
  for (int l = 0; a.lengths && l < W && g + l < end; ++l) length[l] = length_of(a, g + l);
  IntOf<V> found{};
  for (int i = 0; i < a.k; ++i) {
    for (int j = i + 1; j < a.k; ++j) {
      const V gap = x[i * a.k + j] + x[j * a.k + i] - T(1);
      found |= (length > j) & ((gap > most) | (-gap > most));
    }
  }
  bool grows = false;
  for (int l = 0; l < W; ++l) grows = grows || found[l];
  return grows;
}

template <class T>
static CheckReport check(const CheckArgs<T>& a, int64_t begin, int64_t end, void* work) {
  using V = typename LanesFor<T>::V;
  constexpr int W = Lanes<V>::kWidth;
  CheckReport report = {-1, 0.0, -1};
  const int64_t size = static_cast<int64_t>(a.k) * a.k;
  for (int64_t first = begin; first < end; first += W) {
    const int64_t last = first + W < end ? first + W : end;
    int suspicious = 0;
    for (int64_t c = first * size; c < last * size; ++c) {
      suspicious |= !((a.x[c] >= a.low) & (a.x[c] <= a.high));
    }
    for (int64_t g = first; suspicious && report.bad < 0 && g < last; ++g) {
      report.bad = first_bad(a, g);
    }
    if (!a.want_gap) continue;
    if (a.k <= kLaneLimit &&
        !gap_grows<T>(a, first, end, static_cast<V*>(work), static_cast<T>(report.gap))) {
      continue;
    }
    for (int64_t g = first; g < last; ++g) widest_gap(a, g, report);
  }
  return report;
}

template <class Solver, class T>
static void solve(const SolverArgs<T>& a, int64_t begin, int64_t end, double* work, int* ints) {
  for (int64_t g = begin; g < end; ++g) Solver::run(Solo(), a, g, work, ints);
}

// Games of the usual sizes without lengths get a loop with K known when compiled.
template <class T>
static void simplex(const SolverArgs<T>& a, int64_t begin, int64_t end, double* work, int* ints) {
  const int n = a.lengths ? 0 : a.k;
  for (int64_t g = begin; g < end; ++g) {
    switch (n) {
      case 3: Simplex::run<3>(Solo(), a, g, work, ints); break;
      case 4: Simplex::run<4>(Solo(), a, g, work, ints); break;
      case 5: Simplex::run<5>(Solo(), a, g, work, ints); break;
      case 8: Simplex::run<8>(Solo(), a, g, work, ints); break;
      case 16: Simplex::run<16>(Solo(), a, g, work, ints); break;
      default: Simplex::run(Solo(), a, g, work, ints);
    }
  }
}

template <class T>
static void aggregate(const AggregateArgs<T>& a, int64_t begin, int64_t end, double* work) {
  for (int64_t g = begin; g < end; ++g) aggregate_game(a, g, work);
}

template <class T>
static constexpr GameKernels<T> kernels() {
  return {lane_bytes,         targets<T>,           symmetrize<T>,
          check<T>,           simplex<T>,    solve<Mirror, T>,
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
