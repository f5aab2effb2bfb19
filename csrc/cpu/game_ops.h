// The torch-facing half of the game operators, shared by CPU and CUDA: it allocates the outputs and
// fills the arguments; `Backend` runs the loop.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "game/common.h"

namespace sppo {
namespace game {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

enum class Solver { kSimplex, kMirror, kRegularized, kBradleyTerry, kTournament };

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline const int64_t* lengths_of(const MaybeTensor& lengths) {
  return lengths ? static_cast<const int64_t*>(lengths->const_data_ptr()) : nullptr;
}

inline void check_games(const Tensor& x, const MaybeTensor& lengths) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == x.size(2), "x: expected games of shape [G, K, K]");
  STD_TORCH_CHECK(x.size(1) >= 2 && x.size(1) <= 46340, "x: expected 2 <= K <= 46340");
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
  if (lengths) {
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == x.size(0) &&
                        lengths->scalar_type() == ScalarType::Long && lengths->is_contiguous(),
                    "lengths: expected a contiguous int64 tensor of shape [G]");
  }
}

// Calls f with a float or a double, as x asks.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "x: expected float32 or float64");
  f(double{});
}

template <class Backend>
struct GameOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> targets(Tensor x, MaybeTensor lengths,
                                                                    int64_t mode, bool include_self,
                                                                    double eta) {
    check_games(x, lengths);
    const int64_t games = x.size(0), k = x.size(1);
    const ScalarType dtype = x.scalar_type();
    Tensor win = make(x, {games, k}, dtype), target = make(x, {games, k}, dtype);
    Tensor best = make(x, {games}, ScalarType::Long), worst = make(x, {games}, ScalarType::Long);
    Tensor prob = make(x, {games}, dtype);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      Backend::targets(TargetsArgs<T>{data<T>(x), lengths_of(lengths), games, static_cast<int>(k),
                                      static_cast<int>(mode), include_self, eta, data<T>(win),
                                      data<T>(target), data<int64_t>(best), data<int64_t>(worst),
                                      data<T>(prob)},
                       x);
    });
    return {win, target, best, worst, prob};
  }

  static Tensor win_rates(Tensor x, MaybeTensor lengths, bool include_self) {
    check_games(x, lengths);
    const int64_t games = x.size(0), k = x.size(1);
    Tensor win = make(x, {games, k}, x.scalar_type());
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      Backend::targets(
          TargetsArgs<T>{data<T>(x), lengths_of(lengths), games, static_cast<int>(k), kAsGiven,
                         include_self, 0.0, data<T>(win), nullptr, nullptr, nullptr, nullptr},
          x);
    });
    return win;
  }

  static Tensor symmetrize(Tensor x, int64_t mode) {
    check_games(x, std::nullopt);
    Tensor out = make(x, {x.size(0), x.size(1), x.size(1)}, x.scalar_type());
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      Backend::symmetrize(data<T>(x), data<T>(out), x.size(0), static_cast<int>(x.size(1)),
                          static_cast<int>(mode), x);
    });
    return out;
  }

  static std::tuple<Tensor, Tensor> nash(Tensor x, MaybeTensor lengths, bool mirror, double tol,
                                         int64_t max_iter) {
    return strategy(x, lengths, mirror ? Solver::kMirror : Solver::kSimplex, nullptr, 0, 0.0, tol,
                    max_iter);
  }

  static std::tuple<Tensor, Tensor> regularized_nash(Tensor x, MaybeTensor lengths, Tensor log_mu,
                                                     double tau, int64_t max_iter) {
    const int64_t k = x.size(1);
    STD_TORCH_CHECK(log_mu.dim() == 2 && log_mu.size(1) == k && log_mu.is_contiguous() &&
                        (log_mu.size(0) == 1 || log_mu.size(0) == x.size(0)) &&
                        log_mu.scalar_type() == ScalarType::Double,
                    "log_mu: expected a contiguous float64 tensor of shape [1 or G, K]");
    return strategy(x, lengths, Solver::kRegularized, data<double>(log_mu),
                    log_mu.size(0) == 1 ? 0 : k, tau, 0.0, max_iter);
  }

  static std::tuple<Tensor, Tensor> bradley_terry(Tensor x, MaybeTensor lengths,
                                                  MaybeTensor counts) {
    check_games(x, lengths);
    STD_TORCH_CHECK(!counts || (counts->dim() == 3 && counts->numel() == x.numel() &&
                                counts->is_contiguous() &&
                                counts->scalar_type() == x.scalar_type()),
                    "counts: expected a contiguous tensor of x's shape and dtype");
    Tensor strength = make(x, {x.size(0), x.size(1)}, ScalarType::Double);
    Tensor connected = make(x, {x.size(0)}, ScalarType::Bool);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      SolverArgs<T> a = arguments<T>(x, lengths);
      a.counts = counts ? data<T>(*counts) : nullptr;
      a.out = data<double>(strength);
      a.flag = data<bool>(connected);
      Backend::solve(Solver::kBradleyTerry, a, x);
    });
    return {strength, connected};
  }

  static std::tuple<Tensor, Tensor, Tensor> tournament(Tensor x, MaybeTensor lengths) {
    check_games(x, lengths);
    Tensor winner = make(x, {x.size(0)}, ScalarType::Long);
    Tensor smith = make(x, {x.size(0), x.size(1)}, ScalarType::Bool);
    Tensor cycles = make(x, {x.size(0)}, ScalarType::Long);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      SolverArgs<T> a = arguments<T>(x, lengths);
      a.winner = data<int64_t>(winner);
      a.smith = data<bool>(smith);
      a.cycles = data<int64_t>(cycles);
      Backend::solve(Solver::kTournament, a, x);
    });
    return {winner, smith, cycles};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> aggregate(
      Tensor i, Tensor j, Tensor outcome, MaybeTensor weight, Tensor indptr, MaybeTensor order,
      int64_t k, bool wide) {
    const int64_t games = indptr.size(0) - 1, total = i.size(0);
    STD_TORCH_CHECK(j.size(0) == total && outcome.size(0) == total &&
                        (!weight || weight->size(0) == total) &&
                        (!order || order->size(0) == total),
                    "i, j, outcome, weight, order: expected the same number of comparisons");
    for (const Tensor* t : {&i, &j, &indptr}) {
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                      "i, j, indptr: expected contiguous int64 tensors");
    }
    STD_TORCH_CHECK(outcome.scalar_type() == ScalarType::Double && outcome.is_contiguous(),
                    "outcome: expected a contiguous float64 tensor");
    const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
    Tensor p = make(outcome, {games, k, k}, dtype), counts = make(outcome, {games, k, k}, dtype);
    Tensor macro = make(outcome, {games, k}, dtype), micro = make(outcome, {games, k}, dtype);
    Tensor sum = make(outcome, {games, k}, dtype);
    by_dtype(p, [&](auto zero) {
      using T = decltype(zero);
      Backend::aggregate(
          AggregateArgs<T>{data<int64_t>(i), data<int64_t>(j), data<double>(outcome),
                           weight ? data<double>(*weight) : nullptr, data<int64_t>(indptr),
                           order ? data<int64_t>(*order) : nullptr, games, static_cast<int>(k),
                           data<T>(p), data<T>(counts), data<T>(macro), data<T>(micro),
                           data<T>(sum)},
          total, outcome);
    });
    return {p, counts, macro, micro, sum};
  }

 private:
  template <class T>
  static SolverArgs<T> arguments(const Tensor& x, const MaybeTensor& lengths) {
    SolverArgs<T> a{};
    a.x = data<T>(x);
    a.lengths = lengths_of(lengths);
    a.games = x.size(0);
    a.k = static_cast<int>(x.size(1));
    return a;
  }

  static std::tuple<Tensor, Tensor> strategy(const Tensor& x, const MaybeTensor& lengths,
                                             Solver solver, const double* log_mu, int64_t mu_stride,
                                             double tau, double tol, int64_t max_iter) {
    check_games(x, lengths);
    Tensor out = make(x, {x.size(0), x.size(1)}, ScalarType::Double);
    Tensor residual = make(x, {x.size(0)}, ScalarType::Double);
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      SolverArgs<T> a = arguments<T>(x, lengths);
      a.log_mu = log_mu;
      a.mu_stride = mu_stride;
      a.tau = tau;
      a.tol = tol;
      a.max_iter = max_iter;
      a.out = data<double>(out);
      a.residual = data<double>(residual);
      Backend::solve(solver, a, x);
    });
    return {out, residual};
  }
};

#define SPPO_GAME_IMPLS(m, Backend)                                                    \
  m.impl("game_targets", TORCH_BOX(&sppo::game::GameOps<Backend>::targets));           \
  m.impl("game_win_rates", TORCH_BOX(&sppo::game::GameOps<Backend>::win_rates));       \
  m.impl("game_symmetrize", TORCH_BOX(&sppo::game::GameOps<Backend>::symmetrize));     \
  m.impl("game_nash", TORCH_BOX(&sppo::game::GameOps<Backend>::nash));                 \
  m.impl("game_regularized_nash",                                                      \
         TORCH_BOX(&sppo::game::GameOps<Backend>::regularized_nash));                  \
  m.impl("game_bradley_terry", TORCH_BOX(&sppo::game::GameOps<Backend>::bradley_terry)); \
  m.impl("game_tournament", TORCH_BOX(&sppo::game::GameOps<Backend>::tournament));     \
  m.impl("game_aggregate", TORCH_BOX(&sppo::game::GameOps<Backend>::aggregate))

}  // namespace game
}  // namespace sppo
