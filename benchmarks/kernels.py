"""What the compilers make of every Triton and CUDA kernel: `python -m benchmarks.kernels`.

Compiles the production configurations for sm_80, sm_90 and sm_100 ahead of time, without a GPU,
reads registers, spills, shared memory and instructions from the cubins, and derives from counted
bytes and instructions how long a kernel should take on an H200. Nothing is run. A new Triton kernel
is one entry in `BLOCKS` and in `cases`; CUDA kernels are found by themselves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.kernel_report import cuda, sass

TARGETS = (80, 90, 100)
N_COLS, N_COLS_ODD = 128256, 128257
MAX_SHARED = 99 * 1024  # what a program may use on every GPU from sm_80 on

# What the report knows of the package: the block of `config` that a kernel takes, and the types of
# the kernels' arguments where they are not 32-bit integers or those of the rows.
BLOCKS = {
    "partial_kernel": "split",
    "backward_kernel": "backward",
    "row_kernel": "row",
    "stats_kernel": "stats",
    "stats_grad_kernel": "backward",
    "finalize_kernel": "finalize",
    "segment_sum_kernel": "segment",
    "segment_expand_kernel": "segment",
}
OF_ROWS = ("finalize", "segment")
ROWS = ("logits", "out", "z", "bias")
TYPES = {
    "*fp32": (
        "part_max", "part_sum", "logp", "norm", "grad", "values", "coef", "entropy", "squares",
        "mean", "grad_logp", "grad_entropy",
    ),
    "fp32": ("cap", "inv_cap", "scale"),
    "*i64": ("labels", "cu_seqlens"),
    "*i8": ("top1",),
}  # fmt: skip
HEAD = dict.fromkeys(("BIAS", "SCALE", "CAP"), False)
STATISTICS = dict.fromkeys(("ENTROPY", "SQUARES", "MEAN", "TOP1"), False)


def block_of(kernel: str, dtype: str, vocab: int):
    """(size, num_warps) that a kernel's launcher takes without a tuned table."""
    from sppo_kernels.logps.triton import config

    name = BLOCKS[kernel]
    if name in OF_ROWS:
        return config.rows_block(name)
    return config.block(name, _dtype(dtype), vocab)


def _dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def kernel_named(name: str):
    """The Triton function, in whichever module of the package it stands.

    Raises:
        LookupError: it stands in none.
    """
    from sppo_kernels.logps import triton

    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        found = getattr(importlib.import_module(module.name), name, None)
        if found is not None:
            return found
    raise LookupError(f"no kernel is named {name!r}")


@dataclass(frozen=True)
class Case:
    """One kernel in one production configuration."""

    label: str
    kernel: str
    dtype: str  # of logits or z: bf16, fp16 or fp32
    constexprs: dict[str, int | bool]
    num_warps: int
    passes: float  # reads and writes of the whole [N, V], 0 for the small kernels

    @property
    def sweeps(self) -> bool:
        """Whether the kernel goes over the vocabulary."""
        return self.passes > 0


@dataclass
class Report:
    """What was found in a cubin."""

    case: str
    kernel: str
    target: int
    num_warps: int
    registers: int
    stack: int
    local_ops: int
    shared: int
    instructions: int
    warps_per_sm: int
    limit: str  # what keeps more warps off an SM
    loads: dict[int, int]  # bits of an access -> instructions
    stores: dict[int, int]
    noted: dict[str, int]
    block: int = 0
    passes: float = 0
    itemsize: int = 2
    elements: int = 0  # of a row, that a thread takes in a round of its loops
    sweep: dict[str, int] = field(default_factory=dict)  # instructions of the loops, a thread
    sweeps: bool = field(init=False)
    writes: bool = field(init=False)
    loads_128: int = field(init=False)
    stores_128: int = field(init=False)
    ex2: int = field(init=False)

    def __post_init__(self) -> None:
        self.sweeps, self.writes = self.passes > 0, self.passes == 2
        self.loads_128, self.stores_128 = self.loads.get(128, 0), self.stores.get(128, 0)
        self.ex2 = self.noted["EX2"]


def report(
    case: str, kernel: str, target: int, code: sass.Code, num_warps: int, shared: int, **more: Any
) -> Report:
    """What a cubin tells of a kernel, and what only its case does."""
    warps, limit = sass.occupancy(target, num_warps, code.registers, shared)
    return Report(
        case, kernel, target, num_warps, code.registers, code.stack, code.count(r"LDL|STL"), shared,
        sum(code.counts().values()), warps, limit, sass.widths(code, "LDG"),
        sass.widths(code, "STG"), {n: code.count(pattern) for n, pattern in sass.NOTED.items()},
        **more,
    )  # fmt: skip


