"""Sums over the sequences of packed rows: S_s = Σ_{i∈s} log p(y_i), and the transpose.

Kernels: csrc/cpu/rows.cpp (float64 sums), triton/segments.py (a fixed tree), reference.py.
Tests: tests/logps/test_token.py, tests/logps/test_triton_segments.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.logps import reference
from sppo_kernels.logps.call import load
from sppo_kernels.registry import define, fake, formula, kernel, op

# values [N], cu_seqlens [S+1] -> [S], and its transpose.
define("segment_sum", "(Tensor values, Tensor cu_seqlens, str impl) -> Tensor")
define("segment_expand", "(Tensor values, Tensor cu_seqlens, SymInt rows, str impl) -> Tensor")


@fake("segment_sum")
def _(values, cu_seqlens, impl):
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


@fake("segment_expand")
def _(values, cu_seqlens, rows, impl):
    return values.new_empty(rows, dtype=torch.float32)


@kernel("segment_sum")
def _(values, cu_seqlens, impl):
    return load(impl).segment_sum(values.contiguous(), cu_seqlens)


@kernel("segment_expand")
def _(values, cu_seqlens, rows, impl):
    return load(impl).segment_expand(values.contiguous(), cu_seqlens, rows)


def _save(ctx, inputs, output) -> None:
    values, cu_seqlens, *_, ctx.impl = inputs
    ctx.rows = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _sum_backward(ctx, grad):
    return op("segment_expand")(grad, *ctx.saved_tensors, ctx.rows, ctx.impl), None, None


def _expand_backward(ctx, grad):
    return op("segment_sum")(grad, *ctx.saved_tensors, ctx.impl), None, None, None


formula("segment_sum", _sum_backward, _save)
formula("segment_expand", _expand_backward, _save)


def sum_sequences(logp: Tensor, offsets: Tensor, impl: str) -> Tensor:
    """Sums of logp, flattened, between offsets [S+1]; `impl` is resolved."""
    if impl == "reference":
        return reference.segment_sum(logp.reshape(-1), offsets)
    return op("segment_sum")(logp.reshape(-1), offsets, impl)


def sequence_offsets(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """cu_seqlens for labels of this shape: the given one for packed [N], else one row each."""
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(
                "cu_seqlens: expected None with padded labels [B, T]; packed labels have shape "
                f"[N], got {tuple(shape)}"
            )
        return checks.offsets(cu_seqlens, shape[0]).to(device, non_blocking=True)
    if len(shape) != 2:
        raise ValueError(
            "cu_seqlens: needed for packed labels [N]; without it labels must be padded, [B, T], "
            f"got {tuple(shape)}"
        )
    if shape[0] == 0:
        raise ValueError("labels: expected at least one sequence, got an empty batch")
    return torch.arange(shape[0] + 1, device=device) * shape[1]
