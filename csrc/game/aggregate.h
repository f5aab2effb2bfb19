// Win rates of ONE game from weighted comparisons: P_ij = share of the weight between i and j that
// went to i; macro rates average P over the opponents met, micro rates pool all comparisons.
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

// Row i of the results from the pooled wins and weights of its cells, in the order of opponents.
template <class T, class Cell>
SPPO_HD void aggregate_row(const AggregateArgs<T>& a, int64_t g, int i, const Cell& cell) {
  double rates = 0.0, won = 0.0, met = 0.0, total = 0.0;
  T* p = a.p + (g * a.k + i) * a.k;
  T* counts = a.counts + (g * a.k + i) * a.k;
  for (int j = 0; j < a.k; ++j) {
    double wins = 0.0, weight = 0.0;
    if (j != i) cell(j, wins, weight);
    const bool seen = weight > 0.0;
    const double rate = seen ? wins / weight : 0.5;
    p[j] = static_cast<T>(rate);
    counts[j] = static_cast<T>(weight);
    if (seen) {
      rates += rate;
      met += 1.0;
      won += wins;
      total += weight;
    }
  }
  a.macro[g * a.k + i] = static_cast<T>(met > 0.0 ? rates / met : 0.5);
  a.micro[g * a.k + i] = static_cast<T>(met > 0.0 ? won / total : 0.5);
  a.total[g * a.k + i] = static_cast<T>(total);
}

// One game for a team; `work` holds 2 k^2 doubles. Every member reads all comparisons and adds those
// of its rows, so each cell is summed in the order of the input, as `aggregate_game` does.
template <class Team, class T>
SPPO_HD void aggregate_team(const Team& team, const AggregateArgs<T>& a, int64_t g, double* work) {
  const int k = a.k;
  double* wins = work;
  double* weight = work + static_cast<int64_t>(k) * k;
  for (int i = team.rank(); i < k; i += team.size()) {
    const int64_t row = static_cast<int64_t>(i) * k;
    for (int j = 0; j < k; ++j) wins[row + j] = weight[row + j] = 0.0;
    for (int64_t at = a.indptr[g]; at < a.indptr[g + 1]; ++at) {
      const int64_t c = a.order ? a.order[at] : at;
      if (a.i[c] != i && a.j[c] != i) continue;
      const double w = a.weight ? a.weight[c] : 1.0;
      const int64_t other = a.i[c] == i ? a.j[c] : a.i[c];
      if (other < 0 || other >= k) continue;
      wins[row + other] += w * (a.i[c] == i ? a.outcome[c] : 1.0 - a.outcome[c]);
      weight[row + other] += w;
    }
    aggregate_row(a, g, i, [&](int j, double& cell_wins, double& cell_weight) {
      cell_wins = wins[row + j];
      cell_weight = weight[row + j];
    });
  }
}

// One game for one thread; `work` holds 2 k^2 doubles.
template <class T>
SPPO_HD void aggregate_game(const AggregateArgs<T>& a, int64_t g, double* work) {
  const int k = a.k;
  double* wins = work;
  double* weight = work + static_cast<int64_t>(k) * k;
  for (int64_t c = 0; c < 2 * static_cast<int64_t>(k) * k; ++c) work[c] = 0.0;
  for (int64_t at = a.indptr[g]; at < a.indptr[g + 1]; ++at) {
    const int64_t c = a.order ? a.order[at] : at;
    const double w = a.weight ? a.weight[c] : 1.0;
    const int64_t ij = a.i[c] * k + a.j[c], ji = a.j[c] * k + a.i[c];
    wins[ij] += w * a.outcome[c];
    wins[ji] += w * (1.0 - a.outcome[c]);
    weight[ij] += w;
    weight[ji] += w;
  }
  for (int i = 0; i < k; ++i) {
    aggregate_row(a, g, i, [&](int j, double& cell_wins, double& cell_weight) {
      cell_wins = wins[i * k + j];
      cell_weight = weight[i * k + j];
    });
  }
}

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