def cases() -> list[Case]:
    """The configurations that the launchers choose at [8192, 128256]."""
    from sppo_kernels.logps.triton import config

    found = []

    def add(label: str, kernel: str, dtype: str, passes: int = 0, odd: bool = False, **more):
        vocab = N_COLS_ODD if odd else N_COLS
        block = block_of(kernel, dtype, vocab)
        tag = f" ({dtype}{', odd V' * odd})" if passes else ""
        vector = {"VEC": config.vector(_dtype(dtype)), "EDGES": odd} if passes else {}
        sizes = {"BLOCK": block.size} if "ROWS" not in more else {}
        found.append(
            Case(label + tag, kernel, dtype, sizes | vector | more, block.num_warps, passes)
        )

    every = dict.fromkeys(HEAD, True)
    for dtype, odd in (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False)):
        add("partial", "partial_kernel", dtype, 1, odd)
        add("backward", "backward_kernel", dtype, 2, odd, WIDE=True)
        variants = [("gradient", {})]
        if dtype == "bf16" and not odd:
            variants += [("values", {}), ("gradient, bias, scale, cap", every)]
            variants += [(f"{what}, cap", {"CAP": True}) for what in ("gradient", "values")]
        for label, head in variants:
            write, head = label.startswith("gradient"), HEAD | head
            add(f"rows, {label}", "row_kernel", dtype, 1 + write, odd, WRITE_GRAD=write, **head)
    every_one = dict.fromkeys(STATISTICS, True)
    some = STATISTICS | {"ENTROPY": True, "TOP1": True}
    add("statistics, entropy, top-1", "stats_kernel", "bf16", 1, **HEAD, **some)
    for dtype, odd, head in (("bf16", False, HEAD), ("bf16", True, every), ("fp32", False, every)):
        more = ", bias, scale, cap" if head is every else ""
        add(f"statistics, all{more}", "stats_kernel", dtype, 1, odd, **head, **every_one)
        add(f"statistics, gradient{more}", "stats_grad_kernel", dtype, 2, odd, **head)
    slices = -(-N_COLS // block_of("partial_kernel", "bf16", N_COLS).size)
    slices = 1 << (slices - 1).bit_length()
    rows = max(1, block_of("finalize_kernel", "bf16", N_COLS).size // slices)
    add("finalize", "finalize_kernel", "bf16", ROWS=rows, SLICES=slices)
    add("segment sum", "segment_sum_kernel", "bf16")
    add("segment expand", "segment_expand_kernel", "bf16")
    return found


def compile_case(case: Case, target: int) -> tuple[bytes, int]:
    """Cubin and shared bytes of a case; pointers are 16-byte aligned, integers not special."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_named(case.kernel)
    types = {name: kind for kind, names in TYPES.items() for name in names}
    types |= dict.fromkeys(ROWS, "*" + case.dtype)
    if case.kernel.startswith("segment"):
        types["out"] = "*fp32"
    signature = {
        name: "constexpr" if name in case.constexprs else types.get(name, "i32")
        for name in kernel.arg_names
    }
    attrs = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, dict(case.constexprs), attrs),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": case.num_warps},
    )
    return compiled.asm["cubin"], compiled.metadata.shared


def inspect(job: tuple[Case, int]) -> Report:
    """Compile a case for a target and read its cubin."""
    case, target = job
    cubin, shared = compile_case(case, target)
    (code,) = sass.read(cubin)
    more: dict[str, Any] = {"block": case.constexprs.get("BLOCK", 0), "passes": case.passes}
    if case.sweeps:
        more["sweep"] = dict(sass.sweep(code))
        more["elements"] = more["block"] // (case.num_warps * 32)
    return report(
        case.label, case.kernel, target, code, case.num_warps, max(shared, code.shared),
        itemsize=4 if case.dtype == "fp32" else 2, **more,
    )  # fmt: skip


def inspect_cuda(processes: int = 2, targets: tuple[int, ...] = TARGETS) -> list[Report]:
    """Compile csrc/cuda and read its cubins; see `cuda.compiled` for errors."""
    reports = []
    for target, code in cuda.compiled(targets, processes):
        kernel, words = cuda.label(code.symbol)
        if not code.threads:
            raise ValueError(f"{kernel}: expected __launch_bounds__, which say the threads")
        sweep = dict(code.counts()) if kernel == "targets_thread_kernel" else {}
        name, warps = f"{kernel} ({words})", code.threads // 32
        reports.append(report(name, kernel, target, code, warps, code.shared, sweep=sweep))
    return reports


def collect(processes: int = 2) -> list[Report]:
    """Reports of all cases for all targets."""
    jobs = [(case, target) for case in cases() for target in TARGETS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(inspect, jobs))


def main(argv: list[str] | None = None) -> int:
    from benchmarks.kernel_report import document

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--markdown", type=Path, help="write docs/kernels.md")
    parser.add_argument("--triton-only", action="store_true", help="leave csrc/cuda out")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    if args.triton_only and args.markdown:
        parser.error("--markdown: docs/kernels.md has the CUDA kernels too")
    reports = collect(args.processes)
    of_cuda = [] if args.triton_only else inspect_cuda(args.processes)
    print("Compiled ahead of time; nothing was run on a GPU.\n")
    print(document.text(reports, of_cuda))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports + of_cuda], indent=1) + "\n")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(document.markdown(reports, of_cuda))
    return 0


if __name__ == "__main__":
    sys.exit(main())
