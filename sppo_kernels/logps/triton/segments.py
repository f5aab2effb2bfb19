"""Sums over sequences of packed rows, and their transpose; one program a sequence, no atomics.

    S_s = sum of log p over the rows of s;   expand: row i gets the gradient of its sequence

Bytes: 4 a row, read or written once. Numerics: lanes in row order, then a tree, in float32. Tests:
tests/logps/test_triton_segments.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sppo_kernels.logps.triton import config
from sppo_kernels.logps.triton._layout import on_device


@triton.jit(do_not_specialize=["n"])
def segment_sum_kernel(values, cu_seqlens, out, n, BLOCK: tl.constexpr):
    """The order of the additions depends only on the length."""
    s = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + s).to(tl.int32), 0), n)
    end = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int32), n)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        acc += tl.load(values + row, mask=row < end, other=0.0)
    tl.store(out + s, tl.sum(acc, axis=0))


@triton.jit(do_not_specialize=["n", "n_seq"])
def segment_expand_kernel(grad, cu_seqlens, out, n, n_seq, BLOCK: tl.constexpr):
    """Program `n_seq`, one more than there are sequences, zeroes the rows after the last."""
    s = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + s).to(tl.int32), 0), n)
    end = n
    g = 0.0
    if s < n_seq:
        end = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int32), n)
        g = tl.load(grad + s)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(out + row, tl.zeros((BLOCK,), tl.float32) + g, mask=row < end)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of `values` [N] float32 over every sequence -> [S] float32; 0 for an empty sequence.

    Sequence s holds the rows cu_seqlens[s] to cu_seqlens[s+1] - 1; `cu_seqlens` [S+1] is int32 or
    int64, starts at 0 and does not decrease.
    """
    n_seq = cu_seqlens.numel() - 1
    out = torch.empty(n_seq, dtype=torch.float32, device=values.device)
    if n_seq == 0:
        return out
    block = config.rows_block("segment")
    with on_device(values):
        segment_sum_kernel[(n_seq,)](
            values.contiguous(),
            cu_seqlens.contiguous(),
            out,
            values.numel(),
            BLOCK=block.size,
            num_warps=block.num_warps,
        )
    return out


def segment_expand(grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
    """Give `grad` [S] float32 of a sequence to each of its rows -> [n] float32.

    Rows from cu_seqlens[-1] on get 0. The transpose of `segment_sum`.
    """
    n_seq = cu_seqlens.numel() - 1
    out = torch.empty(n, dtype=torch.float32, device=grad.device)
    if n == 0:
        return out
    block = config.rows_block("segment")
    with on_device(grad):
        segment_expand_kernel[(n_seq + 1,)](
            grad.contiguous(),
            cu_seqlens.contiguous(),
            out,
            n,
            n_seq,
            BLOCK=block.size,
            num_warps=block.num_warps,
        )
    return out
