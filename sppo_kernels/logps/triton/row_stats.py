"""Entropy and other statistics of a chunk of raw GEMM output, in one sweep over each row.

    H = log l + E_p[m - u],   log sum p^2 = log sum e^2 - 2 log l,   e = exp(u - m),   l = sum e

Bytes: z read once. Flops: an exponential an element. Numerics: an online maximum a 16-byte group;
the depth m - u is summed, not u, so that H keeps its digits where it is small. Tests:
tests/logps/test_triton_stats.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import head_arguments, on_device
from sppo_kernels.logps.triton._tile import (
    edge_positions,
    exp,
    finite_max,
    load_tile,
    logits,
    positions,
    row_start,
    whole_groups,
)

_RUNTIME = ["base", "stride", "label_stride", "n_rows", "n_cols", "ignore_index"]
_RUNTIME += ["scale", "cap", "inv_cap"]


@triton.jit
def depth_terms(u, e, shift):
    """e (shift - u) with e = exp(u - shift): 0, not NaN, where u is -inf."""
    return -e * tl.maximum(u - shift, -1000.0)


@triton.jit(do_not_specialize=_RUNTIME)
def stats_kernel(
    z,
    labels,
    bias,
    norm,  # [3, C]
    entropy,  # [C], as the following
    squares,
    mean,
    top1,
    base,
    stride,
    label_stride,
    n_rows,
    n_cols,
    ignore_index,
    scale,
    cap,
    inv_cap,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
):
    """Maximum m, and sums of e = exp(u - m), e (m - u), e^2 and u, with an online maximum."""
    GROUPS: tl.constexpr = BLOCK // VEC
    SUMS: tl.constexpr = ENTROPY or SQUARES
    row = tl.program_id(0)
    start, lo = row_start(base, 0, stride, row, row, VEC, EDGES)
    hi = lo + n_cols
    n_groups = tl.cdiv(hi, VEC)
    z += start
    row = row.to(tl.int64)
    y = tl.load(labels + row * label_stride).to(tl.int64)
    if y == ignore_index:
        if ENTROPY:
            for i in tl.static_range(3):
                tl.store(norm + i * n_rows.to(tl.int64) + row, 0.0)
            tl.store(entropy + row, 0.0)
        if SQUARES:
            tl.store(squares + row, 0.0)
        if MEAN:
            tl.store(mean + row, 0.0)
        if TOP1:
            tl.store(top1 + row, 0)
    else:
        known = (y >= 0) & (y < n_cols)
        label = tl.where(known, y, 0).to(tl.int32)

        # An accumulator for each group of a tile: no communication between threads in the loop.
        m = tl.full((GROUPS,), float("-inf"), tl.float32)
        l_sum = tl.zeros((GROUPS,), tl.float32)
        depth = tl.zeros((GROUPS,), tl.float32)
        sq_sum = tl.zeros((GROUPS,), tl.float32)
        u_sum = tl.zeros((GROUPS,), tl.float32)
        before = tl.full((GROUPS,), float("-inf"), tl.float32)  # maximum left of the label
        until = tl.full((GROUPS,), float("-inf"), tl.float32)  # the same with the label
        ahead = load_tile(z, 0, lo, hi, GROUPS, VEC)
        for group in range(0, n_groups, GROUPS):
            tile = ahead
            ahead = load_tile(z, group + GROUPS, lo, hi, GROUPS, VEC)
            column = positions(group, GROUPS, VEC) - lo
            mask = whole_groups(group, lo, hi, GROUPS, VEC)
            u, _ = logits(tile, bias, column, mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
            if MEAN:
                u_sum += tl.sum(tl.where(mask, u, 0.0), axis=1)
            if SCALE or CAP:  # neither keeps -inf outside the row
                u = tl.where(mask, u, float("-inf"))
            m_tile = tl.max(u, axis=1)
            if TOP1:  # one tile of a row compares elements with the label's column
                at_tile = lo + label - group * VEC
                if at_tile >= BLOCK:
                    before = tl.maximum(before, m_tile)
                    until = tl.maximum(until, m_tile)
                elif at_tile >= 0:
                    place = positions(0, GROUPS, VEC)
                    left = tl.where(place < at_tile, u, float("-inf"))
                    before = tl.maximum(before, tl.max(left, axis=1))
                    left = tl.where(place <= at_tile, u, float("-inf"))
                    until = tl.maximum(until, tl.max(left, axis=1))
            m_new = tl.maximum(m, m_tile)
            if SUMS:
                shift = finite_max(m_new)
                scaled = exp(m - shift)
                e = exp(u - shift[:, None])
                if ENTROPY:
                    added = tl.sum(depth_terms(u, e, shift[:, None]), axis=1)
                    depth = scaled * (depth + (shift - finite_max(m)) * l_sum) + added
                if SQUARES:
                    sq_sum = sq_sum * scaled * scaled + tl.sum(e * e, axis=1)
                l_sum = l_sum * scaled + tl.sum(e, axis=1)
            m = m_new
        m_row = tl.max(m, axis=0)
        if MEAN:
            u_row = tl.sum(u_sum, axis=0)
        if TOP1:
            before_row = tl.max(before, axis=0)
            until_row = tl.max(until, axis=0)
        if EDGES:
            edge, edge_mask = edge_positions(lo, hi, VEC)
            z_edge = tl.load(z + edge, mask=edge_mask, other=float("-inf"))
            edge -= lo
            u, _ = logits(z_edge, bias, edge, edge_mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
            if MEAN:
                u_row += tl.sum(tl.sum(tl.where(edge_mask, u, 0.0), axis=1), axis=0)
            u = tl.where(edge_mask, u, float("-inf"))
            m_row = tl.maximum(m_row, tl.max(tl.max(u, axis=1), axis=0))
            if TOP1:
                left = tl.where(edge < label, u, float("-inf"))
                before_row = tl.maximum(before_row, tl.max(tl.max(left, axis=1), axis=0))
                left = tl.where(edge <= label, u, float("-inf"))
                until_row = tl.maximum(until_row, tl.max(tl.max(left, axis=1), axis=0))

        nan = tl.where(known, 0.0, float("nan"))
        if SUMS:
            shift = finite_max(m_row)
            scaled = exp(m - shift)
            total = tl.sum(l_sum * scaled, axis=0)
            if ENTROPY:
                moved = scaled * (depth + (shift - finite_max(m)) * l_sum)
                depth_row = tl.sum(moved, axis=0)
            if SQUARES:
                sq_row = tl.sum(sq_sum * scaled * scaled, axis=0)
            if EDGES:
                e = exp(u - shift)
                total += tl.sum(tl.sum(e, axis=1), axis=0)
                if ENTROPY:
                    depth_row += tl.sum(tl.sum(depth_terms(u, e, shift), axis=1), axis=0)
                if SQUARES:
                    sq_row += tl.sum(tl.sum(e * e, axis=1), axis=0)
            log_l = tl.log(total)
            if ENTROPY:
                mean_depth = tl.div_rn(depth_row, total)
                tl.store(norm + row, m_row)
                tl.store(norm + n_rows.to(tl.int64) + row, total)
                tl.store(norm + 2 * n_rows.to(tl.int64) + row, mean_depth)
                tl.store(entropy + row, log_l + mean_depth + nan)
            if SQUARES:
                tl.store(squares + row, tl.log(sq_row) - 2 * log_l + nan)
        if MEAN:
            tl.store(mean + row, tl.div_rn(u_row, n_cols.to(tl.float32)) + nan)
        if TOP1:
            # A maximum left of the label, or equal to it, hides the label's own logit in `until`.
            first = (until_row == m_row) & (until_row > before_row) & known
            tl.store(top1 + row, first.to(tl.int8))


def row_stats(
    z: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    squares: bool,
    mean: bool,
    top1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of p = softmax(u), u = softcap(logit_scale * (z + bias)), of each row.

    Args:
        z: [C, V], float32, bfloat16 or float16, unit stride over V.
        labels: [C], int32 or int64. Outside [0, V) and not `ignore_index`: NaN, and not top-1.
        bias: [V] or None.
        logit_scale, softcap: as in `row_logps`.
        ignore_index: rows with this label are not read; they give 0.
        entropy, squares, mean, top1: what is computed.

    Returns:
        `(norm, entropy, squares, mean, top1)`, [C] float32 (top1: bool) where asked for and
        [0] elsewhere: -sum p log p, log sum p^2, the mean of u and whether the label is the first
        maximum. `norm` [3, C] (with entropy) holds m = max u, sum exp(u - m), and the mean of
        m - u under p.

    Raises:
        ValueError: the last dimension of `z` has a stride other than 1.
    """
    n_rows, n_cols = z.shape
    on = {"dtype": torch.float32, "device": z.device}
    norm = torch.empty((3, n_rows if entropy else 0), **on)
    results = [torch.empty(n_rows if asked else 0, **on) for asked in (entropy, squares, mean)]
    is_top1 = torch.empty(n_rows if top1 else 0, dtype=torch.bool, device=z.device)
    if n_rows == 0:
        return norm, *results, is_top1
    block = config.block("stats", z.dtype, n_cols)
    shared = head_arguments(z, labels, bias, logit_scale, softcap, ignore_index, block)
    outputs = dict(zip(("entropy", "squares", "mean"), results, strict=True))
    wanted = {"ENTROPY": entropy, "SQUARES": squares, "MEAN": mean, "TOP1": top1}
    with on_device(z):
        stats_kernel[(n_rows,)](
            norm=norm, top1=is_top1.view(torch.int8), n_rows=n_rows, **outputs, **wanted, **shared
        )
    return norm, *results, is_top1
