"""Gradient of the log-probabilities with respect to the logits, in place when asked.

    dz = g (exp(z - m) / l - 1_y),   at the label g expm1(log p)

Bytes: the logits read once and the gradient written once; ignored rows are zeroed unread. Flops: an
exponential an element. Numerics: g / l is one factor, divided to nearest. Tests:
tests/logps/test_triton_logps.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import on_device, rows_of, slice_arguments
from sppo_kernels.logps.triton._tile import (
    edge_positions,
    exp,
    expm1,
    load_tile,
    positions,
    row_start,
    store_tile,
    zero_tile,
)

_RUNTIME = ["base", "stride_b", "stride_t", "out_base", "out_b", "out_t", "grad_b", "grad_t"]
_RUNTIME += ["label_b", "label_t", "logp_b", "logp_t", "size_t", "n_rows", "n_cols", "n_slices"]
_RUNTIME += ["ignore_index"]


@triton.jit(do_not_specialize=_RUNTIME)
def backward_kernel(
    grad,
    logits,
    labels,
    logp,
    norm,  # [2, N]
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
    logp_b,
    logp_t,
    size_t,
    n_rows,
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
        zero_tile(out + out_row, first_group, lo, hi, GROUPS, VEC, EDGES)
    else:
        z = load_tile(logits + start, first_group, lo, hi, GROUPS, VEC).to(tl.float32)
        g = tl.load(grad + b * grad_b + t * grad_t)
        m = tl.load(norm + row.to(tl.int64))
        weight = tl.div_rn(g, tl.load(norm + n_rows + row.to(tl.int64)))
        dz_y = g * expm1(tl.load(logp + b * logp_b + t * logp_t))
        dz = weight * exp(z - m)
        at_label = (lo + y - first_group * VEC).to(tl.int32)
        if (at_label >= 0) & (at_label < BLOCK):  # one slice of a row pays for the label
            dz = tl.where(positions(0, GROUPS, VEC) == at_label, dz_y, dz)
        store_tile(out + out_row, dz, first_group, lo, hi, GROUPS, VEC)
        if EDGES:
            pos, mask = edge_positions(lo, hi, VEC)
            mask = mask & (first_group == 0)
            z_edge = tl.load(logits + start + pos, mask=mask, other=float("-inf")).to(tl.float32)
            dz_edge = tl.where(pos == lo + y, dz_y, weight * exp(z_edge - m))
            tl.store(out + out_row + pos, dz_edge.to(out.dtype.element_ty), mask=mask)


def token_logps_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    norm: Tensor,
    ignore_index: int,
    out: Tensor,
) -> None:
    """Write grad * (softmax(z) - 1_y), the gradient of sum(-grad * logp), into `out`.

    softmax(z) is exp(z - m) / l, and at the label softmax(z) - 1 is expm1(logp).

    Args:
        grad: [B, T] float32, any strides; minus the gradient of the log-probabilities.
        logits: [B, T, V] as given to `token_logps`; rows with `ignore_index` are not read.
        labels: [B, T]; a label outside [0, V) that is not `ignore_index` gives a row of NaN.
        logp: [B, T] float32, any strides, from `token_logps`.
        norm: [2, B, T] float32, contiguous, from `token_logps`: (m, l) of every row.
        ignore_index: rows with this label become zero.
        out: [B, T, V] with strides of its own (unit over V); may be `logits` itself.

    Raises:
        ValueError: the last dimension of `logits` or `out` has a stride other than 1.
    """
    size_b, size_t, n_cols = logits.shape
    if size_b * size_t == 0:
        return
    rows, out_rows = rows_of(logits), rows_of(out)
    block = config.block("backward", logits.dtype, n_cols, logits.device)
    where, tile = slice_arguments(logits, labels, ignore_index, block)
    grad_b, grad_t = grad.stride()
    logp_b, logp_t = logp.stride()
    with on_device(logits):
        backward_kernel[(size_b * size_t * where["n_slices"],)](
            grad=grad,
            logp=logp,
            norm=norm,
            out=out_rows.origin,
            out_base=out_rows.base,
            out_b=out_rows.stride_b,
            out_t=out_rows.stride_t,
            grad_b=grad_b,
            grad_t=grad_t,
            logp_b=logp_b,
            logp_t=logp_t,
            n_rows=size_b * size_t,
            WIDE=rows.phases(tile["VEC"]) == out_rows.phases(tile["VEC"]),
            **where,
            **tile,
        )
