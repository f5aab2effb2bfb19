"""Eager PyTorch for the common path: pooling, symmetrisation, win rates, pairs and targets.

These define what the compiled operators compute. Games are [G, K, K], `lengths` [G] or None; the
diagonal is never read. Differentiable through autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

AS_GIVEN, PROB, LOGIT, UCLAML = 0, 1, 2, 3  # how games are symmetrised, as in csrc/game/targets.h


def inside(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[G, K] bool: responses that exist."""
    games, k = x.shape[:2]
    if lengths is None:
        return torch.ones(games, k, dtype=torch.bool, device=x.device)
    return torch.arange(k, device=x.device) < lengths[:, None]


def opponents(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[G, K, K] bool: pairs of two different responses that exist."""
    rows = inside(x, lengths)
    off = ~torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    return rows[:, :, None] & rows[:, None, :] & off


def sizes(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[G] in x's dtype: number of responses."""
    if lengths is None:
        return x.new_full((x.shape[0],), x.shape[-1])
    return lengths.to(x.dtype)


def symmetrize(x: Tensor, mode: int) -> Tensor:
    if mode == LOGIT:
        p = torch.sigmoid((x - x.mT) / 2)
    elif mode == PROB:
        p = (x + (1 - x.mT)) / 2
    else:
        p = x
    return p.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool, device=x.device), 0.5)


def win_rates(p: Tensor, lengths: Tensor | None, include_self: bool) -> Tensor:
    total = p.masked_fill(~opponents(p, lengths), 0).sum(-1)
    n = sizes(p, lengths)[:, None]
    rate = (total + 0.5) / n if include_self else total / (n - 1)
    return rate.masked_fill(~inside(p, lengths), 0.5)


def scores(x: Tensor, lengths: Tensor | None) -> Tensor:
    """s_i = mean over all j of (c_ij - c_ji), as the released SPPO pipeline ranks responses."""
    d = (x - x.mT).masked_fill(~opponents(x, lengths), 0)
    return d.sum(-1) / sizes(x, lengths)[:, None]


def select(by: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """First maximum and last minimum of `by` [G, K] among valid entries."""
    best = by.masked_fill(~valid, -torch.inf).argmax(-1)
    worst = by.shape[-1] - 1 - by.masked_fill(~valid, torch.inf).flip(-1).argmin(-1)
    return best, worst


def targets(
    x: Tensor, lengths: Tensor | None, mode: int, include_self: bool, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if mode == UCLAML:
        by = scores(x, lengths)
        p = torch.sigmoid(by[:, :, None] - by[:, None, :])
        win = win_rates(p, lengths, True)
    else:
        p = symmetrize(x, mode)
        win = by = win_rates(p, lengths, include_self)
    best, worst = select(by.detach(), inside(x, lengths))
    prob = p[torch.arange(x.shape[0], device=x.device), best, worst]
    return win, eta * (win - 0.5), best, worst, prob


def check(x: Tensor, lengths: Tensor | None, low: float, high: float, want_gap: bool) -> Tensor:
    """Flat index of the first bad entry, the largest |P_ij + P_ji - 1|, its index; -1 for none."""
    mask = opponents(x, lengths)
    bad = (~((x >= low) & (x <= high)) & mask).flatten()
    first = int(bad.int().argmax()) if bool(bad.any()) else -1
    gap, at = 0.0, -1
    if want_gap and x.numel():
        gaps = (x + x.mT - 1).abs().masked_fill(~mask, 0).flatten().nan_to_num(0.0)
        gap = float(gaps.amax())
        at = int(gaps.argmax()) if gap > 0 else -1
    return torch.tensor([first, gap, at], dtype=torch.float64)


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
    total, rivals = counts.sum(-1), met.sum(-1)
    seen = rivals > 0
    macro = torch.where(seen, (p * met).sum(-1) / rivals.clamp(min=1), 0.5)
    micro = torch.where(seen, (wins * met).sum(-1) / total.where(seen, torch.ones_like(total)), 0.5)
    return p, counts, macro, micro, total
