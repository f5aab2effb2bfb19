// Bradley-Terry strengths of ONE game by maximum likelihood: log-odds theta with mean 0 and
// P(i beats j) = sigma(theta_i - theta_j), from wins W_ij = P_ij N_ij.
//
// Newton's method on the concave likelihood. Its Hessian is a Laplacian, made regular by adding a
// constant on the null direction. The logistic function is generalised self-concordant, so the step
// 1 / (1 + D/2), D the spread of the Newton direction, never overshoots and needs no line search.
// The maximum exists only if the graph of wins is strongly connected (Ford 1957); otherwise the game
// is flagged and its strengths are NaN.
#pragma once

#include "game/linear.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

struct BradleyTerry {
  static constexpr SPPO_HD int64_t doubles(int64_t k) { return 2 * k * k + 2 * k; }
  static constexpr SPPO_HD int64_t ints(int64_t k) { return k; }

  template <class Team, class T>
  static SPPO_HD void run(const Team& team, const SolverArgs<T>& a, int64_t g, double* work,
                          int* reached) {
    const int n = length_of(a, g);
    double* wins = work;
    double* m = wins + static_cast<int64_t>(n) * n;
    double* theta = m + static_cast<int64_t>(n) * (n + 1);
    double heaviest = 0.0;
    for (int i = team.rank(); i < n; i += team.size()) {
      theta[i] = 0.0;
      for (int j = 0; j < n; ++j) {
        const int64_t at = (g * a.k + i) * a.k + j;
        const double count = a.counts ? static_cast<double>(a.counts[at]) : 1.0;
        const double won = i == j ? 0.0 : static_cast<double>(a.x[at]) * count;
        wins[i * n + j] = won;
        heaviest = won > heaviest ? won : heaviest;
      }
    }
    heaviest = team.max(heaviest);
    team.sync();
    const bool connected =
        reaches_all(team, wins, n, reached, false) && reaches_all(team, wins, n, reached, true);
    if (team.rank() == 0) a.flag[g] = connected;

    double* out = a.out + g * a.k;
    if (!connected) {
      for (int i = team.rank(); i < a.k; i += team.size()) out[i] = i < n ? nan_value() : 0.0;
      team.sync();
      return;
    }
    for (int step = 0; step < 200; ++step) {
      fill_newton(team, wins, theta, heaviest, n, m);
      solve_in_place(team, m, n);
      double low = m[n], high = m[n];
      for (int i = 1; i < n; ++i) {
        const double d = m[static_cast<int64_t>(i) * (n + 1) + n];
        low = d < low ? d : low;
        high = d > high ? d : high;
      }
      const double spread = high - low;
      const double reach = 1.0 / (1.0 + 0.5 * spread);
      for (int i = team.rank(); i < n; i += team.size()) {
        theta[i] += reach * m[static_cast<int64_t>(i) * (n + 1) + n];
      }
      team.sync();
      if (!(spread > 1e-9)) break;  // quadratic: the error left is of the order of its square
    }
    double mean = 0.0;
    for (int i = 0; i < n; ++i) mean += theta[i];
    mean /= n;
    for (int i = team.rank(); i < a.k; i += team.size()) out[i] = i < n ? theta[i] - mean : 0.0;
    team.sync();
  }

 private:
  static SPPO_HD double nan_value() { return bits_of<double>(int64_t(0x7ff8000000000000LL)); }

  // m = [H + c 11^T | gradient] of the log-likelihood at theta.
  template <class Team>
  static SPPO_HD void fill_newton(const Team& team, const double* wins, const double* theta,
                                  double heaviest, int n, double* m) {
    for (int i = team.rank(); i < n; i += team.size()) {
      double* row = m + static_cast<int64_t>(i) * (n + 1);
      double gradient = 0.0, diagonal = 0.0;
      for (int j = 0; j < n; ++j) {
        const double won = wins[i * n + j], lost = wins[j * n + i];
        double p, q;
        logistic_pair<double>(theta[i] - theta[j], p, q);
        const double curvature = (won + lost) * p * q;
        gradient += won * q - lost * p;
        diagonal += curvature;
        row[j] = heaviest - curvature;
      }
      row[i] = heaviest + diagonal;  // the diagonal has no comparisons: its curvature is 0
      row[n] = gradient;
    }
    team.sync();
  }

  // Whether every response is reached from response 0 along wins (or, reversed, along losses).
  template <class Team>
  static SPPO_HD bool reaches_all(const Team& team, const double* wins, int n, int* reached,
                                  bool reversed) {
    for (int i = team.rank(); i < n; i += team.size()) reached[i] = i == 0;
    team.sync();
    for (int round = 0; round < n; ++round) {
      bool changed = false;
      for (int i = team.rank(); i < n; i += team.size()) {
        if (reached[i]) continue;
        bool found = false;
        for (int j = 0; j < n && !found; ++j) {
          found = reached[j] && (reversed ? wins[i * n + j] : wins[j * n + i]) > 0.0;
        }
        if (found) reached[i] = 1;
        changed = changed || found;
      }
      team.sync();
      if (!team.any(changed)) break;
    }
    bool all = true;
    for (int i = 0; i < n; ++i) all = all && reached[i];
    team.sync();
    return all;
  }
};

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
