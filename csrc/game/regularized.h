// The entropy-regularised fixed point of ONE game:  pi_i ~ mu_i exp((P pi)_i / tau).
//
// Newton's method on F(z) = z - log mu - A softmax(z) / tau, where A = P - 1/2 (a constant added to
// P does not change softmax). The Jacobian is I - A C / tau with C = diag(pi) - pi pi^T positive
// semi-definite and A antisymmetric: its eigenvalues are 1 + i y, never 0, so every step exists and
// goes downhill in |F|; halving the step makes it converge from anywhere.
#pragma once

#include "game/linear.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

struct Regularized {
  static constexpr SPPO_HD int64_t doubles(int64_t k) { return k * (k + 1) + 6 * k; }
  static constexpr SPPO_HD int64_t ints(int64_t) { return 0; }

  template <class Team, class T>
  static SPPO_HD void run(const Team& team, const SolverArgs<T>& a, int64_t g, double* work, int*) {
    const int n = length_of(a, g);
    const T* p = a.x + g * a.k * a.k;
    const double* log_mu = a.log_mu + g * a.mu_stride;
    double* m = work;
    double* z = m + static_cast<int64_t>(n) * (n + 1);
    double *pi = z + n, *gain = pi + n, *f = gain + n, *trial = f + n, *next = trial + n;
    for (int i = team.rank(); i < n; i += team.size()) z[i] = log_mu[i];
    team.sync();

    double size = evaluate(team, a, p, n, log_mu, z, pi, gain, f);
    for (int64_t step = 0; step < a.max_iter && size > 0.0; ++step) {
      for (int i = team.rank(); i < n; i += team.size()) {
        double* row = m + static_cast<int64_t>(i) * (n + 1);
        for (int j = 0; j < n; ++j) {
          row[j] = (i == j ? 1.0 : 0.0) - (payoff(p, a.k, i, j) - gain[i]) * pi[j] / a.tau;
        }
        row[n] = -f[i];
      }
      team.sync();
      solve_in_place(team, m, n);
      double reach = 1.0, found = size;
      for (int halving = 0; halving < 50; ++halving) {
        for (int i = team.rank(); i < n; i += team.size()) {
          trial[i] = z[i] + reach * m[static_cast<int64_t>(i) * (n + 1) + n];
        }
        team.sync();
        found = evaluate(team, a, p, n, log_mu, trial, pi, gain, next);
        if (found <= (1.0 - 1e-4 * reach) * size) break;
        reach *= 0.5;
      }
      if (!(found < size)) break;  // rounding is all that is left
      for (int i = team.rank(); i < n; i += team.size()) {
        z[i] = trial[i];
        f[i] = next[i];
      }
      size = found;
      team.sync();
    }

    // One application of the map gives the answer; a second one measures how far from fixed it is.
    evaluate(team, a, p, n, log_mu, z, pi, gain, f);
    for (int i = team.rank(); i < n; i += team.size()) trial[i] = log_mu[i] + gain[i] / a.tau;
    team.sync();
    softmax(team, trial, n, next);
    for (int i = team.rank(); i < a.k; i += team.size()) a.out[g * a.k + i] = i < n ? pi[i] : 0.0;
    double most = 0.0;
    for (int i = 0; i < n; ++i) {
      const double gap = abs_of(next[i] - pi[i]);
      most = gap > most ? gap : most;
    }
    if (team.rank() == 0) a.residual[g] = most;
    team.sync();
  }

 private:
  // pi = softmax(z), gain = A pi, f = F(z); returns |F|^2.
  template <class Team, class T>
  static SPPO_HD double evaluate(const Team& team, const SolverArgs<T>& a, const T* p, int n,
                                 const double* log_mu, const double* z, double* pi, double* gain,
                                 double* f) {
    softmax(team, z, n, pi);
    for (int i = team.rank(); i < n; i += team.size()) {
      double s = 0.0;
      for (int j = 0; j < n; ++j) s += payoff(p, a.k, i, j) * pi[j];
      gain[i] = s;
      f[i] = z[i] - log_mu[i] - s / a.tau;
    }
    team.sync();
    double size = 0.0;
    for (int i = 0; i < n; ++i) size += f[i] * f[i];
    team.sync();
    return size;
  }
};

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
