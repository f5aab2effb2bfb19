"""Each response by itself: NCA, BCO, APO, KTO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_kernels.loss.objectives.base import REFERENCE, Pair, objective


@objective("NCA, arXiv 2402.05369", needs=REFERENCE)
def nca_pair(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb)

    NCA with one winner and one loser.
    """
    u, v = (s["beta"] * ratio for ratio in p.ratios)
    return -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v)


@objective(
    "BCO, arXiv 2404.04656; TRL's and Liger's have δ = 0",
    needs=REFERENCE,
    optional=("reward_shift",),
)
def bco_pair(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(βa − δ) − log σ(−(βb − δ)), δ = reward_shift (0)

    `reward_shift` is the paper's running mean of rewards, kept by the caller; 0 as in TRL.
    """
    u, v = (s["beta"] * ratio for ratio in p.ratios)
    if p.reward_shift is not None:
        u, v = u - p.reward_shift, v - p.reward_shift
    return -logsigmoid(u) - logsigmoid(-v)


@objective("APO, arXiv 2408.06266, eq. 7", needs=REFERENCE)
def apo_zero(p: Pair, s: Mapping[str, float]) -> Tensor:
    """1 − σ(βa) + σ(βb)

    The winner up, the loser down.
    """
    a, b = p.ratios
    return torch.sigmoid(-s["beta"] * a) + torch.sigmoid(s["beta"] * b)


@objective("APO, arXiv 2408.06266, eq. 8", needs=REFERENCE)
def apo_down(p: Pair, s: Mapping[str, float]) -> Tensor:
    """σ(βa) + 1 − σ(β(a − b))

    Both down, the loser more.
    """
    a, b = p.ratios
    return torch.sigmoid(s["beta"] * a) + torch.sigmoid(-s["beta"] * (a - b))


@objective("KTO, arXiv 2402.01306, with weights 1; Liger", needs=(*REFERENCE, "kl"))
def kto(p: Pair, s: Mapping[str, float]) -> Tensor:
    """½ [1 − σ(β(a − z)) + 1 − σ(β(z − b))], z = kl

    Half of each: the mean over pairs is KTO's mean over responses.
    """
    a, b = p.ratios
    wins = torch.sigmoid(s["beta"] * (p.kl - a))
    return (wins + torch.sigmoid(s["beta"] * (b - p.kl))) / 2
