"""Where the rows of a tensor lie in memory, and the arguments that kernels over them share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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


def _tile(rows: Rows, n_cols: int, block: config.Block) -> dict[str, Any]:
    """The constants of a tile, and the warps that work on it."""
    vec = config.vector(rows.origin.dtype)
    edges = has_edges(rows, n_cols, vec)
    return {"BLOCK": block.size, "VEC": vec, "EDGES": edges, "num_warps": block.num_warps}


def programs(name: str, n_rows: int, n_cols: int, tile: dict[str, Any]) -> int:
    """Programs a row of a (row x slice) grid, for the BLOCK, VEC and EDGES of a launch.

    Raises:
        ValueError: the grid has more programs than CUDA launches; `name` is whose rows they are.
    """
    found = slices(n_cols, tile["BLOCK"], tile["VEC"], tile["EDGES"])
    if n_rows * found >= 2**31:
        raise ValueError(f"{name}: at most 2^31 programs are launched, got {n_rows * found}")
    return found


def slice_arguments(
    logits: Tensor, labels: Tensor, ignore_index: int, block: config.Block
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kernel on slices of rows of logits [B, T, V] takes, and the constants of a slice.

    Raises:
        ValueError: the grid would have more programs than CUDA launches.
    """
    rows, (size_b, size_t, n_cols) = rows_of(logits), logits.shape
    tile = _tile(rows, n_cols, block)
    label_b, label_t = labels.stride()
    where = {
        "logits": rows.origin,
        "labels": labels,
        "base": rows.base,
        "stride_b": rows.stride_b,
        "stride_t": rows.stride_t,
        "label_b": label_b,
        "label_t": label_t,
        "size_t": size_t,
        "n_cols": n_cols,
        "n_slices": programs("logits", size_b * size_t, n_cols, tile),
        "ignore_index": ignore_index,
    }
    return where, tile


def head_arguments(
    z: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    block: config.Block,
) -> dict[str, Any]:
    """What every kernel takes that sweeps rows of raw products z [C, V] under a head."""
    rows, cap = rows_of(z.unsqueeze(0)), 1.0 if softcap is None else float(softcap)
    return {
        "z": rows.origin,
        "labels": labels,
        "bias": z if bias is None else bias.contiguous(),
        "base": rows.base,
        "stride": rows.stride_t,
        "label_stride": labels.stride(0),
        "n_cols": z.shape[1],
        "ignore_index": ignore_index,
        "scale": float(logit_scale),
        "cap": cap,
        "inv_cap": 1.0 / cap,
        "BIAS": bias is not None,
        "SCALE": logit_scale != 1.0,
        "CAP": softcap is not None,
        **_tile(rows, z.shape[1], block),
    }


def on_device(x: Tensor) -> AbstractContextManager:
    """Launch on the device of `x`, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
