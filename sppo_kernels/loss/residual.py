"""The one residual of SPPO, which every loss, kernel and metric takes from here."""

from __future__ import annotations

from torch import Tensor


def residual(logps: Tensor, ref_logps: Tensor, win_rate: Tensor, eta: float) -> Tensor:
    """r = log π_θ(y|x) − log π_t(y|x) − η (w − ½), in nats: arXiv 2405.00675, eq. (4.4).

    Args:
        logps, ref_logps: [S] log-probabilities of responses, summed over tokens.
        win_rate: [S], or a number: P(y beats a response of π_t).
        eta: η = 1/β.
    """
    return logps - ref_logps - eta * (win_rate - 0.5)
