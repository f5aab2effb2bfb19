"""Solutions of preference games: equilibria, strengths and the majority tournament.

All functions take P [..., K, K] (tensors, arrays or nested lists; float32 or float64) and, for
ragged batches, `lengths` [...]. They solve in float64 and return float64, whatever the input. Only
the antisymmetric part (P_ij - P_ji) / 2 matters to equilibria and tournaments; a warning says so
when P_ij + P_ji is far from 1. Results carry no gradient.

Arguments that all functions share: `lengths` [...] integers, the responses of each game, None when
all have K; `impl`, "auto", "native" or "reference". Each raises ValueError for a bad shape or
length, NaN, or a probability outside [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch

from sppo_kernels import checks
from sppo_kernels.games.inputs import Games, as_games, as_tensor, declare
from sppo_kernels.games.reference.targets import inside
from sppo_kernels.results import Equilibrium, Strengths, Tournament

SIMPLEX_LIMIT = 128  # largest K that "auto" solves exactly; see docs/decisions.md

_STRATEGY = (("GK", torch.float64), ("G", torch.float64))
declare("nash", "Tensor? lengths, bool mirror, float tol, int max_iter", *_STRATEGY)
declare("regularized_nash", "Tensor? lengths, Tensor log_mu, float tau, int max_iter", *_STRATEGY)
declare(
    "bradley_terry", "Tensor? lengths, Tensor? counts", ("GK", torch.float64), ("G", torch.bool)
)
declare("tournament", "Tensor? lengths", ("G", torch.int64), ("GK", torch.bool), ("G", torch.int64))


def nash(
    P: Any,
    lengths: Any = None,
    *,
    method: str = "auto",
    tol: float = 1e-6,
    max_iter: int = 10_000,
    impl: str = "auto",
) -> Equilibrium:
    """The von Neumann winner: a mixture that wins at least half against every response.

    Solves max_x min_y x^T P y, whose value is 1/2, exactly by the simplex method, or approximately
    by optimistic mirror descent. Where several equilibria exist, one vertex is returned.

    Args:
        P: [..., K, K] probabilities.
        method: "simplex", "mirror", or "auto": the simplex method for K <= 128.
        tol: exploitability at which mirror descent stops.
        max_iter: steps after which it stops anyway.
        lengths, impl: see the module.

    Returns:
        Equilibrium(strategy [..., K], residual [...]) in float64; the residual is the
        exploitability max_i (P x)_i - 1/2, what the best reply gains in win rate.

    Raises:
        ValueError: an unknown method; else see the module.
    """
    checks.choice("method", method, ("auto", "simplex", "mirror"))
    games = _constant(as_games(P, "P", lengths, impl))
    mirror = method == "mirror" or (method == "auto" and games.x.shape[-1] > SIMPLEX_LIMIT)
    return Equilibrium(*games.run("nash", games.lengths, mirror, float(tol), int(max_iter)))


def regularized_nash(
    P: Any,
    mu: Any = None,
    tau: float = 0.1,
    *,
    lengths: Any = None,
    max_iter: int = 500,
    impl: str = "auto",
) -> Equilibrium:
    """The equilibrium of the game in which each player also pays tau KL(pi || mu).

    The unique solution of pi_i = mu_i exp((P pi)_i / tau) / Z (arXiv 2312.00886, section 4): the
    policy that KL-regularised self-play against a reference converges to.

    Args:
        P: [..., K, K] probabilities.
        mu: [..., K] or [K], positive; need not sum to 1. None: uniform.
        tau: strength of the regularisation, in win rate; positive.
        max_iter: Newton steps.
        lengths, impl: see the module.

    Returns:
        Equilibrium(strategy [..., K], residual [...]) in float64; the residual is the largest
        change of a probability when the map above is applied once more.

    Raises:
        ValueError: mu of another shape or not positive, tau not positive; else see the module.
    """
    tau = checks.positive("tau", float(tau))
    games = _constant(as_games(P, "P", lengths, impl))
    x, k = games.x, games.x.shape[-1]
    if mu is None:
        log_mu = x.new_zeros(1, k, dtype=torch.float64)
    else:
        mu = as_tensor(mu, "mu").to(device=x.device, dtype=torch.float64)
        if mu.shape not in ((k,), (*games.batch, k)):
            raise ValueError(
                f"mu: expected shape [{k}] or {[*games.batch, k]}, got {list(mu.shape)}"
            )
        mu = mu.detach().reshape(-1, k)
        if games.lengths is not None:  # past a game's length anything may stand
            mu = mu.expand(x.shape[0], k).masked_fill(~inside(x, games.lengths), 1.0)
        if checks.can_read(mu) and not bool(((mu > 0) & mu.isfinite()).all()):
            raise ValueError(f"mu: expected positive finite weights, got {float(mu.min())}")
        log_mu = mu.log().contiguous()
    return Equilibrium(*games.run("regularized_nash", games.lengths, log_mu, tau, int(max_iter)))


def bradley_terry(
    P: Any, lengths: Any = None, *, counts: Any = None, impl: str = "auto"
) -> Strengths:
    """Maximum-likelihood Bradley-Terry strengths, P_ij ~ sigmoid(theta_i - theta_j).

    Args:
        P: [..., K, K] probabilities; P_ij and P_ji are used as the shares each side won.
        counts: [..., K, K] at least 0, weight of the comparisons behind each entry, as `aggregate`
            returns; None: 1 for every pair.
        lengths, impl: see the module.

    Returns:
        Strengths(strength [..., K] float64, log-odds with mean 0; connected [...] bool). No finite
        strengths fit a game in which wins do not link every response to every other; it is flagged
        and its strengths are NaN.

    Raises:
        ValueError: counts of another shape or negative; else see the module.
    """
    games = _constant(as_games(P, "P", lengths, impl))
    x = games.x
    if counts is not None:
        counts = as_tensor(counts, "counts").detach().to(device=x.device, dtype=x.dtype)
        if counts.shape != (*games.batch, *x.shape[1:]):
            wanted = [*games.batch, *x.shape[1:]]
            raise ValueError(f"counts: expected shape {wanted}, got {list(counts.shape)}")
        counts = counts.reshape(x.shape).contiguous()
        if checks.can_read(counts) and not bool(((counts >= 0) & counts.isfinite()).all()):
            raise ValueError(
                f"counts: expected finite weights of at least 0, got {float(counts.min())}"
            )
    return Strengths(*games.run("bradley_terry", games.lengths, counts))


def tournament(P: Any, lengths: Any = None, *, impl: str = "auto") -> Tournament:
    """Condorcet winner, Smith set and 3-cycles of the majority relation P_ij > P_ji.

    Args:
        P: [..., K, K] probabilities; equal entries are a tie.
        lengths, impl: see the module.

    Returns:
        Tournament(condorcet [...] int64, -1 if none; smith [..., K] bool; cycles [...] int64).
    """
    games = _constant(as_games(P, "P", lengths, impl))
    return Tournament(*games.run("tournament", games.lengths))


def _constant(games: Games) -> Games:
    return games._replace(x=games.x.detach())
