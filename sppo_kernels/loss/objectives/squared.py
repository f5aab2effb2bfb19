"""Objectives that regress log-ratios on a target by squares: SPPO, IPO, INPO."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sppo_kernels.loss.objectives.base import (
    BETA,
    LENGTHS,
    PREVIOUS,
    REFERENCE,
    WINS,
    Objective,
    Pair,
    per_token,
)


def sppo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """Win rates of both responses; β = 1/η."""
    a, b = p.ratios
    eta = 1.0 / s["beta"]
    wins = (a - eta * (p.chosen_win - 0.5)).square()
    return (wins + (b - eta * (p.rejected_win - 0.5)).square()) / 2


def sppo_single(p: Pair, s: Mapping[str, float]) -> Tensor:
    """One probability a pair, that y_w beats y_l; β = 1/η."""
    a, b = p.ratios
    target = (1.0 / s["beta"]) * (p.chosen_win - 0.5)
    return ((a - target).square() + (b + target).square()) / 2


def sppo_hard(p: Pair, s: Mapping[str, float]) -> Tensor:
    """Win rates 1 and 0. Twice `sppo` of them: TRL and Liger add the squares of a pair."""
    a, b = p.ratios
    target = 0.5 / s["beta"]
    return (a - target).square() + (b + target).square()


def ipo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """β is the paper's τ. With lengths, log-ratios a token, as in TRL."""
    a, b = p.ratios
    if p.chosen_lengths is not None:
        a, b = per_token(a, p.chosen_lengths), per_token(b, p.rejected_lengths)
    return (a - b - 0.5 / s["beta"]).square()


def inpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """β is the paper's η, `reference_share` its τ/η, `previous` its π_t."""
    share = s["reference_share"]
    policy = p.chosen_logps - p.rejected_logps
    reference = p.ref_chosen_logps - p.ref_rejected_logps
    previous = p.previous_chosen_logps - p.previous_rejected_logps
    # differences to each anchor first: log-probs are large, what is left of them is not
    h = share * (policy - reference) + (1 - share) * (policy - previous)
    return (h - 0.5 / s["beta"]).square()


FAMILY = (
    Objective(
        "sppo",
        sppo,
        "½ [(a − (w_w − ½)/β)² + (b − (w_l − ½)/β)²]",
        "SPPO, arXiv 2405.00675, eq. 4.4; uclaml/SPPO sppo/trainer.py, loss_type 'sppo'",
        needs=REFERENCE + WINS,
        settings=BETA,
    ),
    Objective(
        "sppo_single",
        sppo_single,
        "½ [(a − (p − ½)/β)² + (b + (p − ½)/β)²], p = chosen_win = P(y_w ≻ y_l)",
        "uclaml/SPPO sppo/trainer.py, loss_type 'sppo_single'",
        needs=(*REFERENCE, "chosen_win"),
        settings=BETA,
    ),
    Objective(
        "sppo_hard",
        sppo_hard,
        "(a − ½/β)² + (b + ½/β)²",
        "SPPO, arXiv 2405.00675, eq. 4.7 with P = 1 and 0; TRL, Liger",
        needs=REFERENCE,
        settings=BETA,
    ),
    Objective(
        "ipo",
        ipo,
        "(a − b − 1/(2β))²; with lengths (a/|y_w| − b/|y_l| − 1/(2β))²",
        "IPO, arXiv 2310.12036, eq. 17; with lengths TRL's",
        needs=REFERENCE,
        optional=LENGTHS,
        settings=BETA,
    ),
    Objective(
        "inpo",
        inpo,
        "(h − 1/(2β))², h = Δπ_θ − s Δπ_ref − (1 − s) Δπ_t, Δπ = log π(y_w) − log π(y_l), "
        "s = reference_share",
        "INPO, arXiv 2407.00617 (β its η, s its τ/η)",
        needs=REFERENCE + PREVIOUS,
        settings={**BETA, "reference_share": None},
    ),
)
