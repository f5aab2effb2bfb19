"""Eager PyTorch for aggregation: comparisons to win rates."""

from __future__ import annotations

import torch
from torch import Tensor


def aggregate(
    i: Tensor, j: Tensor, outcome: Tensor, weight: Tensor | None, game: Tensor, games: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P, counts [G, K, K], macro and micro rates, weight of each response [G, K], in float64."""
    weight = torch.ones_like(outcome) if weight is None else weight
    cells = torch.cat(((game * k + i) * k + j, (game * k + j) * k + i))
    flat = outcome.new_zeros(games * k * k)
    wins = flat.index_add(0, cells, torch.cat((weight * outcome, weight * (1 - outcome))))
    counts = flat.index_add(0, cells, weight.repeat(2)).view(games, k, k)
    wins = wins.view(games, k, k)
    met = counts > 0
    p = torch.where(met, wins / counts.where(met, torch.ones_like(counts)), 0.5)
    total, opponents = counts.sum(-1), met.sum(-1)
    seen = opponents > 0
    macro = torch.where(seen, (p * met).sum(-1) / opponents.clamp(min=1), 0.5)
    micro = torch.where(seen, (wins * met).sum(-1) / total.where(seen, torch.ones_like(total)), 0.5)
    return p, counts, macro, micro, total
