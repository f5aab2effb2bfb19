"""The SPPO loss from logits in one read of them: per-response loss and per-row coefficients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import on_device
from sppo_kernels.logps.triton.segments import sum_rows
from sppo_kernels.logps.triton.token_logps import token_logps


@triton.jit(do_not_specialize=["label_b", "label_t", "size_t", "n", "n_seq", "eta", "ignore_index"])
def sppo_kernel(
    logp,  # [N]
    labels,
    cu_seqlens,  # [S+1]
    ref_logps,  # [S]
    win_rate,  # [S]
    scale,  # [S]
    loss,  # [S]
    logps,  # [S]
    coef,  # [N]
    label_b,
    label_t,
    size_t,
    n,
    n_seq,
    eta,
    ignore_index,
    WIN_UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum, squared residual and coefficients of one response; the last program ends the tail."""
    s = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + s).to(tl.int32), 0), n)
    end = n
    c = 0.0
    if s < n_seq:
        end = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int32), n)
        total = sum_rows(logp, begin, end, BLOCK)
        ratio = total - tl.load(ref_logps + s)
        target = tl.load(win_rate + s) - 0.5
        weight = tl.load(scale + s)
        if WIN_UNITS:
            residual = tl.div_rn(ratio, eta) - target
            c = tl.div_rn(2.0 * weight * residual, eta)
        else:
            residual = ratio - eta * target
            c = 2.0 * weight * residual
        tl.store(logps + s, total)
        tl.store(loss + s, weight * residual * residual)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < end
        offset = (row // size_t).to(tl.int64) * label_b + (row % size_t).to(tl.int64) * label_t
        y = tl.load(labels + offset, mask=inside, other=ignore_index)
        tl.store(coef + row, tl.where(y == ignore_index, 0.0, c), mask=inside)


def sppo_from_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    scale: Tensor,
    eta: float,
    win_units: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SPPO loss of every response (arXiv 2405.00675) and what its gradient needs.

    L_s = scale_s r_s^2 with r_s = S_s - R_s - eta (w_s - 1/2), or, with `win_units`,
    r_s = (S_s - R_s) / eta - (w_s - 1/2); S_s is the sum of log p over the rows of response s.

    Args:
        logits: [B, T, V]; labels: [B, T]; see `token_logps`.
        cu_seqlens: [S+1] int32 or int64, over the B*T rows in order; starts at 0.
        ref_logps, win_rate, scale: [S] float32, contiguous.

    Returns:
        `(loss [S], logps [S], coef [B, T], logp [B, T], norm [2, B, T])`, float32;
        coef = dL_s/d(logp of the row), 0 for ignored rows and for rows after the last response;
        logp and norm as `token_logps` gives them.
    """
    logp, norm = token_logps(logits, labels, ignore_index)
    n_seq = cu_seqlens.numel() - 1
    loss = torch.empty(n_seq, dtype=torch.float32, device=logits.device)
    logps = torch.empty_like(loss)
    coef = torch.empty_like(logp)
    block = config.segment_block()
    with on_device(logits):
        sppo_kernel[(n_seq + 1,)](
            logp,
            labels,
            cu_seqlens.contiguous(),
            ref_logps,
            win_rate,
            scale,
            loss,
            logps,
            coef,
            *labels.stride(),
            labels.shape[1],
            logp.numel(),
            n_seq,
            float(eta),
            ignore_index,
            WIN_UNITS=win_units,
            BLOCK=block.size,
            num_warps=block.num_warps,
        )
    return loss, logps, coef, logp, norm
