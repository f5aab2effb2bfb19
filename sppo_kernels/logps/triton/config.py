"""Block sizes and warps: from a table of tuned blocks (tables.py) where there is one, else fixed.

Nothing is timed here: a table is read once, so the same input takes the same reduction order on
every run of a process and wherever the same table is. The reasons for the fixed blocks are those of
docs/decisions.md; docs/kernels.md lists what the compiler made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from sppo_kernels.logps.triton import tables


class Block(NamedTuple):
    """Elements of a row that a program holds at once (a power of two), and its warps."""

    size: int
    num_warps: int


# Forward: eight 16-byte loads a thread. 24 warps an SM keep 98 KB in flight, and DRAM latency needs
# 29 KB (36 B/ns an SM x 800 ns); against four loads it saves a fifth of the instructions an element
# (10.8 against 13.5 in bf16), which would otherwise bound it as much as memory does.
_FORWARD = {2: Block(8192, 4), 4: Block(4096, 4)}

# Backward: four loads a thread, because eight would take it over 100 registers.
_BACKWARD = {2: Block(8192, 8), 4: Block(4096, 8)}

# The second sweep of a row should hit L2 (50 MB, 132 SMs): the larger the row, the fewer rows may
# be in flight. Columns: largest row in bytes, warps; 64 registers a thread give 32 warps an SM.
_ROW_WARPS = ((32 << 10, 4), (64 << 10, 8), (128 << 10, 16))
_ROW_WARPS_MAX = 32
_ROW_LOADS = 2  # 16-byte loads a thread in a tile, besides as many prefetched

# Statistics are read in one sweep, so nothing speaks for few rows in flight; with all accumulators,
# edges and the whole head 32 warps would leave a thread too few registers.
_STATS_WARPS = 8

_OF_ROWS = {"segment": Block(1024, 4), "finalize": Block(1024, 4)}

_overrides: dict[str, Block] = {}


def vector(dtype: torch.dtype) -> int:
    """Elements in a 16-byte access."""
    return 16 // dtype.itemsize


def fit(block: Block, n_cols: int, vec: int) -> Block:
    """A block no larger than a row of `n_cols`, which may start inside its first vector."""
    need = 1 << (n_cols + vec - 2).bit_length()
    size = max(vec, min(block.size, need))
    return Block(size, max(1, min(block.num_warps, size // (vec * 32))))


def block(
    kernel: str, dtype: torch.dtype, n_cols: int, device: torch.device | None = None
) -> Block:
    """What a program of a kernel that sweeps a vocabulary holds at once.

    Args:
        kernel: "split" and "backward", a vocabulary slice of the forward and backward (row x slice)
            kernels; "row" and "stats", the tile with which a program sweeps one row.
        device: whose table of tuned blocks is asked; None: none.
    """
    override = _overrides.get({"backward": "split", "stats": "row"}.get(kernel, kernel))
    if override is not None:
        return override
    name = tables.device_name(device)
    tuned = None if name is None else tables.lookup(kernel, tables.word(dtype), n_cols, name)
    vec = vector(dtype)
    return fit(Block(*tuned) if tuned else _default(kernel, dtype, n_cols, vec), n_cols, vec)


def _default(kernel: str, dtype: torch.dtype, n_cols: int, vec: int) -> Block:
    if kernel in ("split", "backward"):
        return (_FORWARD if kernel == "split" else _BACKWARD)[dtype.itemsize]
    warps = _STATS_WARPS
    if kernel == "row":
        row_bytes = n_cols * dtype.itemsize
        warps = next((w for limit, w in _ROW_WARPS if row_bytes <= limit), _ROW_WARPS_MAX)
    return Block(warps * 32 * vec * _ROW_LOADS, warps)


def rows_block(kernel: str) -> Block:
    """Rows of its sequence that a program of "segment" takes at once; or partials of "finalize"."""
    return _overrides.get(kernel, _OF_ROWS[kernel])


@contextmanager
def overridden(**blocks: Block) -> Iterator[None]:
    """Other blocks ("split", "row", "segment", "finalize") in the context: tests, tuning."""
    saved = dict(_overrides)
    _overrides.update(blocks)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(saved)
