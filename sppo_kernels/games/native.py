"""The compiled operators (csrc/cpu, csrc/cuda) behind the functions of the references' names."""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.games import ops as _game_ops  # noqa: F401  (defines the operators)

_ops = torch.ops.sppo_kernels


def symmetrize(x: Tensor, mode: int) -> Tensor:
    return _ops.game_symmetrize(x.contiguous(), mode)


def win_rates(p: Tensor, lengths: Tensor | None, include_self: bool) -> Tensor:
    return _ops.game_win_rates(p.contiguous(), lengths, include_self)


def targets(
    x: Tensor, lengths: Tensor | None, mode: int, include_self: bool, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _ops.game_targets(x.contiguous(), lengths, mode, include_self, eta)


def check(
    x: Tensor, lengths: Tensor | None, low: float, high: float, want_gap: bool
) -> tuple[int, float, int]:
    bad, gap, at = _ops.game_check(x.contiguous(), lengths, low, high, want_gap).tolist()
    return int(bad), gap, int(at)


def nash(
    x: Tensor, lengths: Tensor | None, mirror: bool, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    return _ops.game_nash(x.contiguous(), lengths, mirror, tol, max_iter)


def regularized_nash(
    x: Tensor, lengths: Tensor | None, log_mu: Tensor, tau: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    return _ops.game_regularized_nash(x.contiguous(), lengths, log_mu.contiguous(), tau, max_iter)


def bradley_terry(
    x: Tensor, lengths: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    counts = None if counts is None else counts.contiguous()
    return _ops.game_bradley_terry(x.contiguous(), lengths, counts)


def tournament(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.game_tournament(x.contiguous(), lengths)


def group(game: Tensor, games: int) -> tuple[Tensor, Tensor]:
    """Offsets of each game [G+1] and a stable order of the comparisons [N]."""
    if game.device.type == "cpu":
        return _ops.game_group(game.contiguous(), games)
    ordered, order = torch.sort(game, stable=True)
    edges = torch.arange(games + 1, device=game.device)
    return torch.searchsorted(ordered, edges), order


def aggregate(
    i: Tensor,
    j: Tensor,
    outcome: Tensor,
    weight: Tensor | None,
    indptr: Tensor,
    order: Tensor | None,
    k: int,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _ops.game_aggregate(i, j, outcome, weight, indptr, order, k, wide)
