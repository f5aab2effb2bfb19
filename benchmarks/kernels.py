"""What the compiler makes of every Triton kernel: `python -m benchmarks.kernels`.

Compiles the production configurations for sm_80, sm_90 and sm_100 ahead of time, without a GPU,
reads registers, spills, shared memory and instructions from the cubins, and derives from counted
bytes and instructions how long a kernel should take on an H200. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

TARGETS = (80, 90, 100)
N_ROWS, N_COLS, N_COLS_ODD = 8192, 128256, 128257
# H200: SMs, sustained clock (Hz), instruction lanes an SM and cycle, copy bandwidth seen (bytes/s).
H200_SMS, H200_CLOCK, H200_LANES, H200_BANDWIDTH = 132, 1.755e9, 128, (4.3e12, 4.8e12)
L2_BYTES = 50e6
SM_REGISTERS, SM_WARPS, SM_CTAS = 65536, 64, 32
MAX_SHARED = 99 * 1024  # what a program may use on every GPU from sm_80 on

_MODULES = ("token_logps", "token_logps_backward", "segments", "sppo", "row_logps")
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
    per_element: float | None = None
    gigabytes: float | None = None
    memory_ms: tuple[float, float] | None = None
    issue_ms: float | None = None
    bound: str | None = None


def cases() -> list[Case]:
    """The configurations that the launchers choose at [8192, 128256]."""
    import torch

    from sppo_kernels.impl.triton import config

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []
    for name, edges in (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False)):
        dtype, vec = dtypes[name], config.vector(dtypes[name])
        vocab = N_COLS_ODD if edges else N_COLS
        block = config.split_block(dtype, vocab)
        tile = {"BLOCK": block.size, "VEC": vec, "EDGES": edges}
        tag = f"{name}, odd V" if edges else name
        found.append(
            Case(f"partial ({tag})", "partial_kernel", name, tile, block.num_warps, 1, vocab)
        )
        block = config.backward_block(dtype, vocab)
        wide = {**tile, "BLOCK": block.size, "WIDE": True}
        found.append(
            Case(f"backward ({tag})", "backward_kernel", name, wide, block.num_warps, 2, vocab)
        )
        block = config.row_block(dtype, vocab)
        plain = {"BLOCK": block.size, "VEC": vec, "EDGES": edges, "WRITE_GRAD": True}
        plain.update(BIAS=False, SCALE=False, CAP=False)
        variants = [(f"rows, gradient ({tag})", plain, 2)]
        if name == "bf16" and not edges:
            every = {"BIAS": True, "SCALE": True, "CAP": True}
            variants += [
                (f"rows, values ({tag})", {**plain, "WRITE_GRAD": False}, 1),
                (f"rows, gradient, bias, scale, cap ({tag})", {**plain, **every}, 2),
            ]
        for label, constexprs, passes in variants:
            found.append(
                Case(label, "row_kernel", name, constexprs, block.num_warps, passes, vocab)
            )
    found += _stats_cases(dtypes)
    split = config.split_block(torch.bfloat16, N_COLS).size
    slices = 1 << (-(-N_COLS // split) - 1).bit_length()
    final = config.finalize_block()
    merge = {"ROWS": max(1, final.size // slices), "SLICES": slices}
    found.append(Case("finalize", "finalize_kernel", "bf16", merge, final.num_warps, 0))
    segment = config.segment_block()
    size = {"BLOCK": segment.size}
    for label, kernel, constexprs in (
        ("segment sum", "segment_sum_kernel", size),
        ("segment expand", "segment_expand_kernel", size),
        ("SPPO, log-ratio units", "sppo_kernel", {**size, "WIN_UNITS": False}),
        ("SPPO, win-rate units", "sppo_kernel", {**size, "WIN_UNITS": True}),
    ):
        found.append(Case(label, kernel, "bf16", constexprs, segment.num_warps, 0))
    return found


def _stats_cases(dtypes: dict) -> list[Case]:
    """Entropy and its gradient, as impl/triton/row_stats*.py launch them."""
    from sppo_kernels.impl.triton import config

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
        block = config.stats_block(dtype, vocab)
        sizes = {"BLOCK": block.size, **tile, **wanted}
        found.append(
            Case(f"statistics, {label}", "stats_kernel", name, sizes, block.num_warps, 1, vocab)
        )
        if not label.startswith("entropy"):
            block, label = config.backward_block(dtype, vocab), label.replace("all", "gradient")
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
    small = "part_max part_sum logp lse norm grad values ref_logps win_rate loss logps coef "
    small += "entropy squares mean grad_logp grad_entropy"
    rows.update(dict.fromkeys(small.split(), "*fp32"))
    rows.update(dict.fromkeys(("cap", "inv_cap", "eta"), "fp32"))
    rows["scale"] = "*fp32" if case.kernel == "sppo_kernel" else "fp32"
    rows.update(labels="*i64", cu_seqlens="*i64", top1="*i8")
    return rows


def _kernel(name: str):
    import importlib

    for module in _MODULES:
        found = getattr(importlib.import_module(f"sppo_kernels.impl.triton.{module}"), name, None)
        if found is not None:
            return found
    raise LookupError(f"no kernel is named {name!r}")


def compile_case(case: Case, target: int) -> bytes:
    """The cubin of a case; pointers are known to be 16-byte aligned, integers are not special."""
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
    return compiled.asm["cubin"]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS, from the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], **run).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", path], **run).stdout
    return usage, sass


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def _sweep_instructions(sass: str) -> int:
    """Instructions of the loops that take exponentials; of everything when there is none."""
    opcodes, labels, loops = [], {}, []
    for line in sass.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        opcodes.append(found[1])
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            body = opcodes[labels[jump[1]] :]
            if "MUFU.EX2" in body:
                loops.append(len(body))
    return sum(loops) or len([op for op in opcodes if op != "NOP"])


def inspect(case: Case, target: int) -> Report:
    """Compile a case and read its cubin."""
    usage, sass = _disassemble(compile_case(case, target))
    ops = Counter(m[1] for m in map(_INSTRUCTION.match, sass.splitlines()) if m)

    def count(pattern: str) -> int:
        return sum(n for op, n in ops.items() if re.match(pattern, op))

    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    per_warp = -(-used["REG"] * 32 // 256) * 256
    ctas = min(SM_REGISTERS // (per_warp * case.num_warps), SM_WARPS // case.num_warps, SM_CTAS)
    report = Report(
        case=case.label,
        kernel=case.kernel,
        sweeps=case.sweeps,
        writes=case.passes == 2,
        target=target,
        block=case.constexprs.get("BLOCK", 0),
        num_warps=case.num_warps,
        registers=used["REG"],
        stack=used["STACK"],
        local_ops=count(r"LDL|STL"),
        shared=used["SHARED"],
        loads_128=count(r"LDG\S*\.128"),
        stores_128=count(r"STG\S*\.128"),
        ex2=count(r"MUFU\.EX2"),
        instructions=sum(ops.values()) - ops["NOP"],
        warps_per_sm=ctas * case.num_warps,
    )
    if case.sweeps:
        elements = N_ROWS * case.vocab
        moved = elements * case.passes * (4 if case.dtype == "fp32" else 2)
        report.per_element = _sweep_instructions(sass) / case.elements_per_thread
        report.gigabytes = moved / 1e9
        report.memory_ms = tuple(moved / rate * 1e3 for rate in reversed(H200_BANDWIDTH))
        issue = elements * report.per_element / (H200_SMS * H200_LANES * H200_CLOCK)
        report.issue_ms = issue * 1e3
        report.bound = "issue" if report.issue_ms > report.memory_ms[1] else "memory"
    return report


def _inspect(job: tuple[Case, int]) -> Report:
    return inspect(*job)


def collect(processes: int = 2) -> list[Report]:
    """Reports of all cases for all targets."""
    jobs = [(case, target) for case in cases() for target in TARGETS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_inspect, jobs))


HEADER = ["kernel", "sm", "block", "warps", "regs", "spill", "smem B"]
HEADER += ["LDG.128", "STG.128", "EX2", "instr", "warps/SM"]
TIMES = ["kernel", "GB moved", "instr/element", "memory ms", "issue ms", "bound by"]


def _static_rows(reports: list[Report]) -> list[list[str]]:
    return [
        [
            *(r.case, str(r.target), str(r.block or "-"), str(r.num_warps), str(r.registers)),
            *(str(r.stack + r.local_ops), str(r.shared), str(r.loads_128), str(r.stores_128)),
            *(str(r.ex2), str(r.instructions), str(r.warps_per_sm)),
        ]
        for r in reports
    ]


def _time_rows(reports: list[Report]) -> list[list[str]]:
    return [
        [
            *(r.case, f"{r.gigabytes:.2f}", f"{r.per_element:.1f}"),
            f"{r.memory_ms[0]:.2f}-{r.memory_ms[1]:.2f}",
            *(f"{r.issue_ms:.2f}", str(r.bound)),
        ]
        for r in reports
        if r.sweeps and r.target == 90
    ]


def _text_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in [header, *rows])
    )
    return "\n".join(lines)


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def markdown(reports: list[Report]) -> str:
    """docs/kernels.md."""
    import triton

    row_bytes = N_COLS * 2
    return f"""# Triton kernels, as compiled

