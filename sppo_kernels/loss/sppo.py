"""The SPPO loss on sequence log-probabilities, and fused with them.

For a response y with win rate w = P̂(y ≻ π_t | x), the squared loss of arXiv 2405.00675, eq. (4.4)
with win rates estimated as in its section 4.2:

    r = log π_θ(y|x) − log π_t(y|x) − η (w − ½),    L = mean of r²
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.logps.call import checked
from sppo_kernels.logps.linear import logps_of
from sppo_kernels.logps.segments import sequence_offsets, sum_sequences
from sppo_kernels.logps.token import sequence_logps
from sppo_kernels.loss.grouped import grouped_loss, plan_groups
from sppo_kernels.loss.residual import residual
from sppo_kernels.results import SPPOOutput

__all__ = ["fused_linear_sppo_loss", "fused_sppo_loss", "sppo_loss"]

REDUCTIONS = ("mean", "sum", "none")
UNITS = ("log_ratio", "win_rate")


def sppo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    *,
    eta: float = 1000.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    units: str = "log_ratio",
) -> Tensor:
    """Squared SPPO loss of responses, from their log-probabilities.

    Args:
        logps: [S] log π_θ(y|x), in nats; differentiable.
        ref_logps: [S] log π_t(y|x), in nats.
        win_rate: [S] estimated probability in [0, 1] that y beats a response of π_t.
        eta: η = 1/β, the step size of self-play; 1000 in the paper.
        weights: [S] weight of each response, at least 0, or None for 1.
        reduction: "mean" (Σ weights·L / Σ weights), "sum" (Σ weights·L) or "none" (weights·L).
        units: "log_ratio", the paper's residual r in nats; "win_rate", r/η, whose loss is smaller
            by η², of order 1, so that gradient clipping and learning rates of other losses fit.

    Returns:
        float32 (float64 for float64 logps), shape [] or, with reduction "none", [S].

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    logps = checks.floating("logps", logps, 1)
    ref, win, scale = _constants(logps, ref_logps, win_rate, weights, reduction, units)
    eta, unit = _step_size(eta, units)
    # η (w − ½) is formed before the units, so that both units see the same rounding of it.
    r = residual(logps.to(ref.dtype), ref, win, eta) * unit
    return _reduce(scale * r.square(), reduction)


def fused_sppo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eta: float = 1000.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    units: str = "log_ratio",
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> SPPOOutput:
    """`sppo_loss` of `sequence_logps`: from logits, which are read once for the loss.

    Args:
        logits, labels, cu_seqlens, ignore_index, inplace_backward, impl: as in `sequence_logps`.
        ref_logps, win_rate, eta, weights, reduction, units: as in `sppo_loss`; constants here.

    Returns:
        SPPOOutput(loss, logps): the loss differentiates with respect to `logits`; `logps` [S]
        is detached.

    Raises:
        ValueError: ref_logps, win_rate or weights require a gradient (compose
            `sppo_loss(sequence_logps(...), ...)` for that); else as `sequence_logps`, `sppo_loss`.
    """
    _no_gradient(ref_logps=ref_logps, win_rate=win_rate, weights=weights)
    logps = sequence_logps(
        logits, labels, cu_seqlens, ignore_index=ignore_index, inplace_backward=inplace_backward,
        impl=impl,
    )  # fmt: skip
    loss = sppo_loss(
        logps, ref_logps, win_rate, eta=eta, weights=weights, reduction=reduction, units=units
    )
    return SPPOOutput(loss, logps.detach())


def fused_linear_sppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eta: float = 1000.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    units: str = "log_ratio",
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> SPPOOutput:
    """`sppo_loss` of `linear_sequence_logps`: from hidden states, never holding the logits.

    Args:
        hidden, weight, labels, cu_seqlens, bias, rows, logit_scale, softcap, ignore_index, impl:
            as in `linear_sequence_logps`.
        ref_logps, win_rate, eta, weights, reduction, units: as in `sppo_loss`; constants here.
        memory_budget: bytes that may be held for logits. Over it, whole sequences are packed into
            groups whose gradients are finished one after another, still with three GEMMs (only a
            sequence that alone exceeds the budget is recomputed). Groups need the sequences'
            bounds on the host: padded labels, or `cu_seqlens` on the CPU; otherwise, and with
            reduction "none", rows over the budget are recomputed. None groups only when more than
            4 GiB and more than twice the weight's float32 gradient would be held.

    Returns:
        SPPOOutput(loss, logps): the loss differentiates with respect to hidden, weight and bias;
        `logps` [S] is detached.

    Raises:
        ValueError: ref_logps, win_rate or weights require a gradient; else as
            `linear_sequence_logps` and `sppo_loss`.
    """
    _no_gradient(ref_logps=ref_logps, win_rate=win_rate, weights=weights)
    call = checked(
        hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, memory_budget, impl
    )
    offsets = sequence_offsets(labels.shape, cu_seqlens, hidden.device)
    checks.choice("reduction", reduction, REDUCTIONS)
    step = _step_size(eta, units)
    plan = None
    if reduction != "none":
        plan = plan_groups(call, labels.shape, cu_seqlens, memory_budget)
    if plan is None:
        logps = sum_sequences(logps_of(call), offsets, call.impl)
        loss = sppo_loss(
            logps, ref_logps, win_rate, eta=eta, weights=weights, reduction=reduction, units=units
        )
        return SPPOOutput(loss, logps.detach())
    like = hidden.new_empty(offsets.shape[0] - 1, dtype=torch.float32)
    constants = _constants(like, ref_logps, win_rate, weights, reduction, units)
    loss, logps = grouped_loss(plan, *constants, *step)
    return SPPOOutput(_reduce(loss, reduction), logps.detach())


def _step_size(eta: object, units: str) -> tuple[float, float]:
    """η, and what a residual in nats is multiplied by in these units."""
    eta = checks.positive("eta", eta)
    return eta, 1.0 / eta if units == "win_rate" else 1.0


def _no_gradient(**constants: Tensor | None) -> None:
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: expected a constant, got a tensor that requires grad; detach it, or "
                "compose sppo_loss with the log-prob functions"
            )


def _constants(
    logps: Tensor,
    ref_logps: object,
    win_rate: object,
    weights: object,
    reduction: str,
    units: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """ref_logps, win_rate and the scale of each response's loss, checked, in one dtype."""
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("units", units, UNITS)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    given = {"ref_logps": ref_logps, "win_rate": win_rate}
    if weights is not None:
        given["weights"] = weights
    for name, value in given.items():
        value = checks.floating(name, value, 1)
        checks.shape(name, value, logps.shape, "one for each response")
        checks.same_device(name, value, "the log-probabilities", logps)
        given[name] = value.to(dtype).contiguous()
    if logps.shape[0] == 0 and reduction == "mean":
        raise ValueError("logps: expected at least one response for reduction='mean', got none")
    checks.win_rates(given["win_rate"])
    if weights is None:
        count = logps.shape[0] if reduction == "mean" else 1
        scale = torch.full(logps.shape, 1.0 / count, dtype=dtype, device=logps.device)
    else:
        checks.weights(given["weights"])
        scale = given["weights"]
        if reduction == "mean":
            scale = scale / scale.sum()
    return given["ref_logps"], given["win_rate"], scale


def _reduce(scaled: Tensor, reduction: str) -> Tensor:
    return scaled if reduction == "none" else scaled.sum()
