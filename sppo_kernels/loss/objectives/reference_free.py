"""Without a reference: SimPO, AlphaPO, CPO, ORPO, SLiC, RRHF."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sppo_kernels.loss.objectives.base import LENGTHS, SMOOTHED, Pair, log1mexp, objective, smoothed

# e^80 is the largest round power that stays in float32 with room for a factor.
LARGEST_EXPONENT = 80.0


@objective(
    "SimPO, arXiv 2405.14734; label smoothing as in TRL and Liger",
    needs=LENGTHS,
    settings={**SMOOTHED, "margin": 0.5},
)
def simpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """as dpo with x = β(u − v) − γ, γ = margin

    Margin of log-probs a token over a target margin.
    """
    u, v = p.averages
    return smoothed(s["beta"] * (u - v) - s["margin"], s["label_smoothing"])


@objective(
    "AlphaPO, arXiv 2501.03884", needs=LENGTHS, settings={**SMOOTHED, "alpha": None, "margin": 0.5}
)
def alphapo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """as simpo with u replaced by (1 − e^(−αu))/α, v likewise, α = alpha

    SimPO on the rewards (1 − e^(−αu)) / α; exponents are bounded by 80.
    """
    alpha = s["alpha"]
    u, v = (-torch.expm1((-alpha * t).clamp_max(LARGEST_EXPONENT)) / alpha for t in p.averages)
    return smoothed(s["beta"] * (u - v) - s["margin"], s["label_smoothing"])


@objective(
    "CPO, arXiv 2401.08417, eq. 3 and its NLL term", settings={**SMOOTHED, "nll_weight": 1.0}
)
def cpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """as dpo with x = β(log π_θ(y_w) − log π_θ(y_l)), minus λ log π_θ(y_w), λ = nll_weight

    DPO with a uniform reference, and the winner's negative log-likelihood.
    """
    x = s["beta"] * (p.chosen_logps - p.rejected_logps)
    return smoothed(x, s["label_smoothing"]) - s["nll_weight"] * p.chosen_logps


@objective(
    "ORPO, arXiv 2403.07691, eq. 4 and 7 (β its λ)",
    needs=LENGTHS,
    settings={"beta": 0.1, "nll_weight": 1.0},
)
def orpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """−λ u − β log σ(odds(u) − odds(v)), odds(u) = u − log(1 − e^u), λ = nll_weight

    β is the paper's λ; probabilities are geometric means over tokens.
    """
    u, v = p.averages
    log_odds = (u - v) - (log1mexp(u) - log1mexp(v))
    return -s["beta"] * logsigmoid(log_odds) - s["nll_weight"] * u


@objective(
    "SLiC-HF, arXiv 2305.10425, with y_w as the target of the second term",
    settings={"margin": 1.0, "nll_weight": 1.0},
)
def slic(p: Pair, s: Mapping[str, float]) -> Tensor:
    """max(0, δ − log π_θ(y_w) + log π_θ(y_l)) − λ log π_θ(y_w), δ = margin, λ = nll_weight

    Calibration by a hinge, regularised by the winner's likelihood.
    """
    ranking = torch.relu(s["margin"] - p.chosen_logps + p.rejected_logps)
    return ranking - s["nll_weight"] * p.chosen_logps


@objective("RRHF, arXiv 2304.05302, of two responses", needs=LENGTHS, settings={"nll_weight": 1.0})
def rrhf(p: Pair, s: Mapping[str, float]) -> Tensor:
    """max(0, v − u) − λ log π_θ(y_w), λ = nll_weight

    Ranking of log-probs a token, and the winner's negative log-likelihood.
    """
    u, v = p.averages
    return torch.relu(v - u) - s["nll_weight"] * p.chosen_logps
