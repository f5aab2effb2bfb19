"""What the compilers make of every Triton and CUDA kernel: `python -m benchmarks.kernels`.

Compiles the production configurations for sm_80, sm_90 and sm_100 ahead of time, without a GPU,
reads registers, spills, shared memory and instructions from the cubins, and derives from counted
bytes and instructions how long a kernel should take on an H200. Nothing is run. A new Triton kernel
is one entry in `cases` (and its module in `_MODULES`); CUDA kernels are found by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

from benchmarks.kernel_report import cuda, occupancy, sass

TARGETS = (80, 90, 100)
N_COLS, N_COLS_ODD = 128256, 128257
MAX_SHARED = 99 * 1024  # what a program may use on every GPU from sm_80 on

_MODULES = ("token_logps", "token_logps_backward", "segments", "row_logps")
_MODULES += ("row_stats", "row_stats_backward")


@dataclass(frozen=True)
class Case:
    """One kernel in one production configuration."""

    label: str
    kernel: str
    dtype: str  # of logits or z: bf16, fp16 or fp32
    constexprs: dict[str, int | bool]
    num_warps: int
    passes: float  # reads and writes of the whole [N, V], 0 for the small kernels
    vocab: int = N_COLS

    @property
    def sweeps(self) -> bool:
        """Whether the kernel goes over the vocabulary."""
        return self.passes > 0

    @property
    def elements_per_thread(self) -> int:
        return self.constexprs["BLOCK"] // (self.num_warps * 32)


@dataclass
class Report:
    """What was found in a cubin."""

    case: str
    kernel: str
    sweeps: bool
    writes: bool
    target: int
    block: int
    num_warps: int
    registers: int
    stack: int
    local_ops: int
    shared: int
    loads_128: int
    stores_128: int
    ex2: int
    instructions: int
    warps_per_sm: int
    limit: str = ""  # what keeps more warps off an SM
    loads: dict[int, int] = field(default_factory=dict)  # bits of an access -> instructions
    stores: dict[int, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    sweep: dict[str, int] = field(default_factory=dict)  # instructions of the loops, a thread
    elements: int = 0  # of a row, that a thread takes with them
    passes: float = 0
    itemsize: int = 2


def cases() -> list[Case]:
    """The configurations that the launchers choose at [8192, 128256]."""
    import torch

    from sppo_kernels.logps.triton import config

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []
    for name, edges in (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False)):
        dtype, vec = dtypes[name], config.vector(dtypes[name])
        vocab = N_COLS_ODD if edges else N_COLS
        block = config.block("split", dtype, vocab)
        tile = {"BLOCK": block.size, "VEC": vec, "EDGES": edges}
        tag = f"{name}, odd V" if edges else name
        found.append(
            Case(f"partial ({tag})", "partial_kernel", name, tile, block.num_warps, 1, vocab)
        )
        block = config.block("backward", dtype, vocab)
        wide = {**tile, "BLOCK": block.size, "WIDE": True}
        found.append(
            Case(f"backward ({tag})", "backward_kernel", name, wide, block.num_warps, 2, vocab)
        )
        block = config.block("row", dtype, vocab)
        plain = {"BLOCK": block.size, "VEC": vec, "EDGES": edges, "WRITE_GRAD": True}
        plain.update(BIAS=False, SCALE=False, CAP=False)
        variants = [(f"rows, gradient ({tag})", plain, 2)]
        if name == "bf16" and not edges:
            every = {"BIAS": True, "SCALE": True, "CAP": True}
            variants += [
                (f"rows, values ({tag})", {**plain, "WRITE_GRAD": False}, 1),
                (f"rows, gradient, bias, scale, cap ({tag})", {**plain, **every}, 2),
                (f"rows, gradient, cap ({tag})", {**plain, "CAP": True}, 2),
                (f"rows, values, cap ({tag})", {**plain, "CAP": True, "WRITE_GRAD": False}, 1),
            ]
        for label, constexprs, passes in variants:
            found.append(
                Case(label, "row_kernel", name, constexprs, block.num_warps, passes, vocab)
            )
    found += _stats_cases(dtypes)
    split = config.block("split", torch.bfloat16, N_COLS).size
    slices = 1 << (-(-N_COLS // split) - 1).bit_length()
    final = config.rows_block("finalize")
    merge = {"ROWS": max(1, final.size // slices), "SLICES": slices}
    found.append(Case("finalize", "finalize_kernel", "bf16", merge, final.num_warps, 0))
    segment = config.rows_block("segment")
    size = {"BLOCK": segment.size}
    for label in ("segment sum", "segment expand"):
        kernel = label.replace(" ", "_") + "_kernel"
        found.append(Case(label, kernel, "bf16", size, segment.num_warps, 0))
    return found


def _stats_cases(dtypes: dict) -> list[Case]:
    """Entropy and its gradient, as logps/triton/row_stats*.py launch them."""
    from sppo_kernels.logps.triton import config

    head = dict.fromkeys(("BIAS", "SCALE", "CAP"), False)
    every, entropy = dict.fromkeys(head, True), {"ENTROPY": True, "TOP1": True}
    none = dict.fromkeys(("ENTROPY", "SQUARES", "MEAN", "TOP1"), False)
    found = []
    for label, name, vocab, transform, wanted in (
        ("entropy, top-1 (bf16)", "bf16", N_COLS, head, {**none, **entropy}),
        ("all (bf16)", "bf16", N_COLS, head, dict.fromkeys(none, True)),
        ("all, bias, scale, cap (bf16, odd V)", "bf16", N_COLS_ODD, every, dict.fromkeys(none, 1)),
        ("all, bias, scale, cap (fp32)", "fp32", N_COLS, every, dict.fromkeys(none, True)),
    ):
        dtype = dtypes[name]
        tile = {"VEC": config.vector(dtype), "EDGES": vocab == N_COLS_ODD, **transform}
        block = config.block("stats", dtype, vocab)
        sizes = {"BLOCK": block.size, **tile, **wanted}
        found.append(
            Case(f"statistics, {label}", "stats_kernel", name, sizes, block.num_warps, 1, vocab)
        )
        if not label.startswith("entropy"):
            block, label = config.block("backward", dtype, vocab), label.replace("all", "gradient")
            sizes = {"BLOCK": block.size, **tile}
            found.append(
                Case(
                    f"statistics, {label}", "stats_grad_kernel", name, sizes, block.num_warps, 2,
                    vocab,
                )
            )  # fmt: skip
    return found


def _types(case: Case) -> dict[str, str]:
    """Types of the arguments, where not 32-bit integers."""
    rows = dict.fromkeys(("logits", "out", "z", "bias"), "*" + case.dtype)
    if case.kernel.startswith("segment"):
        rows["out"] = "*fp32"
    small = "part_max part_sum logp norm grad values entropy squares mean grad_logp grad_entropy"
    rows.update(dict.fromkeys(small.split(), "*fp32"))
    rows.update(dict.fromkeys(("scale", "cap", "inv_cap"), "fp32"))
    rows.update(labels="*i64", cu_seqlens="*i64", top1="*i8")
    return rows


def _kernel(name: str):
    import importlib

    for module in _MODULES:
        found = getattr(importlib.import_module(f"sppo_kernels.logps.triton.{module}"), name, None)
        if found is not None:
            return found
    raise LookupError(f"no kernel is named {name!r}")


def compile_case(case: Case, target: int) -> tuple[bytes, int]:
    """Cubin and shared bytes of a case; pointers are 16-byte aligned, integers not special."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types = _kernel(case.kernel), _types(case)
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


