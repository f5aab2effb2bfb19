"""Objectives that judge each response of a pair by itself: NCA, BCO, APO, KTO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_kernels.loss.objectives.base import BETA, REFERENCE, Objective, Pair


def nca_pair(p: Pair, s: Mapping[str, float]) -> Tensor:
    """NCA with one winner and one loser."""
    u, v = (s["beta"] * ratio for ratio in p.ratios)
    return -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v)


def bco_pair(p: Pair, s: Mapping[str, float]) -> Tensor:
    """`reward_shift` is the paper's running mean of rewards, kept by the caller; 0 as in TRL."""
    u, v = (s["beta"] * ratio for ratio in p.ratios)
    if p.reward_shift is not None:
        u, v = u - p.reward_shift, v - p.reward_shift
    return -logsigmoid(u) - logsigmoid(-v)


def apo_zero(p: Pair, s: Mapping[str, float]) -> Tensor:
    """The winner up, the loser down."""
    a, b = p.ratios
    return torch.sigmoid(-s["beta"] * a) + torch.sigmoid(s["beta"] * b)


def apo_down(p: Pair, s: Mapping[str, float]) -> Tensor:
    """Both down, the loser more."""
    a, b = p.ratios
    return torch.sigmoid(s["beta"] * a) + torch.sigmoid(-s["beta"] * (a - b))


def kto(p: Pair, s: Mapping[str, float]) -> Tensor:
    """Half of each: the mean over pairs is KTO's mean over responses."""
    a, b = p.ratios
    wins = torch.sigmoid(s["beta"] * (p.kl - a))
    return (wins + torch.sigmoid(s["beta"] * (b - p.kl))) / 2


FAMILY = (
    Objective(
        "nca_pair",
        nca_pair,
        "−log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb)",
        "NCA, arXiv 2402.05369",
        needs=REFERENCE,
        settings=BETA,
    ),
    Objective(
        "bco_pair",
        bco_pair,
        "−log σ(βa − δ) − log σ(−(βb − δ)), δ = reward_shift (0)",
        "BCO, arXiv 2404.04656; TRL's and Liger's have δ = 0",
        needs=REFERENCE,
        optional=("reward_shift",),
        settings=BETA,
    ),
    Objective(
        "apo_zero",
        apo_zero,
        "1 − σ(βa) + σ(βb)",
        "APO, arXiv 2408.06266, eq. 7",
        needs=REFERENCE,
        settings=BETA,
    ),
    Objective(
        "apo_down",
        apo_down,
        "σ(βa) + 1 − σ(β(a − b))",
        "APO, arXiv 2408.06266, eq. 8",
        needs=REFERENCE,
        settings=BETA,
    ),
    Objective(
        "kto",
        kto,
        "½ [1 − σ(β(a − z)) + 1 − σ(β(z − b))], z = kl",
        "KTO, arXiv 2402.01306, with weights 1; Liger",
        needs=(*REFERENCE, "kl"),
        settings=BETA,
    ),
)
