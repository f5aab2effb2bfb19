"""Losses and rewards of pairs, each given as (of the chosen responses, of the rejected ones)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import sppo_kernels as sk

Pair = tuple[Tensor | None, Tensor | None]


def pair_loss(
    logps: Pair, ref_logps: Pair, win_rates: Pair | None = None, *, kind: str | None = None,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """`sk.pairwise_loss`; kind None is SPPO's, "sppo" with win rates and "sppo_hard" without.

    Args:
        logps, ref_logps: two [P] each, in nats. win_rates: two [P] in [0, 1], or None.
    """
    kind = kind or ("sppo_hard" if win_rates is None else "sppo")
    chosen, rejected = win_rates or (None, None)
    rates = {"chosen_win": chosen, "rejected_win": rejected}
    return sk.pairwise_loss(*logps, *ref_logps, kind=kind, **rates, **settings)


def pair_rewards(logps: Pair, ref_logps: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """β(log π − log π_ref) of both sides, detached."""
    chosen, rejected = (beta * (p - r).detach() for p, r in zip(logps, ref_logps, strict=True))
    return chosen, rejected
