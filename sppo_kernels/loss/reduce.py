"""Weights and reductions of losses that have a row for each response or pair."""

from __future__ import annotations

from torch import Tensor

from sppo_kernels import checks

REDUCTIONS = ("mean", "sum", "none")


def checked_weights(
    weights: object, reduction: str, like: Tensor, name: str, row: str
) -> Tensor | None:
    """`weights` in the dtype of `like` [S], or None, checked together with the reduction.

    Args:
        weights: [S], finite and at least 0, or None for 1.
        reduction: "mean", "sum" or "none".
        like: [S] what is weighted.
        name, row: the argument whose rows these are and what one of them is, for messages.

    Raises:
        TypeError, ValueError: what is not so, or a mean of no rows.
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    if like.shape[0] == 0 and reduction == "mean":
        raise ValueError(f"{name}: expected at least one {row} for reduction='mean', got none")
    if weights is None:
        return None
    weights = checks.floating("weights", weights, 1)
    checks.shape("weights", weights, like.shape, f"one for each {row}")
    checks.same_device("weights", weights, name, like)
    checks.weights(weights)
    return weights.to(like.dtype)


def reduced(loss: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """By "none" weights·L [S]; "sum": Σ weights·L; "mean": Σ weights·L / Σ weights."""
    weighted = loss if weights is None else loss * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    return loss.mean() if weights is None else weighted.sum() / weights.sum()
