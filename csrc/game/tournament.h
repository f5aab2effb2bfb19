// Majority tournament of ONE game: i beats j when P_ij > P_ji; equal entries are a tie.
// Rows are bit sets, so that a game of up to 64 responses is one word a row.
#pragma once

#include "game/common.h"

namespace sppo {
namespace game {
inline namespace SPPO_GAME_ISA {

struct Tournament {
  // The words live in the workspace of doubles: both are 8 bytes.
  static constexpr SPPO_HD int64_t words(int64_t k) { return (k + 63) / 64; }
  static constexpr SPPO_HD int64_t doubles(int64_t k) { return (2 * k + 1) * words(k); }
  static constexpr SPPO_HD int64_t ints(int64_t k) { return k; }

  template <class Team, class T>
  static SPPO_HD void run(const Team& team, const SolverArgs<T>& a, int64_t g, double* work,
                          int* flag) {
    const int n = length_of(a, g);
    const int w = static_cast<int>(words(n));
    const T* p = a.x + g * a.k * a.k;
    uint64_t* wins = reinterpret_cast<uint64_t*>(work);
    uint64_t* losses = wins + static_cast<int64_t>(n) * w;
    uint64_t* set = losses + static_cast<int64_t>(n) * w;

    double least = 1e300;
    int seed = n;
    for (int i = team.rank(); i < n; i += team.size()) {
      int won = 0, lost = 0;
      for (int word = 0; word < w; ++word) {
        uint64_t up = 0, down = 0;
        for (int j = word * 64; j < n && j < (word + 1) * 64; ++j) {
          const double d = payoff(p, a.k, i, j);
          up |= static_cast<uint64_t>(d > 0.0) << (j & 63);
          down |= static_cast<uint64_t>(d < 0.0) << (j & 63);
        }
        wins[i * w + word] = up;
        losses[i * w + word] = down;
        won += popcount(up);
        lost += popcount(down);
      }
      if (lost - won < least) {
        least = lost - won;
        seed = i;
      }
    }
    team.sync();
    team.argmin(least, seed);
    smith_set(team, losses, n, w, seed, set, flag);
    const int64_t triples = team.sum(cycles(team, wins, losses, n, w));

    // A Condorcet winner beats all others, so wins minus losses of the seed is n - 1.
    if (team.rank() == 0) {
      a.winner[g] = least == 1.0 - n ? seed : -1;
      a.cycles[g] = triples / 3;
    }
    for (int i = team.rank(); i < a.k; i += team.size()) {
      a.smith[g * a.k + i] = i < n && ((set[i >> 6] >> (i & 63)) & 1);
    }
    team.sync();
  }

 private:
  // Grows from a Copeland winner, which always belongs: whoever is not beaten by every member joins.
  template <class Team>
  static SPPO_HD void smith_set(const Team& team, const uint64_t* losses, int n, int w, int seed,
                                uint64_t* set, int* flag) {
    for (int i = team.rank(); i < n; i += team.size()) flag[i] = i == seed;
    team.sync();
    for (bool grew = true; grew;) {
      for (int word = team.rank(); word < w; word += team.size()) {
        uint64_t bits = 0;
        for (int j = word * 64; j < n && j < (word + 1) * 64; ++j) {
          bits |= static_cast<uint64_t>(flag[j] != 0) << (j & 63);
        }
        set[word] = bits;
      }
      team.sync();
      grew = false;
      for (int i = team.rank(); i < n; i += team.size()) {
        uint64_t spared = 0;
        for (int word = 0; word < w; ++word) spared |= set[word] & ~losses[i * w + word];
        if (!flag[i] && spared) {
          flag[i] = 1;
          grew = true;
        }
      }
      team.sync();
      grew = team.any(grew);
    }
  }

  // Number of (i, j, l) with i > j > l > i for this member's rows i: each 3-cycle three times.
  template <class Team>
  static SPPO_HD int64_t cycles(const Team& team, const uint64_t* wins, const uint64_t* losses,
                                int n, int w) {
    int64_t total = 0;
    for (int i = team.rank(); i < n; i += team.size()) {
      for (int j = 0; j < n; ++j) {
        if (!((wins[i * w + (j >> 6)] >> (j & 63)) & 1)) continue;
        for (int word = 0; word < w; ++word) {
          total += popcount(wins[j * w + word] & losses[i * w + word]);
        }
      }
    }
    return total;
  }
};

}  // namespace SPPO_GAME_ISA
}  // namespace game
}  // namespace sppo
