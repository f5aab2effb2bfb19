"""The SPPO loss on sequence log-probabilities, and fused with them.

For a response y with win rate w = P̂(y ≻ π_t | x), the squared loss of arXiv 2405.00675, eq. (4.4)
with win rates estimated as in its section 4.2:

    r = log π_θ(y|x) − log π_t(y|x) − η (w − ½),    L = mean of r²
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve
from sppo_kernels.logps.linear import (
    DEFAULT_RETAIN_BYTES,
    LinearInputs,
    check_budget,
    checked_linear,
    chunk_rows_for,
    gradients_needed,
    rows_within,
    token_logps_of,
)
from sppo_kernels.logps.token import checked_logits, sequence_logps, sequence_offsets, sum_sequences
from sppo_kernels.registry import op
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
    eta = checks.positive("eta", eta)
    policy = logps.to(ref.dtype)
    unit = 1.0 / eta if units == "win_rate" else 1.0
    # η (w − ½) is formed before the units, so that both units see the same rounding of it.
    residual = (policy - ref - eta * (win - 0.5)) * unit
    return _reduce(scale * residual.square(), reduction)


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
    """`sppo_loss` of `sequence_logps`, with the loss and row coefficients inside the kernels.

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
    rows, targets = checked_logits(logits, labels, ignore_index)
    chosen = resolve(impl, rows.device.type, rows.dtype)
    if chosen == "reference":
        logps = sequence_logps(logits, labels, cu_seqlens, ignore_index=ignore_index, impl=chosen)
        loss = sppo_loss(
            logps, ref_logps, win_rate, eta=eta, weights=weights, reduction=reduction, units=units
        )
        return SPPOOutput(loss, logps.detach())
    offsets = sequence_offsets(labels.shape, cu_seqlens, rows.device)
    like = offsets.new_empty(offsets.shape[0] - 1, dtype=torch.float32)
    ref, win, scale = _constants(like, ref_logps, win_rate, weights, reduction, units)
    inplace = inplace_backward and not torch.compiler.is_compiling()  # compilers reuse memory
    loss, logps, *_ = op("sppo_from_logits")(
        rows, targets, offsets, ref, win, scale, checks.positive("eta", eta),
        units == "win_rate", ignore_index, inplace, chosen,
    )  # fmt: skip
    return SPPOOutput(_reduce(loss, reduction), logps.detach())


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
    inputs = checked_linear(
        hidden,
        weight,
        labels,
        bias=bias,
        rows=rows,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    chosen = resolve(impl, inputs.hidden.device.type, inputs.hidden.dtype)
    offsets = sequence_offsets(labels.shape, cu_seqlens, hidden.device)
    eta = checks.positive("eta", eta)
    checks.choice("reduction", reduction, REDUCTIONS)
    plan = None
    if chosen != "reference" and reduction != "none":
        plan = _plan_groups(inputs, labels.shape, cu_seqlens, check_budget(memory_budget))
    if plan is None:
        logps = sum_sequences(token_logps_of(inputs, memory_budget, chosen), offsets, chosen)
        loss = sppo_loss(
            logps, ref_logps, win_rate, eta=eta, weights=weights, reduction=reduction, units=units
        )
        return SPPOOutput(loss, logps.detach())
    bounds, groups, chunk, retain = plan
    like = hidden.new_empty(len(bounds) - 1, dtype=torch.float32)
    ref, win, scale = _constants(like, ref_logps, win_rate, weights, reduction, units)
    loss, logps, *_ = op("linear_sppo_grouped")(
        *inputs, bounds, groups, ref, win, scale, eta, units == "win_rate",
        *gradients_needed(inputs), chunk, retain, chosen,
    )  # fmt: skip
    return SPPOOutput(_reduce(loss, reduction), logps.detach())


def _plan_groups(
    inputs: LinearInputs, shape: torch.Size, cu_seqlens: Tensor | None, budget: int | None
) -> tuple[list[int], list[int], int, int] | None:
    """Sequence bounds, group bounds (in sequences), chunk and retained rows; None: one group."""
    _, need_dw, need_db = gradients_needed(inputs)
    if not (need_dw or need_db):
        return None
    vocab, dim = inputs.weight.shape
    if budget is None:
        budget = max(DEFAULT_RETAIN_BYTES, 8 * dim * vocab)
    chunk = chunk_rows_for(inputs, budget)
    total = inputs.labels.shape[0]
    if rows_within(inputs, budget, chunk, keep_chunk=False) >= total:
        return None
    if cu_seqlens is None:
        bounds = [i * shape[1] for i in range(shape[0] + 1)]
    elif cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
    else:
        return None
    most = max(1, budget // (vocab * inputs.hidden.element_size()))
    groups = [0]
    for s in range(1, len(bounds) - 1):
        if bounds[s + 1] - bounds[groups[-1]] > most:
            groups.append(s)
    groups.append(len(bounds) - 1)
    longest = max(bounds[b] - bounds[a] for a, b in itertools.pairwise(groups))
    if longest > most:  # a sequence over the budget: keep whole chunks of it, and one to work in
        return bounds, groups, chunk, max(0, (most - chunk) // chunk * chunk)
    return bounds, groups, chunk, longest


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
