// Linear algebra for ONE game: softmax, and the solution of a dense n x n system in float64.
#pragma once

#include "game/math.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

// Solves M s = b by Gauss-Jordan elimination with partial pivoting; `m` is n x (n + 1) with b as
// its last column and is destroyed; s lands in that column. Rows are shared out over the team.
template <class Team>
SPPO_HD void solve_in_place(const Team& team, double* m, int n) {
  const int ld = n + 1;
  for (int c = 0; c < n; ++c) {
    double least = 1.0;
    int row = n;
    for (int i = c + team.rank(); i < n; i += team.size()) {
      const double size = -abs_of(m[i * ld + c]);
      if (size < least) {
        least = size;
        row = i;
      }
    }
    team.argmin(least, row);
    if (row != c && row < n) {
      for (int j = team.rank(); j <= n; j += team.size()) {
        const double kept = m[c * ld + j];
        m[c * ld + j] = m[row * ld + j];
        m[row * ld + j] = kept;
      }
    }
    team.sync();
    const double inverse = 1.0 / m[c * ld + c];
    for (int i = team.rank(); i < n; i += team.size()) {
      if (i == c) continue;
      const double factor = m[i * ld + c] * inverse;
      for (int j = c + 1; j <= n; ++j) m[i * ld + j] -= factor * m[c * ld + j];
    }
    team.sync();
  }
  for (int i = team.rank(); i < n; i += team.size()) m[i * ld + n] /= m[i * ld + i];
  team.sync();
}

// out = softmax(z) over n entries; every member takes part, and all see the result.
template <class Team>
SPPO_HD void softmax(const Team& team, const double* z, int n, double* out) {
  double most = z[0];
  for (int i = 1; i < n; ++i) most = z[i] > most ? z[i] : most;
  for (int i = team.rank(); i < n; i += team.size()) {
    const double d = z[i] - most;
    out[i] = d < -700.0 ? 0.0 : exp_of<double>(d);
  }
  team.sync();
  double total = 0.0;
  for (int i = 0; i < n; ++i) total += out[i];
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) out[i] /= total;
  team.sync();
}

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
