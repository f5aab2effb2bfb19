"""How many warps an SM can hold of a kernel, and what limits them.

Limits are those of NVIDIA's CUDA C++ programming guide for compute capability 8.0, 9.0 and 10.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.kernel_report.sass import RESERVED_SHARED


@dataclass(frozen=True)
class SM:
    """One streaming multiprocessor."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 << 10


SMS = {80: SM(shared=164 << 10), 90: SM(), 100: SM()}


class Occupancy(NamedTuple):
    """Warps an SM, and the resource that runs out first."""

    warps: int
    limit: str


def bound(target: int, num_warps: int, registers: int, shared: int) -> Occupancy:
    """Occupancy of blocks of `num_warps` warps with these registers a thread and shared bytes."""
    sm = SMS[target]
    a_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time
    held = sm.registers // 4 // a_warp * 4  # each quarter of an SM has its own registers
    blocks = {
        "registers": held // num_warps,
        "shared memory": sm.shared // (shared + RESERVED_SHARED),
        "threads": sm.warps // num_warps,
        "blocks": sm.blocks,
    }
    least = min(blocks.values())
    if least == 0:
        first = min(blocks, key=blocks.get)
        raise ValueError(f"no block of {num_warps} warps fits an SM of sm_{target}: {first}")
    # Where several run out at once, the one that no kernel can do anything about is named.
    order = ("threads", "blocks", "registers", "shared memory")
    return Occupancy(least * num_warps, next(name for name in order if blocks[name] == least))
