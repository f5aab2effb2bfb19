"""Log-probabilities from a chunk of raw GEMM output, which its own gradient may overwrite.

    log p = u_y - log sum exp(u),   u = softcap(scale (z + bias));   dz = (softmax(u) - 1_y) du/dz

Bytes: z read once, and again from L2 with the gradient, which is written once. Flops: an exp
an element in each sweep, two more and a reciprocal with softcap. Numerics: float32 from the same
rounded z in both sweeps; the label's entry is expm1(log p); no atomics, the same bits with the
gradient and without. Tests: tests/logps/test_triton_row.py.
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
    expm1,
    finite_max,
    load_tile,
    logits,
    positions,
    row_start,
    store_tile,
    whole_groups,
    zero_tile,
)

_RUNTIME = ["base", "stride", "label_stride", "n_cols", "ignore_index", "scale", "cap", "inv_cap"]


@triton.jit(do_not_specialize=_RUNTIME)
def row_kernel(
    z,
    labels,
    bias,
    logp,  # [C]
    base,
    stride,
    label_stride,
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
    WRITE_GRAD: tl.constexpr,
):
    """Two sweeps over one row: log-sum-exp, then the gradient in place."""
    GROUPS: tl.constexpr = BLOCK // VEC
    row = tl.program_id(0)
    start, lo = row_start(base, 0, stride, row, row, VEC, EDGES)
    hi = lo + n_cols
    n_groups = tl.cdiv(hi, VEC)
    z += start
    row = row.to(tl.int64)
    y = tl.load(labels + row * label_stride).to(tl.int64)
    if y == ignore_index:
        tl.store(logp + row, 0.0)
        if WRITE_GRAD:
            for group in range(0, n_groups, GROUPS):
                zero_tile(z, group, lo, hi, GROUPS, VEC, EDGES)
    else:
        known = (y >= 0) & (y < n_cols)
        # Read before the reduction below, whose barrier comes before any store to the row.
        z_y = tl.load(z + lo + y, mask=known, other=float("nan"))
        u_y, slope_y = logits(z_y, bias, y, known, scale, cap, inv_cap, BIAS, SCALE, CAP)

        # An accumulator for each group of a tile: no communication between threads in the loop.
        m = tl.full((GROUPS,), float("-inf"), tl.float32)
        l_sum = tl.zeros((GROUPS,), tl.float32)
        ahead = load_tile(z, 0, lo, hi, GROUPS, VEC)
        for group in range(0, n_groups, GROUPS):
            tile = ahead
            ahead = load_tile(z, group + GROUPS, lo, hi, GROUPS, VEC)
            pos = positions(group, GROUPS, VEC) - lo
            mask = whole_groups(group, lo, hi, GROUPS, VEC)
            u, _ = logits(tile, bias, pos, mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
            m_tile = tl.max(u, axis=1)
            if SCALE or CAP:  # neither keeps -inf outside the row
                inside = tl.reshape(mask, (GROUPS,))
                m_tile = tl.where(inside, m_tile, float("-inf"))
            m_new = tl.maximum(m, m_tile)
            shift = finite_max(m_new)
            l_tile = tl.sum(exp(u - shift[:, None]), axis=1)
            if SCALE or CAP:
                l_tile = tl.where(inside, l_tile, 0.0)
            l_sum = l_sum * exp(m - shift) + l_tile
            m = m_new
        m_row = tl.max(m, axis=0)
        if EDGES:
            edge, edge_mask = edge_positions(lo, hi, VEC)
            z_edge = tl.load(z + edge, mask=edge_mask, other=float("-inf"))
            u_edge, slope_edge = logits(
                z_edge, bias, edge - lo, edge_mask, scale, cap, inv_cap, BIAS, SCALE, CAP
            )
            u_edge = tl.where(edge_mask, u_edge, float("-inf"))
            m_row = tl.maximum(m_row, tl.max(tl.max(u_edge, axis=1), axis=0))
        shift = finite_max(m_row)
        total = tl.sum(l_sum * exp(m - shift), axis=0)
        if EDGES:
            total += tl.sum(tl.sum(exp(u_edge - shift), axis=1), axis=0)
        log_l = tl.log(total)
        logp_y = (u_y - m_row) - log_l
        tl.store(logp + row, logp_y)

        if WRITE_GRAD:
            m_row = tl.where(known, m_row, float("nan"))
            dz_y = expm1(logp_y) * slope_y
            at_label = (lo + y).to(tl.int32)
            if EDGES:
                dz_edge = exp((u_edge - m_row) - log_l) * slope_edge
                dz_edge = tl.where(edge == at_label, dz_y, dz_edge)
                tl.store(z + edge, dz_edge.to(z.dtype.element_ty), mask=edge_mask)
            ahead = load_tile(z, 0, lo, hi, GROUPS, VEC)
            for group in range(0, n_groups, GROUPS):
                tile = ahead
                ahead = load_tile(z, group + GROUPS, lo, hi, GROUPS, VEC)
                pos = positions(group, GROUPS, VEC) - lo
                mask = whole_groups(group, lo, hi, GROUPS, VEC)
                u, slope = logits(tile, bias, pos, mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
                dz = exp((u - m_row) - log_l) * slope
                at_tile = at_label - group * VEC
                if (at_tile >= 0) & (at_tile < BLOCK):  # one tile of a row pays for the label
                    dz = tl.where(positions(0, GROUPS, VEC) == at_tile, dz_y, dz)
                store_tile(z, dz, group, lo, hi, GROUPS, VEC)


def row_logps(
    z: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    write_grad: bool,
) -> Tensor:
    """log p of labels under the logits u = softcap(logit_scale * (z + bias)).

    softcap(x) is c * tanh(x / c).

    Args:
        z: [C, V], float32, bfloat16 or float16, unit stride over V; overwritten with `write_grad`
            by (softmax(u) - 1_y) du/dz, which is -d(log p)/dz.
        labels: [C], int32 or int64. Outside [0, V) and not `ignore_index`: NaN, and a row of NaN.
        bias: [V] or None.
        logit_scale, softcap: applied in float32 registers; `softcap=None` for none.
        ignore_index: rows with this label are not read; they give 0 and a gradient of 0.
        write_grad: whether `z` is overwritten. The results have the same bits either way.

    Returns:
        logp [C] float32, in nats.

    Raises:
        ValueError: the last dimension of `z` has a stride other than 1.
    """
    logp = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    if z.shape[0] == 0:
        return logp
    block = config.block("row", z.dtype, z.shape[1], z.device)
    shared = head_arguments(z, labels, bias, logit_scale, softcap, ignore_index, block)
    with on_device(z):
        row_kernel[(z.shape[0],)](logp=logp, WRITE_GRAD=write_grad, **shared)
    return logp