def describe(code: sass.Code, target: int, num_warps: int, shared: int) -> dict:
    """The fields of a Report that a cubin alone tells."""
    held = occupancy.bound(target, num_warps, code.registers, shared)
    return {
        "target": target,
        "num_warps": num_warps,
        "registers": code.registers,
        "stack": code.stack,
        "local_ops": code.count(r"LDL|STL"),
        "shared": shared,
        "loads_128": code.count(r"LDG\S*\.128"),
        "stores_128": code.count(r"STG\S*\.128"),
        "ex2": code.count(r"MUFU\.EX2"),
        "instructions": sum(code.counts().values()),
        "warps_per_sm": held.warps,
        "limit": held.limit,
        "loads": sass.widths(code, "LDG"),
        "stores": sass.widths(code, "STG"),
        "noted": {name: code.count(pattern) for name, pattern in sass.NOTED.items()},
    }


def inspect(case: Case, target: int) -> Report:
    """Compile a case and read its cubin."""
    cubin, shared = compile_case(case, target)
    (code,) = sass.read(cubin)
    return Report(
        case=case.label,
        kernel=case.kernel,
        sweeps=case.sweeps,
        writes=case.passes == 2,
        block=case.constexprs.get("BLOCK", 0),
        sweep=dict(sass.sweep(code)) if case.sweeps else {},
        elements=case.elements_per_thread if case.sweeps else 0,
        passes=case.passes,
        itemsize=4 if case.dtype == "fp32" else 2,
        **describe(code, target, case.num_warps, max(shared, code.shared)),
    )


def inspect_cuda(processes: int = 2, targets: tuple[int, ...] = TARGETS) -> list[Report]:
    """Compile csrc/cuda and read its cubins; see `cuda.compiled` for errors."""
    reports = []
    for target, code in cuda.compiled(targets, processes):
        kernel, words = cuda.label(code.symbol)
        if not code.threads:
            raise ValueError(f"{kernel}: expected __launch_bounds__, which say the threads")
        told = describe(code, target, code.threads // 32, code.shared)
        sweep = dict(code.counts()) if kernel == "targets_thread_kernel" else {}
        reports.append(
            Report(f"{kernel} ({words})", kernel, False, False, block=0, sweep=sweep, **told)
        )
    return reports


def _inspect(job: tuple[Case, int]) -> Report:
    return inspect(*job)


def collect(processes: int = 2) -> list[Report]:
    """Reports of all cases for all targets."""
    jobs = [(case, target) for case in cases() for target in TARGETS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_inspect, jobs))


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
