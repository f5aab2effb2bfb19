"""Log-probabilities of labels under logits: one read of the logits, then a small finalize.

    log p = (z_y - m) - log l,   m = max z,   l = sum exp(z - m)

Bytes: the logits once, 8 a slice and row. Flops: an exponential an element. Numerics: float32
partials merged in a fixed order; m and l stay apart. Tests: tests/logps/test_triton_logps.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import on_device, slice_arguments
from sppo_kernels.logps.triton._tile import edge_positions, exp, finite_max, load_tile, row_start

_RUNTIME = ["base", "stride_b", "stride_t", "label_b", "label_t", "size_t", "n_cols", "n_rows"]
_RUNTIME += ["n_slices", "ignore_index"]


@triton.jit(do_not_specialize=_RUNTIME)
def partial_kernel(
    logits,
    labels,
    part_max,  # [N, n_slices]
    part_sum,  # [N, n_slices]
    base,
    stride_b,
    stride_t,
    label_b,
    label_t,
    size_t,
    n_cols,
    n_slices,
    ignore_index,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Maximum and sum of exponentials of one vocabulary slice of one row."""
    pid = tl.program_id(0)
    row = pid // n_slices  # slices of a row are neighbours, so that DRAM sees whole rows
    b = row // size_t
    t = row % size_t
    y = tl.load(labels + b.to(tl.int64) * label_b + t.to(tl.int64) * label_t)
    if y != ignore_index:
        GROUPS: tl.constexpr = BLOCK // VEC
        start, lo = row_start(base, stride_b, stride_t, b, t, VEC, EDGES)
        first_group = (pid % n_slices) * GROUPS
        hi = lo + n_cols
        z = load_tile(logits + start, first_group, lo, hi, GROUPS, VEC).to(tl.float32)
        m = tl.max(tl.max(z, axis=1), axis=0)
        if EDGES:
            pos, mask = edge_positions(lo, hi, VEC)
            mask = mask & (first_group == 0)  # the first slice takes both edges
            edge = tl.load(logits + start + pos, mask=mask, other=float("-inf")).to(tl.float32)
            m = tl.maximum(m, tl.max(tl.max(edge, axis=1), axis=0))
        shift = finite_max(m)
        l_sum = tl.sum(tl.sum(exp(z - shift), axis=1), axis=0)
        if EDGES:
            l_sum += tl.sum(tl.sum(exp(edge - shift), axis=1), axis=0)
        tl.store(part_max + pid.to(tl.int64), m)
        tl.store(part_sum + pid.to(tl.int64), l_sum)


@triton.jit(do_not_specialize=_RUNTIME)
def finalize_kernel(
    logits,
    labels,
    part_max,
    part_sum,
    logp,  # [N]
    norm,  # [2, N]: maxima, then sums of exponentials
    base,
    stride_b,
    stride_t,
    label_b,
    label_t,
    size_t,
    n_cols,
    n_rows,
    n_slices,
    ignore_index,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Merge the partials of ROWS rows and take log p of their labels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    b = row // size_t
    t = row % size_t
    y = tl.load(labels + b * label_b + t * label_t, mask=inside, other=ignore_index).to(tl.int64)
    active = inside & (y != ignore_index)
    part = row[:, None] * n_slices + tl.arange(0, SLICES)[None, :]
    mask = active[:, None] & (tl.arange(0, SLICES)[None, :] < n_slices)
    m_part = tl.load(part_max + part, mask=mask, other=float("-inf"))
    l_part = tl.load(part_sum + part, mask=mask, other=0.0)
    m = tl.max(m_part, axis=1)
    l_sum = tl.sum(l_part * exp(m_part - finite_max(m)[:, None]), axis=1)
    known = active & (y >= 0) & (y < n_cols)
    offset = base + b * stride_b + t * stride_t + y
    z_y = tl.load(logits + offset, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logp + row, tl.where(active, (z_y - m) - tl.log(l_sum), 0.0), mask=inside)
    nothing = tl.where(active, float("nan"), 0.0)  # NaN makes the row of an unknown label NaN
    tl.store(norm + row, tl.where(known, m, nothing), mask=inside)
    tl.store(norm + n_rows + row, tl.where(known, l_sum, nothing), mask=inside)


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """log p of every label, and what normalises every row.

    Args:
        logits: [B, T, V], float32, bfloat16 or float16; any strides over B and T, unit over V.
        labels: [B, T], int32 or int64. A label outside [0, V) that is not `ignore_index` gives NaN.
        ignore_index: rows with this label are not read, and give 0.

    Returns:
        `(logp [B, T], norm [2, B, T])`, float32. norm[0] is m = max z and norm[1] is
        l = sum exp(z - m) of the row; logp = (z_y - m) - log l, in nats. The two are kept apart
        because m + log l in one float32 would cost p = exp(z - m) / l its last digits.

    Raises:
        ValueError: the last dimension of `logits` has a stride other than 1.
    """
    size_b, size_t, n_cols = logits.shape
    n_rows = size_b * size_t
    logp = torch.empty((size_b, size_t), dtype=torch.float32, device=logits.device)
    norm = torch.empty((2, size_b, size_t), dtype=torch.float32, device=logits.device)
    if n_rows == 0:
        return logp, norm
    block = config.block("split", logits.dtype, n_cols, logits.device)
    where, tile = slice_arguments(logits, labels, ignore_index, block)
    n_slices = where["n_slices"]
    parts = torch.empty((2, n_rows, n_slices), dtype=torch.float32, device=logits.device)
    where |= {"part_max": parts[0], "part_sum": parts[1]}
    slices_pow2 = triton.next_power_of_2(n_slices)
    final = config.rows_block("finalize")
    final_rows = max(1, final.size // slices_pow2)
    with on_device(logits):
        partial_kernel[(n_rows * n_slices,)](**where, **tile)
        finalize_kernel[(triton.cdiv(n_rows, final_rows),)](
            logp=logp,
            norm=norm,
            n_rows=n_rows,
            ROWS=final_rows,
            SLICES=slices_pow2,
            num_warps=final.num_warps,
            **where,
        )
    return logp, norm
