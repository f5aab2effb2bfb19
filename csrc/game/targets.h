// The common path for ONE game: symmetrise -> win rates -> best and worst -> targets, in one pass.
//
// `targets_solo` is written for a value type V that is a scalar (a GPU thread, the host) or SIMD
// lanes holding one game each; `targets_rows` gives each member of a team some rows. Both add the
// terms of a row in the order of the opponents, hence the same bits.
#pragma once

#include "game/math.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

// The two entries of a pair after symmetrisation; a = x_ij, b = x_ji.
template <class V>
SPPO_HD void symmetric_pair(V a, V b, int mode, V& p, V& q) {
  using S = ScalarOf<V>;
  if (mode == kLogit) {
    logistic_pair<V>((a - b) * S(0.5), p, q);
  } else if (mode == kProb) {
    p = (a + (S(1) - b)) * S(0.5);
    q = (b + (S(1) - a)) * S(0.5);
  } else {
    p = a;
    q = b;
  }
}

// Running search for the first maximum and the last minimum: distinct even when all values tie.
template <class V>
struct Picked {
  V most, least;
  IntOf<V> best, worst;

  SPPO_HD void start(V first) {
    most = least = first;
    best = worst = IntOf<V>{};
  }
  template <class M>
  SPPO_HD void see(V value, int i, M valid) {
    const IntOf<V> index = IntOf<V>{} + static_cast<typename Lanes<V>::IntScalar>(i);
    const auto up = valid & (value > most);
    const auto down = valid & (value <= least);
    most = select(up, value, most);
    best = select(up, index, best);
    least = select(down, value, least);
    worst = select(down, index, worst);
  }
};

// Sum over opponents of every row, the diagonal left out: sum[i] = sum_{j != i} P_ij. Rows past the
// length of a lane's game get 0.
template <class V, class X>
SPPO_HD void opponent_sums(const X& x, int k, IntOf<V> length, int mode, V* sum) {
  for (int i = 0; i < k; ++i) sum[i] = V{};
  for (int i = 0; i < k; ++i) {
    for (int j = i + 1; j < k; ++j) {
      V p, q;
      symmetric_pair<V>(x(i, j), x(j, i), mode, p, q);
      const auto both = length > j;
      sum[i] += select(both, p, V{});
      sum[j] += select(both, q, V{});
    }
  }
}

// The released pipeline's scores, s_i = mean over all j of (c_ij - c_ji).
template <class V, class X>
SPPO_HD void released_scores(const X& x, int k, IntOf<V> length, V count, V* score) {
  for (int i = 0; i < k; ++i) score[i] = V{};
  for (int i = 0; i < k; ++i) {
    for (int j = i + 1; j < k; ++j) {
      const V d = x(i, j) - x(j, i);
      const auto both = length > j;
      score[i] += select(both, d, V{});
      score[j] -= select(both, d, V{});
    }
  }
  for (int i = 0; i < k; ++i) score[i] = score[i] / count;
}

// What the common path yields for one game (or one game a lane). `win` has k entries, 1/2 beyond
// the length; `score` is scratch of k entries, used by the released pipeline only.
template <class V, class X>
SPPO_HD void targets_solo(const X& x, int k, IntOf<V> length, V count, int mode, bool include_self,
                          V* win, V* score, Picked<V>& picked) {
  using S = ScalarOf<V>;
  const S half = S(0.5);
  if (mode == kUclaml) {
    released_scores<V>(x, k, length, count, score);
    const auto gap = [score](int i, int j) { return i < j ? score[i] - score[j] : V{}; };
    // 2 * gap, since the logistic of symmetric_pair halves the difference of its two arguments.
    const auto twice = [gap](int i, int j) { return gap(i, j) + gap(i, j); };
    opponent_sums<V>(twice, k, length, kLogit, win);
  } else {
    opponent_sums<V>(x, k, length, mode, win);
  }
  const bool self = include_self || mode == kUclaml;
  const V opponents = self ? count : count - S(1);
  const V own = V{} + (self ? half : S(0));
  for (int i = 0; i < k; ++i) {
    win[i] = select(length > i, (win[i] + own) / opponents, V{} + half);
  }
  const V* by = mode == kUclaml ? score : win;
  picked.start(by[0]);
  for (int i = 1; i < k; ++i) picked.see(by[i], i, length > i);
}

