"""Squares: log-ratios are regressed on a target (SPPO, IPO, INPO)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sppo_kernels.loss.objectives.base import (
    BETA,
    LENGTHS,
    PREVIOUS,
    REFERENCE,
    WINS,
    Pair,
    objective,
    per_token,
)
from sppo_kernels.loss.residual import residual


def _squares(
    p: Pair, chosen_win: Tensor | float, rejected_win: Tensor | float, eta: float
) -> Tensor:
    wins = residual(p.chosen_logps, p.ref_chosen_logps, chosen_win, eta)
    losses = residual(p.rejected_logps, p.ref_rejected_logps, rejected_win, eta)
    return wins.square() + losses.square()


@objective(
    "SPPO, arXiv 2405.00675, eq. 4.4; uclaml/SPPO sppo/trainer.py, loss_type 'sppo'",
    needs=REFERENCE + WINS,
)
def sppo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """½ [(a − (w_w − ½)/β)² + (b − (w_l − ½)/β)²]

    Win rates of both responses; β = 1/η.
    """
    return _squares(p, p.chosen_win, p.rejected_win, 1.0 / s["beta"]) / 2


@objective("uclaml/SPPO sppo/trainer.py, loss_type 'sppo_single'", needs=(*REFERENCE, "chosen_win"))
def sppo_single(p: Pair, s: Mapping[str, float]) -> Tensor:
    """½ [(a − (p − ½)/β)² + (b + (p − ½)/β)²], p = chosen_win = P(y_w ≻ y_l)

    One probability a pair, that y_w beats y_l; β = 1/η.
    """
    return _squares(p, p.chosen_win, 1 - p.chosen_win, 1.0 / s["beta"]) / 2


@objective("SPPO, arXiv 2405.00675, eq. 4.7 with P = 1 and 0; TRL, Liger", needs=REFERENCE)
def sppo_hard(p: Pair, s: Mapping[str, float]) -> Tensor:
    """(a − ½/β)² + (b + ½/β)²

    Win rates 1 and 0. Twice `sppo` of them: TRL and Liger add the squares of a pair.
    """
    return _squares(p, 1.0, 0.0, 1.0 / s["beta"])


@objective("IPO, arXiv 2310.12036, eq. 17; with lengths TRL's", needs=REFERENCE, optional=LENGTHS)
def ipo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """(a − b − 1/(2β))²; with lengths (a/|y_w| − b/|y_l| − 1/(2β))²

    β is the paper's τ. With lengths, log-ratios a token, as in TRL.
    """
    a, b = p.ratios
    if p.chosen_lengths is not None:
        a, b = per_token(a, p.chosen_lengths), per_token(b, p.rejected_lengths)
    return (a - b - 0.5 / s["beta"]).square()


@objective(
    "INPO, arXiv 2407.00617 (β its η, s its τ/η)",
    needs=REFERENCE + PREVIOUS,
    settings={**BETA, "reference_share": None},
)
def inpo(p: Pair, s: Mapping[str, float]) -> Tensor:
    """(h − 1/(2β))², h = Δπ_θ − s Δπ_ref − (1 − s) Δπ_t, Δπ = log π(y_w) − log π(y_l),
    s = reference_share

    β is the paper's η, `reference_share` its τ/η, `previous` its π_t.
    """
    share = s["reference_share"]
    policy = p.chosen_logps - p.rejected_logps
    reference = p.ref_chosen_logps - p.ref_rejected_logps
    previous = p.previous_chosen_logps - p.previous_rejected_logps
    # differences to each anchor first: log-probs are large, what is left of them is not
    h = share * (policy - reference) + (1 - share) * (policy - previous)
    return (h - 0.5 / s["beta"]).square()
