"""Log-probabilities from hidden states, without ever holding the logits of all rows.

Three GEMMs instead of four, and one chunk of logits: docs/math.md, impl/streaming.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve
from sppo_kernels.logps import _autograd, dispatch, reference  # noqa: F401  (registers the kernels)
from sppo_kernels.logps.token import sequence_offsets, sum_sequences
from sppo_kernels.registry import op

__all__ = ["linear_sequence_logps", "linear_token_logps"]

assert _autograd  # imported for its registrations

# Rows of a chunk: enough for the GEMMs to run at full rate, few enough for the logits of a chunk
# to stay small. Fixed, so that policy and reference see GEMMs of the same shapes.
CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}
DEFAULT_RETAIN_BYTES = 4 << 30


class LinearInputs(NamedTuple):
    """Checked arguments of a hidden-in call, in the order of the operators."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [L]
    rows: Tensor | None  # [L]
    logit_scale: float
    softcap: float | None
    ignore_index: int


def checked_linear(
    hidden: object,
    weight: object,
    labels: object,
    *,
    bias: object,
    rows: object,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> LinearInputs:
    """Check and flatten: hidden to [N, D], labels and rows to [L]; cast as autocast would."""
    hidden = checks.floating("hidden", hidden)
    weight = checks.floating("weight", weight, 2)
    labels = checks.integers("labels", labels)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape [..., D], got {tuple(hidden.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}] (D of hidden), got "
            f"{tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    if labels.device.type != "cpu":  # host labels let ignored rows be dropped without a sync
        checks.same_device("labels", labels, "hidden", hidden)
    if rows is None:
        checks.shape("labels", labels, hidden.shape[:-1], "that of hidden without its last one")
    else:
        rows = checks.integers("rows", rows)
        checks.shape("rows", rows, labels.shape, "that of labels")
        if rows.device.type != "cpu":
            checks.same_device("rows", rows, "hidden", hidden)
    if bias is not None:
        bias = checks.floating("bias", bias, 1)
        checks.shape("bias", bias, weight.shape[:1], "V of weight")
        checks.same_device("bias", bias, "hidden", hidden)
    logit_scale = checks.positive("logit_scale", logit_scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    checks.labels_in_range(labels, weight.shape[0], ignore_index)

    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight: expected {hidden.dtype}, the dtype of hidden, got {weight.dtype} (under "
            "torch.autocast both are cast)"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    if rows is not None:
        checks.rows_in_range(rows, hidden.shape[0])
        rows = rows.reshape(-1).contiguous().to(hidden.device, torch.int64, non_blocking=True)
    labels = labels.reshape(-1).contiguous()
    return LinearInputs(hidden, weight, bias, labels, rows, logit_scale, softcap, int(ignore_index))


def gradients_needed(inputs: LinearInputs) -> tuple[bool, bool, bool]:
    """Whether hidden, weight, bias need a gradient now: this decides between 1U, 2U and 3U."""
    if not torch.is_grad_enabled():
        return False, False, False
    bias = inputs.bias is not None and inputs.bias.requires_grad
    return inputs.hidden.requires_grad, inputs.weight.requires_grad, bias


def chunk_rows_for(inputs: LinearInputs, memory_budget: int | None) -> int:
    """Rows of a chunk; fewer than usual only when the budget cannot hold the usual chunk."""
    rows = CHUNK_ROWS.get(inputs.hidden.device.type, 1024)
    if memory_budget is not None:
        row_bytes = inputs.weight.shape[0] * inputs.hidden.element_size()
        while rows > 64 and rows * row_bytes > memory_budget // 2:
            rows //= 2
    return rows


def rows_within(inputs: LinearInputs, budget: int, chunk_rows: int, keep_chunk: bool) -> int:
    """How many rows of dz fit in `budget` bytes, in whole chunks; all rows when all fit."""
    total = inputs.labels.shape[0]
    row_bytes = inputs.weight.shape[0] * inputs.hidden.element_size()
    if total * row_bytes <= budget:
        return total
    fit = budget // row_bytes - (chunk_rows if keep_chunk else 0)
    return max(0, fit - fit % chunk_rows)


def check_budget(memory_budget: object) -> int | None:
    if memory_budget is None:
        return None
    return int(checks.positive("memory_budget", memory_budget))


def token_logps_of(inputs: LinearInputs, memory_budget: int | None, impl: str) -> Tensor:
    """log p [L] of checked inputs, by the backend that `impl` resolves to."""
    chosen = resolve(impl, inputs.hidden.device.type, inputs.hidden.dtype)
    if chosen == "reference":
        labels = inputs.labels.to(inputs.hidden.device)
        return reference.linear_token_logps(*inputs._replace(labels=labels))
    need_dx, need_dw, need_db = gradients_needed(inputs)
    budget = check_budget(memory_budget)
    chunk = chunk_rows_for(inputs, budget)
    retain = inputs.labels.shape[0]
    if budget is not None:
        retain = rows_within(inputs, budget, chunk, keep_chunk=True)
    if not (need_dw or need_db):
        retain = 0
    logp, _, _ = op("linear_token_logps")(
        *inputs, need_dx, need_dw or need_db, chunk, retain, chosen
    )
    return logp


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under logits computed from hidden states.

    The logits are softcap·tanh(u / softcap) (or u itself) with
    u = logit_scale · (hidden[rows] weightᵀ + bias).

    Args:
        hidden: [..., D], bfloat16, float16, float32 (or float64: reference).
        weight: [V, D], the head, of the dtype of `hidden`; under torch.autocast both are cast.
        labels: [...], int64 or int32: the token each row predicts. Ignored labels cost nothing on
            the CPU, and on a GPU when `labels` (and `rows`) are given on the CPU; GPU labels are
            never read by the host, so there an ignored row costs its share of the GEMMs.
        bias: [V] or None.
        rows: the shape of `labels`, indices into the flattened rows of `hidden`; many labels may
            share a row. Without it, label i belongs to row i.
        logit_scale: factor on the logits, above 0.
        softcap: the logits' soft bound, above 0 (Gemma 2), or None.
        ignore_index: labels with this value give 0 and a zero gradient.
        memory_budget: bytes that may be held for logits (the chunk in work and what is kept for
            the weight's gradient). Rows over it are recomputed in backward: 4 GEMMs for them
            instead of 3. None keeps all rows when the weight needs a gradient.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        float32 (float64 for float64), in nats, the shape of `labels`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        RuntimeError: `impl` cannot run here.
    """
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
    return token_logps_of(inputs, memory_budget, impl).view(labels.shape)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each sequence from hidden states: sums of `linear_token_logps`.

    Args:
        hidden: [B, T, D] padded, or [N, D] packed with `cu_seqlens`; any [..., D] with `rows`.
        labels: [B, T] or [N].
        cu_seqlens: [S+1] over the labels, as in `sequence_logps`.

    Returns:
        [S] float32 (float64 for float64), in nats. An empty or fully ignored sequence has
        log-probability 0 and zero gradient.

    The other arguments and errors are those of `linear_token_logps`.
    """
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
    offsets = sequence_offsets(labels.shape, cu_seqlens, hidden.device)
    logp = token_logps_of(inputs, memory_budget, impl)
    return sum_sequences(
        logp, offsets, resolve(impl, inputs.hidden.device.type, inputs.hidden.dtype)
    )
