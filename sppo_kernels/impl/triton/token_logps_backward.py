"""Gradient of the log-probabilities with respect to the logits, in place when asked."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.impl.triton import config
from sppo_kernels.impl.triton._layout import has_edges, on_device, rows_of, slices, vector_of
from sppo_kernels.impl.triton._tile import (
    edge_positions,
    exp,
    expm1,
    load_tile,
    positions,
    row_start,
    store_tile,
)

_RUNTIME = ["base", "stride_b", "stride_t", "out_base", "out_b", "out_t", "grad_b", "grad_t"]
_RUNTIME += ["label_b", "label_t", "lse_b", "lse_t", "size_t", "n_cols", "n_slices", "ignore_index"]


@triton.jit(do_not_specialize=_RUNTIME)
def backward_kernel(
    grad,
    logits,
    labels,
    lse,
    out,
    base,
    stride_b,
    stride_t,
    out_base,
    out_b,
    out_t,
    grad_b,
    grad_t,
    label_b,
    label_t,
    lse_b,
    lse_t,
    size_t,
    n_cols,
    n_slices,
    ignore_index,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad * (softmax(z) - 1_y) over one vocabulary slice of one row."""
    pid = tl.program_id(0)
    row = pid // n_slices
    b = row // size_t
    t = row % size_t
    GROUPS: tl.constexpr = BLOCK // VEC
    first_group = (pid % n_slices) * GROUPS
    start, lo = row_start(base, stride_b, stride_t, b, t, VEC, EDGES)
    hi = lo + n_cols
    b = b.to(tl.int64)
    t = t.to(tl.int64)
    if WIDE:  # rows of `out` start in their vectors where those of `logits` do
        out_row, _ = row_start(out_base, out_b, out_t, b, t, VEC, EDGES)
    else:
        out_row = out_base + b * out_b + t * out_t - lo
    y = tl.load(labels + b * label_b + t * label_t)
    if y == ignore_index:
        zero = tl.zeros((GROUPS, VEC), tl.float32)
        store_tile(out + out_row, zero, first_group, lo, hi, GROUPS, VEC)
        if EDGES:
            pos, mask = edge_positions(lo, hi, VEC)
            mask = mask & (first_group == 0)
            tl.store(out + out_row + pos, tl.zeros((2, VEC), out.dtype.element_ty), mask=mask)
    else:
        z = load_tile(logits + start, first_group, lo, hi, GROUPS, VEC).to(tl.float32)
        g = tl.load(grad + b * grad_b + t * grad_t)
        known = (y >= 0) & (y < n_cols)
        row_lse = tl.where(known, tl.load(lse + b * lse_b + t * lse_t), float("nan"))
        d = z - row_lse
        at_label = (lo + y - first_group * VEC).to(tl.int32)
        here = (at_label >= 0) & (at_label < BLOCK)  # one slice of a row pays for the label
        dz_y = 0.0
        if here:
            is_label = positions(0, GROUPS, VEC) == at_label
            dz_y = expm1(tl.sum(tl.sum(tl.where(is_label, d, 0.0), axis=1), axis=0))
        dz = exp(d)
        if here:
            dz = tl.where(positions(0, GROUPS, VEC) == at_label, dz_y, dz)
        store_tile(out + out_row, g * dz, first_group, lo, hi, GROUPS, VEC)
        if EDGES:
            pos, mask = edge_positions(lo, hi, VEC)
            mask = mask & (first_group == 0)
            d = tl.load(logits + start + pos, mask=mask, other=0.0).to(tl.float32) - row_lse
            dz = g * tl.where(pos == lo + y, expm1(d), exp(d))
            tl.store(out + out_row + pos, dz.to(out.dtype.element_ty), mask=mask)


def token_logps_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    """Write grad * (softmax(z) - 1_y), the gradient of sum(-grad * logp), into `out`.

    Args:
        grad: [B, T] float32, any strides; minus the gradient of the log-probabilities.
        logits: [B, T, V] as given to `token_logps`; rows with `ignore_index` are not read.
        labels: [B, T]; a label outside [0, V) that is not `ignore_index` gives a row of NaN.
        lse: [B, T] float32, from `token_logps`.
        ignore_index: rows with this label become zero.
        out: [B, T, V] with strides of its own (unit over V); may be `logits` itself.

    Raises:
        ValueError: the last dimension of `logits` or `out` has a stride other than 1.
    """
    size_b, size_t, n_cols = logits.shape
    if size_b * size_t == 0:
        return
    rows, out_rows = rows_of(logits), rows_of(out)
    vec = vector_of(logits)
    edges = has_edges(rows, n_cols, vec)
    block = config.backward_block(logits.dtype, n_cols)
    n_slices = slices(n_cols, block.size, vec, edges)
    if size_b * size_t * n_slices >= 2**31:
        raise ValueError(
            f"logits: at most 2^31 programs are launched, got {size_b * size_t * n_slices}"
        )
    with on_device(logits):
        backward_kernel[(size_b * size_t * n_slices,)](
            grad,
            rows.origin,
            labels,
            lse,
            out_rows.origin,
            rows.base,
            rows.stride_b,
            rows.stride_t,
            out_rows.base,
            out_rows.stride_b,
            out_rows.stride_t,
            *grad.stride(),
            *labels.stride(),
            *lse.stride(),
            size_t,
            n_cols,
            n_slices,
            ignore_index,
            BLOCK=block.size,
            VEC=vec,
            EDGES=edges,
            WIDE=rows.phases(vec) == out_rows.phases(vec),
            num_warps=block.num_warps,
        )