Written by `python -m benchmarks.kernels --markdown docs/kernels.md`, with Triton
{triton.__version__}. **Nothing here was run on a GPU**: the first table is read from cubins
compiled ahead of time, the second is arithmetic on it.

## Compiled for sm_80, sm_90 and sm_100

Each kernel is compiled in the configuration its launcher chooses for N = {N_ROWS}, V = {N_COLS}
("odd V": {N_COLS_ODD}, rows that start anywhere inside a 16-byte vector). `spill` is the stack in
bytes plus local loads and stores; LDG.128 and STG.128 are 16-byte global accesses; EX2 counts
hardware exponentials; all counts are static. `warps/SM` is what registers allow, out of 64.

{_markdown_table(HEADER, _static_rows(reports))}

## Expected on an H200

Bytes are those of the [N, V] array over all passes. `memory ms` is at 4.8 and 4.3 TB/s, the copy
speeds seen on that GPU; `issue ms` is instructions an element (of the loops that sweep, or of the
whole program where there is no loop, which counts branches not taken) at {H200_SMS} SMs x
{H200_LANES} lanes x {H200_CLOCK / 1e9:.3f} GHz. The larger bounds the kernel; where they are
close, expect less than either alone allows.

{_markdown_table(TIMES, _time_rows(reports))}

The row kernel reads z twice. It counts one read because the second should come from L2: it keeps
32 warps an SM, so one row of {row_bytes / 1e3:.0f} KB an SM, {row_bytes * H200_SMS / 1e6:.0f} MB
of the {L2_BYTES / 1e6:.0f} MB of L2. Whether L2 keeps them has to be measured; if it does not, the
gradient takes half as long again.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--markdown", type=Path, help="write docs/kernels.md")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    reports = collect(args.processes)
    print("Compiled ahead of time; nothing was run on a GPU.\n")
    print(_text_table(HEADER, _static_rows(reports)))
    print(f"\nExpected on an H200 at N = {N_ROWS}, V = {N_COLS}:\n")
    print(_text_table(TIMES, _time_rows(reports)))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
