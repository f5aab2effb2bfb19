"""Log-probability, entropy and further statistics of each token, from hidden states.

One more read of each chunk of logits that linear_token_logps computes anyway; docs/math.md.
"""

from __future__ import annotations

from torch import Tensor

from sppo_kernels.backend import resolve
from sppo_kernels.logps import _stats_autograd, dispatch_stats, reference  # noqa: F401  (registers the kernels)
from sppo_kernels.logps.linear import (
    LinearInputs,
    check_budget,
    checked_linear,
    chunk_rows_for,
    gradients_needed,
    rows_within,
    token_logps_of,
)
from sppo_kernels.registry import op
from sppo_kernels.results import TokenStats

__all__ = ["TOKEN_STATS", "linear_token_stats"]

assert _stats_autograd  # imported for its registrations

TOKEN_STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _wanted(outputs: object) -> tuple[bool, bool, bool, bool]:
    """Which of TOKEN_STATS are asked for."""
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(f"outputs: expected a tuple of names out of {TOKEN_STATS}, got {outputs!r}")
    unknown = [name for name in outputs if name not in TOKEN_STATS]
    if unknown:
        raise ValueError(f"outputs: expected names out of {TOKEN_STATS}, got {unknown[0]!r}")
    return tuple(name in outputs for name in TOKEN_STATS)


def _fused(
    inputs: LinearInputs,
    wanted: tuple[bool, bool, bool, bool],
    memory_budget: int | None,
    entropy_grad: bool,
    impl: str,
) -> list[Tensor]:
    """log p and the four statistics [L], those not wanted without elements."""
    need_dx, need_dw, need_db = gradients_needed(inputs)
    need_dw = need_dw or need_db
    if entropy_grad and wanted[0]:
        need_dx = need_dw = False
    budget = check_budget(memory_budget)
    chunk = chunk_rows_for(inputs, budget)
    retain = 0
    if need_dw:
        retain = inputs.labels.shape[0]
        if budget is not None:
            retain = rows_within(inputs, budget, chunk, keep_chunk=True)
    return op("linear_token_stats")(*inputs, *wanted, need_dx, need_dw, chunk, retain, impl)[:5]


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    outputs: tuple[str, ...] = ("entropy",),
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """`linear_token_logps` together with statistics of each token's distribution.

    With u the logits of a label's row (transformed by bias, scale and softcap, as in
    `linear_token_logps`) and p = softmax(u): the entropy −Σ p log p, log Σ p², the mean of u, and
    whether the label is the first maximum of u. Gradients pass through the log-probabilities and
    the entropy: ∂H/∂u = −p (log p + H); the others are constants.

    Args:
        outputs: which of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" to compute. With
            none of them the log-probabilities are those of `linear_token_logps`, to the bit.
        entropy_grad: whether backward will bring a gradient for the entropy. Any gradient is right
            with either value; True skips the product that serves the log-probs' gradient alone:
            with a trainable head 4 products in all (1 forward, 3 backward) instead of 5 (2 and 3).

    Returns:
        `TokenStats`, each field of the shape of `labels`: float32 (float64 for float64) in nats,
        `is_top1` bool; None where not asked for; 0 or False for ignored labels.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        RuntimeError: `impl` cannot run here.

    The other arguments are those of `linear_token_logps`.
    """
    wanted = _wanted(outputs)
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
    if not any(wanted):
        return TokenStats(
            token_logps_of(inputs, memory_budget, impl).view(labels.shape), None, None, None, None
        )
    chosen = resolve(impl, inputs.hidden.device.type, inputs.hidden.dtype)
    if chosen == "reference":
        inputs = inputs._replace(labels=inputs.labels.to(inputs.hidden.device))
        logits = reference.linear_logits(*inputs)
        found = [
            reference.token_logps(logits, inputs.labels, inputs.ignore_index),
            *reference.logits_stats(logits, inputs.labels, inputs.ignore_index, *wanted),
        ]
    else:
        found = _fused(inputs, wanted, memory_budget, entropy_grad, chosen)
    return TokenStats(
        *(
            values.view(labels.shape) if asked else None
            for values, asked in zip(found, (True, *wanted), strict=True)
        )
    )
