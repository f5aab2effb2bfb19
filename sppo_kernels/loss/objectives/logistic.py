"""Margins of log-ratios: a − b is classified (DPO and its relatives)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_kernels.loss.objectives.base import (
    BETA,
    LENGTHS,
    REFERENCE,
    SMOOTHED,
    Pair,
    objective,
    per_token,
    smoothed,
)


@objective(
    "DPO, arXiv 2305.18290, eq. 7; ε > 0: cDPO, ericmitchell.ai/cdpo.pdf, eq. 3",
    needs=REFERENCE,
    settings=SMOOTHED,
)
def dpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x), x = β(a − b), ε = label_smoothing

    With label_smoothing this is cDPO.
    """
    return smoothed(s["beta"] * p.ratio_margin, s["label_smoothing"])


@objective("SPIN, arXiv 2401.01335, with the logistic loss (β its λ)", needs=REFERENCE)
def spin(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(x)

    β is the paper's λ; y_w is human, y_l sampled from the previous policy, the reference.
    """
    return -logsigmoid(s["beta"] * p.ratio_margin)


@objective("robust DPO, arXiv 2403.00409", needs=REFERENCE, settings=SMOOTHED)
def robust(p: Pair, s: Mapping[str, float]) -> Tensor:
    """[−(1 − ε) log σ(x) + ε log σ(−x)] / (1 − 2ε)

    Unbiased when a share ε of the labels is flipped.
    """
    x, flipped = s["beta"] * p.ratio_margin, s["label_smoothing"]
    return (flipped * logsigmoid(-x) - (1 - flipped) * logsigmoid(x)) / (1 - 2 * flipped)


@objective("RSO, arXiv 2309.06657 (hinge-norm)", needs=REFERENCE)
def hinge(p: Pair, s: Mapping[str, float]) -> Tensor:
    """max(0, 1 − x)

    RSO's hinge on normalised likelihoods.
    """
    return torch.relu(1 - s["beta"] * p.ratio_margin)


@objective(
    "EXO, arXiv 2402.00856, eq. 16", needs=REFERENCE, settings={**BETA, "label_smoothing": None}
)
def exo_pair(p: Pair, s: Mapping[str, float]) -> Tensor:
    """σ(x) [log σ(x) − log(1 − ε)] + σ(−x) [log σ(−x) − log ε]

    KL from (σ(x), σ(−x)) to (1 − ε, ε).
    """
    x, flipped = s["beta"] * p.ratio_margin, s["label_smoothing"]
    wins = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-flipped))
    return wins + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(flipped))


@objective("DiscoPOP, arXiv 2406.08414, eq. 5", needs=REFERENCE, settings={**BETA, "tau": 0.05})
def discopop(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−σ(−x/τ) log σ(x) + σ(x/τ) e^(−x), τ = tau

    Logistic loss blended with an exponential one.
    """
    x, tau = s["beta"] * p.ratio_margin, s["tau"]
    # e^(−x) σ(x/τ) as one exponential: its factors overflow and vanish
    exponential = torch.exp(logsigmoid(x / tau) - x)
    return exponential - torch.sigmoid(-x / tau) * logsigmoid(x)


@objective("length-normalised DPO, Tülu 3, arXiv 2411.15124", needs=REFERENCE + LENGTHS)
def sigmoid_norm(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(β (a/|y_w| − b/|y_l|))

    DPO on log-ratios a token.
    """
    a, b = p.ratios
    return -logsigmoid(
        s["beta"] * (per_token(a, p.chosen_lengths) - per_token(b, p.rejected_lengths))
    )


@objective("R-DPO, arXiv 2403.19159", needs=REFERENCE + LENGTHS, settings={**BETA, "alpha": None})
def rdpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(x + α(|y_w| − |y_l|)), α = alpha

    A longer winner needs less of a margin, so length is not learnt.
    """
    longer = p.chosen_lengths - p.rejected_lengths
    return -logsigmoid(s["beta"] * p.ratio_margin + s["alpha"] * longer)


@objective(
    "DPO-Positive (Smaug), arXiv 2402.13228", needs=REFERENCE, settings={**BETA, "penalty": 50.0}
)
def dpop(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−log σ(β (a − b − λ max(0, −a))), λ = penalty

    Punishes a winner that became less likely than under the reference.
    """
    a, b = p.ratios
    return -logsigmoid(s["beta"] * (a - b - s["penalty"] * torch.relu(-a)))


@objective("AOT, arXiv 2406.05882 (paired)", needs=REFERENCE, settings=SMOOTHED, paired=False)
def aot(p: Pair, s: Mapping[str, float]) -> Tensor:
    """as dpo with x = β(sort(Δπ_θ) − sort(Δπ_ref)), Δπ = log π(y_w) − log π(y_l)

    Sorted margins of the policy against sorted margins of the reference.
    """
    policy = (p.chosen_logps - p.rejected_logps).sort().values
    reference = (p.ref_chosen_logps - p.ref_rejected_logps).sort().values
    return smoothed(s["beta"] * (policy - reference), s["label_smoothing"])


@objective("AOT, arXiv 2406.05882 (unpaired)", needs=REFERENCE, settings=SMOOTHED, paired=False)
def aot_unpaired(p: Pair, s: Mapping[str, float]) -> Tensor:
    """as dpo with x = β(sort(a) − sort(b))

    Sorted log-ratios of the winners against sorted ones of the losers.
    """
    a, b = p.ratios
    return smoothed(s["beta"] * (a.sort().values - b.sort().values), s["label_smoothing"])
