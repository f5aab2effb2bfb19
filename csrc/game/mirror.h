// Approximate equilibrium of ONE large game by optimistic mirror descent (multiplicative weights).
//
// z <- z + rate (2 g_t - g_{t-1}), x = softmax(z), g_t = A x_t: both players of a symmetric game are
// the same, so one copy suffices. The running mean (restarted at powers of two, which forgets the
// start) converges like 1/T; the last iterate often geometrically. The better of the two is kept.
#pragma once

#include "game/linear.h"
#include "game/simplex.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

struct Mirror {
  static constexpr SPPO_HD int64_t doubles(int64_t k) { return k * k + 6 * k; }
  static constexpr SPPO_HD int64_t ints(int64_t) { return 0; }

  template <class Team, class T>
  static SPPO_HD void run(const Team& team, const SolverArgs<T>& a, int64_t g, double* work, int*) {
    const int n = length_of(a, g);
    const T* p = a.x + g * a.k * a.k;
    double* payoffs = work;
    double* z = payoffs + static_cast<int64_t>(n) * n;
    double *x = z + n, *gain = x + n, *before = gain + n, *mean = before + n, *best = mean + n;
    for (int i = team.rank(); i < n; i += team.size()) {
      for (int j = 0; j < n; ++j) payoffs[static_cast<int64_t>(i) * n + j] = payoff(p, a.k, i, j);
      z[i] = before[i] = mean[i] = 0.0;
      x[i] = best[i] = 1.0 / n;
    }
    team.sync();

    double residual = apply(team, payoffs, n, x, gain);
    int64_t restart = 128, since = 0;
    for (int64_t t = 1; t <= a.max_iter && residual > a.tol; ++t) {
      for (int i = team.rank(); i < n; i += team.size()) {
        z[i] += kRate * (2.0 * gain[i] - before[i]);
        before[i] = gain[i];
      }
      team.sync();
      softmax(team, z, n, x);
      const double last = apply(team, payoffs, n, x, gain);
      ++since;
      for (int i = team.rank(); i < n; i += team.size()) mean[i] += (x[i] - mean[i]) / since;
      team.sync();
      if (last < residual) residual = keep(team, x, n, last, best);
      if (t % 64 == 0) {
        // `before` already holds this round's gains, so `gain` may be overwritten and put back.
        const double averaged = apply(team, payoffs, n, mean, gain);
        if (averaged < residual) residual = keep(team, mean, n, averaged, best);
        apply(team, payoffs, n, x, gain);
      }
      if (t == restart) {
        restart *= 2;
        since = 0;
      }
    }
    for (int i = team.rank(); i < a.k; i += team.size()) a.out[g * a.k + i] = i < n ? best[i] : 0.0;
    if (team.rank() == 0) a.residual[g] = residual;
    team.sync();
  }

 private:
  static constexpr double kRate = 4.0;  // times |A| <= 1/2; 16 already diverges on random games

  // gain = A x, and its maximum: the exploitability of x.
  template <class Team>
  static SPPO_HD double apply(const Team& team, const double* payoffs, int n, const double* x,
                              double* gain) {
    double most = 0.0;
    for (int i = team.rank(); i < n; i += team.size()) {
      double s = 0.0;
      for (int j = 0; j < n; ++j) s += payoffs[static_cast<int64_t>(i) * n + j] * x[j];
      gain[i] = s;
      most = s > most ? s : most;
    }
    team.sync();
    return team.max(most);
  }

  template <class Team>
  static SPPO_HD double keep(const Team& team, const double* x, int n, double value, double* best) {
    for (int i = team.rank(); i < n; i += team.size()) best[i] = x[i];
    team.sync();
    return value;
  }
};

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
