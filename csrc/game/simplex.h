// Exact equilibrium of ONE preference game by the simplex method in float64.
//
// The von Neumann winner x satisfies (P x)_i <= 1/2 for every i. With P > 0 on its diagonal the
// bounded linear program  max sum(y)  subject to  P y <= 1, y >= 0  has the optimum 2, reached at
// y = 2 x. A condensed tableau of (n+1) x (n+1) is pivoted in place; the column of the largest reduced
// cost enters, and Bland's rule takes over after many steps, so that ties cannot make it cycle.
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

// (A x)_i for a strategy x: how much response i gains against x, in win rate above 1/2.
template <class T>
SPPO_HD double gain_against(const T* p, int k, int n, int i, const double* strategy) {
  double gain = 0.0;
  for (int j = 0; j < n; ++j) gain += payoff(p, k, i, j) * strategy[j];
  return gain;
}

// Exploitability max_i (A x)_i >= 0.
template <class Team, class T>
SPPO_HD double exploitability(const Team& team, const T* p, int k, int n, const double* strategy) {
  double most = 0.0;
  for (int i = team.rank(); i < n; i += team.size()) {
    const double gain = gain_against(p, k, n, i, strategy);
    most = gain > most ? gain : most;
  }
  return team.max(most);
}

struct Simplex {
  static constexpr SPPO_HD int64_t doubles(int64_t k) { return (k + 1) * (k + 1) + 2 * k; }
  static constexpr SPPO_HD int64_t ints(int64_t k) { return 2 * k; }

  // N: the number of responses where it is known when compiled, which unrolls the loops; else 0.
  template <int N = 0, class Team, class T>
  static SPPO_HD void run(const Team& team, const SolverArgs<T>& a, int64_t g, double* work,
                          int* labels) {
    const int n = N > 0 ? N : length_of(a, g);
    const int ld = n + 1;
    const T* p = a.x + g * a.k * a.k;
    double* tab = work;
    double* strategy = work + ld * ld;
    double* column = strategy + n;
    int* row_label = labels;      // variable that is basic in a row; >= n: a slack
    int* col_label = labels + n;  // variable that is out of the basis in a column

    for (int i = team.rank(); i < n; i += team.size()) {
      double worst = 0.5;
      for (int j = 0; j < n; ++j) {
        tab[i * ld + j] = 0.5 + payoff(p, a.k, i, j);
        const double beaten = 0.5 + payoff(p, a.k, j, i);
        worst = beaten > worst ? beaten : worst;
      }
      tab[i * ld + n] = 1.0;
      tab[n * ld + i] = 1.0;
      row_label[i] = n + i;
      col_label[i] = i;
      column[i] = worst;
    }
    if (team.rank() == 0) tab[n * ld + n] = 0.0;
    team.sync();

    // The response that loses least in the worst case enters first: a Condorcet winner ends here.
    int enter = n;
    double least = 2.0;
    for (int j = team.rank(); j < n; j += team.size()) {
      if (column[j] < least) {
        least = column[j];
        enter = j;
      }
    }
    team.argmin(least, enter);

    const int patience = 8 * n + 32;
    for (int step = 0; step < 50 * n + 200 && enter < n; ++step) {
      const int leave = leaving<N>(team, tab, row_label, n, enter);
      if (leave == n) break;
      pivot<N>(team, tab, n, leave, enter);
      if (team.rank() == 0) {
        const int label = row_label[leave];
        row_label[leave] = col_label[enter];
        col_label[enter] = label;
      }
      team.sync();
      enter = entering<N>(team, tab, col_label, n, step >= patience);
    }
    finish<N>(team, a, g, tab, row_label, strategy);
  }

 private:
  static SPPO_HD double tolerance() { return 1e-12; }

  // Column to enter: the largest reduced cost, or (Bland) the lowest label; n when optimal.
  template <int N, class Team>
  static SPPO_HD int entering(const Team& team, const double* tab, const int* col_label, int size,
                              bool bland) {
    const int n = N > 0 ? N : size;
    const double* cost = tab + n * (n + 1);
    int column = n;
    double least = 1e300;
    for (int j = team.rank(); j < n; j += team.size()) {
      if (!(cost[j] > tolerance())) continue;
      const double key = bland ? static_cast<double>(col_label[j]) : -cost[j];
      if (key < least) {
        least = key;
        column = j;
      }
    }
    team.argmin(least, column);
    return column;
  }

  // Row to leave: the smallest ratio, the lowest label among equals; n when none limits the column.
  template <int N, class Team>
  static SPPO_HD int leaving(const Team& team, const double* tab, const int* row_label, int size,
                             int enter) {
    const int n = N > 0 ? N : size;
    const int ld = n + 1;
    double least = 1e300;
    int row = n;
    for (int i = team.rank(); i < n; i += team.size()) {
      const double step = tab[i * ld + enter];
      if (!(step > 1e-11)) continue;
      const double level = tab[i * ld + n] > 0.0 ? tab[i * ld + n] : 0.0;
      const double ratio = level / step;
      if (ratio < least || (ratio == least && row_label[i] < row_label[row])) {
        least = ratio;
        row = i;
      }
    }
    double best = least;
    int any = row;
    team.argmin(best, any);
    // Equal ratios on several members: the lowest label decides, as it does for one member.
    double label = row < n && least == best ? static_cast<double>(row_label[row]) : 1e300;
    team.argmin(label, row);
    return label < 1e300 ? row : n;
  }

  template <int N, class Team>
  static SPPO_HD void pivot(const Team& team, double* tab, int size, int r, int c) {
    const int n = N > 0 ? N : size;
    const int ld = n + 1;
    const double inverse = 1.0 / tab[r * ld + c];
    team.sync();
    for (int i = team.rank(); i <= n; i += team.size()) {
      tab[r * ld + i] = i == c ? inverse : tab[r * ld + i] * inverse;
    }
    team.sync();
    const double* pivot_row = tab + r * ld;
    for (int i = team.rank(); i <= n; i += team.size()) {
      if (i == r) continue;
      double* row = tab + i * ld;
      const double factor = row[c];
      row[c] = 0.0;
      for (int j = 0; j <= n; ++j) row[j] -= factor * pivot_row[j];
    }
    team.sync();
  }

  template <int N, class Team, class T>
  static SPPO_HD void finish(const Team& team, const SolverArgs<T>& a, int64_t g, const double* tab,
                             const int* row_label, double* strategy) {
    const int n = N > 0 ? N : length_of(a, g);
    for (int i = team.rank(); i < n; i += team.size()) strategy[i] = 0.0;
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      const double level = tab[i * (n + 1) + n];
      if (row_label[i] < n && level > 0.0) strategy[row_label[i]] = level;
    }
    team.sync();
    double total = 0.0;
    for (int i = 0; i < n; ++i) total += strategy[i];
    team.sync();
    double* out = a.out + g * a.k;
    for (int i = team.rank(); i < a.k; i += team.size()) {
      const double share = i < n ? strategy[i] / total : 0.0;
      if (i < n) strategy[i] = share;
      out[i] = share;
    }
    team.sync();
    const double residual = exploitability(team, a.x + g * a.k * a.k, a.k, n, strategy);
    if (team.rank() == 0) a.residual[g] = residual;
    team.sync();
  }
};

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
