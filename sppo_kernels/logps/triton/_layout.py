"""Where the rows of a tensor lie in memory, and how wide they may be accessed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_kernels.logps.triton import config


class Rows(NamedTuple):
    """Rows of a [B, T, V] tensor as kernels take them.

    Row (b, t) starts `base + b * stride_b + t * stride_t` elements after `origin`, whose address is
    a multiple of 16 bytes wherever the storage allows it.
    """

    origin: Tensor
    base: int
    stride_b: int
    stride_t: int

    def phases(self, vec: int) -> tuple[int, int, int]:
        """The offsets that decide where a row starts inside a vector."""
        return self.base % vec, self.stride_b % vec, self.stride_t % vec


def rows_of(x: Tensor) -> Rows:
    """Rows of `x` [B, T, V], whose last dimension has unit stride."""
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"unit stride over the vocabulary is expected, got strides {x.stride()}")
    size_b, size_t, _ = x.shape
    # The stride of a dimension of one row is never used; 0 keeps it from looking unaligned.
    stride_b = x.stride(0) if size_b > 1 else 0
    stride_t = x.stride(1) if size_t > 1 else 0
    base = (x.data_ptr() % 16) // x.element_size()
    if base == 0 or base > x.storage_offset():
        return Rows(x, 0, stride_b, stride_t)
    origin = x.detach().as_strided((1,), (1,), x.storage_offset() - base)
    return Rows(origin, base, stride_b, stride_t)


def has_edges(rows: Rows, n_cols: int, vec: int) -> bool:
    """Whether some row starts or ends inside a 16-byte vector."""
    return rows.phases(vec) != (0, 0, 0) or n_cols % vec != 0


def slices(n_cols: int, block: int, vec: int, edges: bool) -> int:
    """Programs that cover a row, wherever in its first vector it starts."""
    return -(-(n_cols + (vec - 1 if edges else 0)) // block)


def vector_of(x: Tensor) -> int:
    """Elements of `x` in a 16-byte access."""
    return config.vector(x.dtype)


def on_device(x: Tensor) -> AbstractContextManager:
    """Launch on the device of `x`, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
