"""How long a kernel should take on an H200, by counted bytes and instructions: never measured."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.kernel_report.sass import pipe_cycles


@dataclass(frozen=True)
class Device:
    """What a prediction takes for granted of a GPU."""

    name: str
    sms: int
    clock: float  # Hz, sustained
    bandwidth: tuple[float, float]  # bytes/s, lowest and highest seen of copies
    gemm: float  # flop/s of bfloat16 products
    l2: float  # bytes


H200 = Device("H200", 132, 1.7e9, (4.3e12, 4.8e12), 790e12, 50e6)


@dataclass(frozen=True)
class Shape:
    """A case of the loss path: tokens, hidden size, vocabulary, and whether logits are capped."""

    rows: int
    dim: int
    vocab: int
    softcap: bool = False

    def __str__(self) -> str:
        cap = ", softcap" if self.softcap else ""
        return f"({self.rows}, {self.dim}, {self.vocab}{cap})"


SHAPES = (
    Shape(8192, 4096, 128256),
    Shape(8192, 896, 151936),
    Shape(4096, 3584, 256000, softcap=True),
    Shape(16384, 2048, 128256),
)


@dataclass
class Prediction:
    """One kernel on one shape; times in ms."""

    shape: str
    kernel: str
    bytes: float
    flops: float
    memory: tuple[float, float]
    pipes: dict[str, float]

    @property
    def ms(self) -> tuple[float, float]:
        busy = max(self.pipes.values())
        return max(self.memory[0], busy), max(self.memory[1], busy)

    @property
    def bound(self) -> str:
        """The pipe that takes longest, or memory."""
        slowest = max(self.pipes, key=self.pipes.get)
        return "memory" if self.memory[1] >= self.pipes[slowest] else slowest


def arithmetic(counts: Counter[str]) -> float:
    """Floating operations among instructions: a fused multiply-add is two, a MUFU one."""
    weight = (("FFMA|DFMA", 2), ("FADD|FMUL|FMNMX|MUFU|DADD|DMUL", 1))
    return sum(n * w for op, n in counts.items() for pattern, w in weight if re.match(pattern, op))


def predict(
    shape: str, kernel: str, moved: float, threads: float, counts: Counter[str], device: Device
) -> Prediction:
    """`threads` threads execute `counts` each, and `moved` bytes go through DRAM."""
    scale = threads / device.sms / device.clock * 1e3
    return Prediction(
        shape=shape,
        kernel=kernel,
        bytes=moved,
        flops=arithmetic(counts) * threads,
        memory=tuple(moved / rate * 1e3 for rate in reversed(device.bandwidth)),
        pipes={name: c * scale for name, c in pipe_cycles(counts).items()},
    )


def moved_bytes(passes: float, rows: int, vocab: int, itemsize: int, small: float) -> float:
    """DRAM traffic of a sweep: passes over [rows, vocab], and `small` bytes a row beside it."""
    return rows * (passes * vocab * itemsize + small)


@dataclass
class Whole:
    """A whole operation: its matrix products and what the package adds; times in ms."""

    shape: Shape
    name: str
    products: int
    gemm_ms: float
    added_ms: tuple[float, float]

    @property
    def share(self) -> tuple[float, float]:
        """Products alone over the whole, slowest first."""
        low, high = self.added_ms
        return self.gemm_ms / (self.gemm_ms + high), self.gemm_ms / (self.gemm_ms + low)


def whole(shape: Shape, name: str, products: int, row_kernel: Prediction, device: Device) -> Whole:
    """Products at the device's rate, the row kernel, and the passes over [N, D] beside them."""
    flops = 2.0 * shape.rows * shape.dim * shape.vocab * products
    # dh = coef * dx reads and writes [N, D]; the dW product reads a scaled copy of the hidden rows.
    passes = {1: 0, 2: 2, 3: 4}[products]
    slow, fast = (shape.rows * shape.dim * 2 * passes / rate * 1e3 for rate in device.bandwidth)
    low, high = row_kernel.ms
    return Whole(shape, name, products, flops / device.gemm * 1e3, (low + fast, high + slow))