// Probability that the best response beats the worst one, from x or from the scores.
template <class V>
SPPO_HD V chosen_probability(V best_worst, V worst_best, int mode) {
  V p, q;
  symmetric_pair<V>(best_worst, worst_best, mode == kUclaml ? static_cast<int>(kLogit) : mode, p,
                    q);
  return p;
}

// One game for a team: each member owns rows, the search for best and worst is done by every member
// on the shared rows. `win` and `score` are shared scratch of k entries.
template <class Team, class T>
SPPO_HD void targets_team(const Team& team, const TargetsArgs<T>& a, int64_t g, T* win, T* score) {
  const int k = a.k;
  const int n = length_of(a, g);
  const T* x = a.x + g * k * k;
  const bool self = a.include_self || a.mode == kUclaml;
  const T own = self ? T(0.5) : T(0);
  const T opponents = static_cast<T>(self ? n : n - 1);
  if (a.mode == kUclaml) {
    for (int i = team.rank(); i < n; i += team.size()) {
      T s = T(0);
      for (int j = 0; j < n; ++j) {
        if (j > i) s += x[i * int64_t(k) + j] - x[j * int64_t(k) + i];
        if (j < i) s -= x[j * int64_t(k) + i] - x[i * int64_t(k) + j];
      }
      score[i] = s / static_cast<T>(n);
    }
    team.sync();
  }
  for (int i = team.rank(); i < k; i += team.size()) {
    T s = T(0);
    for (int j = 0; i < n && j < n; ++j) {
      if (j == i) continue;
      const int lo = i < j ? i : j, hi = i < j ? j : i;
      T p, q;
      if (a.mode == kUclaml) {
        logistic_pair<T>(score[lo] - score[hi], p, q);
      } else {
        symmetric_pair<T>(x[lo * int64_t(k) + hi], x[hi * int64_t(k) + lo], a.mode, p, q);
      }
      s += i < j ? p : q;
    }
    const T w = i < n ? (s + own) / opponents : T(0.5);
    win[i] = w;
    if (a.win) a.win[g * k + i] = w;
    if (a.target) a.target[g * k + i] = static_cast<T>(a.eta) * (w - T(0.5));
  }
  team.sync();
  const T* by = a.mode == kUclaml ? score : win;
  Picked<T> picked;
  picked.start(by[0]);
  for (int i = 1; i < n; ++i) picked.see(by[i], i, true);
  if (team.rank() == 0) {
    const int b = static_cast<int>(picked.best), w = static_cast<int>(picked.worst);
    if (a.best) a.best[g] = b;
    if (a.worst) a.worst[g] = w;
    if (a.prob && a.mode == kUclaml) {
      const T gap = score[b] - score[w];
      a.prob[g] = chosen_probability<T>(gap, -gap, a.mode);
    } else if (a.prob) {
      a.prob[g] = chosen_probability<T>(x[b * int64_t(k) + w], x[w * int64_t(k) + b], a.mode);
    }
  }
  team.sync();
}

// One game for one thread, K known when compiled, so that the rows live in registers.
template <int K, class T>
SPPO_HD void targets_thread(const TargetsArgs<T>& a, int64_t g) {
  T win[K], score[K];
  const T* x = a.x + g * K * K;
  const auto at = [x](int i, int j) { return x[i * K + j]; };
  const int n = length_of(a, g);
  Picked<T> picked;
  targets_solo<T>(at, K, n, static_cast<T>(n), a.mode, a.include_self, win, score, picked);
  T prob = T(0);
  if (a.mode == kUclaml) {
    const T gap = picked.most - picked.least;
    prob = chosen_probability<T>(gap, -gap, a.mode);
  } else {
    const int b = static_cast<int>(picked.best), w = static_cast<int>(picked.worst);
    prob = chosen_probability<T>(at(b, w), at(w, b), a.mode);
  }
  for (int i = 0; i < K; ++i) {
    if (a.win) a.win[g * K + i] = win[i];
    if (a.target) a.target[g * K + i] = static_cast<T>(a.eta) * (win[i] - T(0.5));
  }
  if (a.best) a.best[g] = picked.best;
  if (a.worst) a.worst[g] = picked.worst;
  if (a.prob) a.prob[g] = prob;
}

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
