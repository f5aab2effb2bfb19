"""Eager PyTorch for the common path: symmetrisation, win rates, pairs and targets.

These define what the compiled operators compute. Games are [G, K, K], `lengths` [G] or None; the
diagonal is never read. Differentiable through autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.games.ops import LOGIT, PROB, UCLAML


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


def check(
    x: Tensor, lengths: Tensor | None, low: float, high: float, want_gap: bool
) -> tuple[int, float, int]:
    """Flat index of the first bad entry, the largest |P_ij + P_ji - 1|, its index; -1 for none."""
    mask = opponents(x, lengths)
    bad = (~((x >= low) & (x <= high)) & mask).flatten()
    first = int(bad.int().argmax()) if bool(bad.any()) else -1
    if not want_gap or x.numel() == 0:
        return first, 0.0, -1
    gap = (x + x.mT - 1).abs().masked_fill(~mask, 0).flatten()
    gap = gap.nan_to_num(0.0)
    at = int(gap.argmax())
    return first, float(gap[at]), at if gap[at] > 0 else -1
