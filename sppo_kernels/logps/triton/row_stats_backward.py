"""Gradient of log-probabilities and entropies with respect to raw logits, in place.

    dz = -[g_logp (softmax(u) - 1_y) + g_H p (log p + H)] du/dz

Bytes: z read and written once. Flops: an exponential an element. Numerics: m, l and the mean depth
of `row_stats` in float32; the label's entry by expm1. Tests: tests/logps/test_triton_stats.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import head_arguments, on_device, programs
from sppo_kernels.logps.triton._tile import (
    edge_positions,
    exp,
    expm1,
    load_tile,
    logits,
    positions,
    row_start,
    store_tile,
    whole_groups,
    zero_tile,
)

_RUNTIME = ["base", "stride", "label_stride", "norm_stride", "n_cols", "n_slices"]
_RUNTIME += ["ignore_index", "scale", "cap", "inv_cap"]


@triton.jit
def _descent(u, slope, m, inv_l, depth, g_logp, g_entropy):
    """-p (g_logp + g_entropy (log p + H)) du/dz, where log p + H = (u - m) + depth."""
    d = u - m
    weight = g_logp + g_entropy * (tl.maximum(d, -1000.0) + depth)  # -inf: p is 0, so is the term
    return -exp(d) * inv_l * weight * slope


@triton.jit(do_not_specialize=_RUNTIME)
def stats_grad_kernel(
    z,
    labels,
    bias,
    norm,  # [3, C], with a row stride
    grad_logp,  # [C]
    grad_entropy,  # [C]
    base,
    stride,
    label_stride,
    norm_stride,
    n_cols,
    n_slices,
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
):
    """The gradient over one vocabulary slice of one row, in place of its logits."""
    GROUPS: tl.constexpr = BLOCK // VEC
    pid = tl.program_id(0)
    row = pid // n_slices
    first_group = (pid % n_slices) * GROUPS
    start, lo = row_start(base, 0, stride, row, row, VEC, EDGES)
    hi = lo + n_cols
    z += start
    row = row.to(tl.int64)
    y = tl.load(labels + row * label_stride).to(tl.int64)
    if y == ignore_index:
        zero_tile(z, first_group, lo, hi, GROUPS, VEC, EDGES)
    else:
        known = (y >= 0) & (y < n_cols)
        m = tl.where(known, tl.load(norm + row), float("nan"))
        l_sum = tl.load(norm + norm_stride.to(tl.int64) + row)
        depth = tl.load(norm + 2 * norm_stride.to(tl.int64) + row)
        g_logp = tl.load(grad_logp + row)
        g_entropy = tl.load(grad_entropy + row)
        inv_l = tl.div_rn(1.0, l_sum)

        pos = positions(first_group, GROUPS, VEC)
        mask = whole_groups(first_group, lo, hi, GROUPS, VEC)
        tile = load_tile(z, first_group, lo, hi, GROUPS, VEC)
        u, slope = logits(tile, bias, pos - lo, mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
        dz = _descent(u, slope, m, inv_l, depth, g_logp, g_entropy)
        # Programs of other slices may read z_y after its owner wrote it, and do not use it; the
        # thread that stores the label's gradient has read z_y before.
        z_y = tl.load(z + lo + y, mask=known, other=0.0)
        u_y, slope_y = logits(z_y, bias, y, known, scale, cap, inv_cap, BIAS, SCALE, CAP)
        dz_y = -g_logp * expm1((u_y - m) - tl.log(l_sum)) * slope_y
        dz_y += _descent(u_y, slope_y, m, inv_l, depth, 0.0, g_entropy)
        at_label = (lo + y).to(tl.int32)
        dz = tl.where(pos == at_label, dz_y, dz)
        store_tile(z, dz, first_group, lo, hi, GROUPS, VEC)
        if EDGES:
            pos, mask = edge_positions(lo, hi, VEC)
            mask = mask & (first_group == 0)
            z_edge = tl.load(z + pos, mask=mask, other=float("-inf"))
            u, slope = logits(z_edge, bias, pos - lo, mask, scale, cap, inv_cap, BIAS, SCALE, CAP)
            dz = _descent(u, slope, m, inv_l, depth, g_logp, g_entropy)
            dz = tl.where(pos == at_label, dz_y, dz)
            tl.store(z + pos, dz.to(z.dtype.element_ty), mask=mask)


def row_stats_backward(
    z: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    norm: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> None:
    """Overwrite z with the gradient of sum(grad_logp * log p + grad_entropy * H) in z.

    Args:
        z: [C, V], the logits that `row_stats` and `row_logps` read.
        labels, bias, logit_scale, softcap, ignore_index: as given to `row_stats`. Ignored rows
            become 0; rows of a label outside [0, V) become NaN.
        norm: [3, C] float32, unit stride over C, from `row_stats`.
        grad_logp, grad_entropy: [C] float32, contiguous.

    Raises:
        ValueError: the last dimension of `z` has a stride other than 1.
    """
    n_rows, n_cols = z.shape
    if n_rows == 0:
        return
    block = config.block("backward", z.dtype, n_cols)
    shared = head_arguments(z, labels, bias, logit_scale, softcap, ignore_index, block)
    n_slices = programs("z", n_rows, n_cols, shared)
    with on_device(z):
        stats_grad_kernel[(n_rows * n_slices,)](
            norm=norm,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            norm_stride=norm.stride(0),
            n_slices=n_slices,
            **shared,
        )
