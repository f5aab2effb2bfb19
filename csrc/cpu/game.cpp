// CPU side of the game operators: threads over games, the instruction set chosen at run time.
#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu/capability.h"
#include "cpu/game_kernels.h"
#include "cpu/game_ops.h"
#include "game/bradley_terry.h"
#include "game/mirror.h"
#include "game/regularized.h"
#include "game/simplex.h"
#include "game/tournament.h"

namespace sppo {
namespace game {
namespace {

const GameTable& table() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case Capability::kAvx512: return game_table_avx512();
    case Capability::kAvx2: return game_table_avx2();
    default: break;
  }
#endif
  return game_table_base();
}

template <class T>
const GameKernels<T>& kernels();
template <>
const GameKernels<float>& kernels<float>() {
  return table().f32;
}
template <>
const GameKernels<double>& kernels<double>() {
  return table().f64;
}

struct alignas(64) Line {
  unsigned char bytes[64];
};

std::vector<Line> scratch(int64_t bytes) { return std::vector<Line>(bytes / sizeof(Line) + 1); }

// Games for a thread to take at a time: enough work to be worth a thread, whole vectors of lanes.
int64_t grain(int64_t work_per_game) {
  return std::max<int64_t>(1, 65536 / work_per_game / 16) * 16;
}

template <class F>
void over_games(int64_t games, int64_t work_per_game, const F& f) {
  if (games > 0) torch::stable::parallel_for(0, games, grain(work_per_game), f);
}

struct Cpu {
  template <class T>
  static void targets(const TargetsArgs<T>& a, const Tensor&) {
    over_games(a.games, int64_t(a.k) * a.k, [&](int64_t begin, int64_t end) {
      auto work = scratch(kernels<T>().lane_bytes(a.k));
      kernels<T>().targets(a, begin, end, work.data());
    });
  }

  template <class T>
  static void symmetrize(const T* x, T* out, int64_t games, int k, int mode, const Tensor&) {
    const SymmetrizeArgs<T> a{x, out, games, k, mode};
    over_games(games, int64_t(k) * k, [&](int64_t begin, int64_t end) {
      auto work = scratch(kernels<T>().lane_bytes(k));
      kernels<T>().symmetrize(a, begin, end, work.data());
    });
  }

  template <class T>
  static void solve(Solver solver, const SolverArgs<T>& a, const Tensor&) {
    const auto& loops = kernels<T>();
    switch (solver) {
      case Solver::kSimplex: return run<Simplex>(loops.simplex, a);
      case Solver::kMirror: return run<Mirror>(loops.mirror, a);
      case Solver::kRegularized: return run<Regularized>(loops.regularized, a);
      case Solver::kBradleyTerry: return run<BradleyTerry>(loops.bradley_terry, a);
      case Solver::kTournament: return run<Tournament>(loops.tournament, a);
    }
  }

  template <class T>
  static void aggregate(const AggregateArgs<T>& a, int64_t total, const Tensor&) {
    int64_t outside = 0;
    for (int64_t c = 0; c < total; ++c) {
      outside |= (a.i[c] < 0) | (a.i[c] >= a.k) | (a.j[c] < 0) | (a.j[c] >= a.k);
    }
    STD_TORCH_CHECK(!outside, "i, j: expected indices in [0, ", a.k, ")");
    for (int64_t g = 0; g < a.games; ++g) outside |= a.indptr[g] > a.indptr[g + 1];
    STD_TORCH_CHECK(!outside && a.indptr[0] == 0 && a.indptr[a.games] == total,
                    "indptr: expected offsets that grow from 0 to ", total);
    over_games(a.games, int64_t(a.k) * a.k + total / std::max<int64_t>(1, a.games),
               [&](int64_t begin, int64_t end) {
                 std::vector<double> work(2 * int64_t(a.k) * a.k);
                 kernels<T>().aggregate(a, begin, end, work.data());
               });
  }

 private:
  template <class S, class T, class Loop>
  static void run(Loop loop, const SolverArgs<T>& a) {
    over_games(a.games, int64_t(a.k) * a.k * a.k, [&](int64_t begin, int64_t end) {
      auto work = scratch(S::doubles(a.k) * 8);
      std::vector<int> ints(S::ints(a.k) + 1);
      loop(a, begin, end, reinterpret_cast<double*>(work.data()), ints.data());
    });
  }
};

// Returns [index of the first bad entry or -1, largest |P_ij + P_ji - 1|, its index or -1].
Tensor check(Tensor x, MaybeTensor lengths, double low, double high, bool want_gap) {
  check_games(x, lengths);
  CheckReport found = {-1, 0.0, -1};
  std::mutex guard;
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int k = static_cast<int>(x.size(1));
    const CheckArgs<T> a{data<T>(x),          lengths_of(lengths),   x.size(0), k,
                         static_cast<T>(low), static_cast<T>(high), want_gap};
    over_games(a.games, int64_t(k) * k, [&](int64_t begin, int64_t end) {
      auto work = scratch(kernels<T>().lane_bytes(k));
      const CheckReport part = kernels<T>().check(a, begin, end, work.data());
      const std::lock_guard<std::mutex> lock(guard);
      if (part.bad >= 0 && (found.bad < 0 || part.bad < found.bad)) found.bad = part.bad;
      if (part.gap > found.gap || (part.gap == found.gap && part.gap_at < found.gap_at)) {
        found.gap = part.gap;
        found.gap_at = part.gap_at;
      }
    });
  });
  Tensor report = make(x, {3}, ScalarType::Double);
  double* out = data<double>(report);
  out[0] = static_cast<double>(found.bad);
  out[1] = found.gap;
  out[2] = static_cast<double>(found.gap_at);
  return report;
}

// Counting sort of comparisons by game: offsets of each game and a stable order, in linear time.
std::tuple<Tensor, Tensor> group(Tensor game, int64_t games) {
  STD_TORCH_CHECK(game.dim() == 1 && game.scalar_type() == ScalarType::Long && game.is_contiguous(),
                  "game: expected a contiguous int64 tensor of shape [N]");
  const int64_t total = game.size(0);
  const int64_t* of = data<int64_t>(game);
  Tensor indptr = make(game, {games + 1}, ScalarType::Long);
  Tensor order = make(game, {total}, ScalarType::Long);
  int64_t* start = data<int64_t>(indptr);
  std::fill(start, start + games + 1, 0);
  for (int64_t c = 0; c < total; ++c) {
    STD_TORCH_CHECK(of[c] >= 0 && of[c] < games, "game: expected indices in [0, ", games, ")");
    ++start[of[c] + 1];
  }
  for (int64_t g = 0; g < games; ++g) start[g + 1] += start[g];
  std::vector<int64_t> next(start, start + games);
  int64_t* to = data<int64_t>(order);
  for (int64_t c = 0; c < total; ++c) to[next[of[c]]++] = c;
  return {indptr, order};
}

}  // namespace
}  // namespace game
}  // namespace sppo

STABLE_TORCH_LIBRARY_IMPL(sppo_kernels, CPU, m) {
  SPPO_GAME_IMPLS(m, sppo::game::Cpu);
  m.impl("game_check", TORCH_BOX(&sppo::game::check));
  m.impl("game_group", TORCH_BOX(&sppo::game::group));
}
