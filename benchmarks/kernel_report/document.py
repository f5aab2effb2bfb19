"""docs/kernels.md and the tables that the command prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.kernel_report import cuda, predict
from benchmarks.kernel_report.predict import H200, SHAPES, Prediction, Shape, Whole
from benchmarks.kernel_report.sass import NOTED
from benchmarks.kernels import Report, block_of
from benchmarks.render import columns, table

Columns = Mapping[str, Callable[[Any], Any]]


def _widths(found: dict[int, int]) -> str:
    """Such as 4x128 2x32: instructions by bits of a thread's access, the widest first."""
    return " ".join(f"{n}x{bits}" for bits, n in found.items()) or "-"


def _noted(name: str) -> Callable[[Report], int]:
    return lambda r: r.noted[name]


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"


def _pipe(name: str, scale: float = 1.0, digits: int = 2) -> Callable[[Prediction], str]:
    return lambda p: f"{p.pipes[name] * scale:.{digits}f}"


# Columns of the tables, and what stands in them of a report, prediction or operation.
_OF_BOTH: Columns = {
    "smem B": lambda r: r.shared,
    "warps/SM": lambda r: r.warps_per_sm,
    "limit": lambda r: r.limit,
    "LDG": lambda r: _widths(r.loads),
    "STG": lambda r: _widths(r.stores),
}
STATIC: Columns = {
    "kernel": lambda r: r.case,
    "sm": lambda r: r.target,
    "block": lambda r: r.block or "-",
    "warps": lambda r: r.num_warps,
    "regs": lambda r: r.registers,
    "spill": lambda r: r.stack + r.local_ops,
    **_OF_BOTH,
    **{name: _noted(name) for name in list(NOTED)[2:]},
    "instr": lambda r: r.instructions,
}
OF_CUDA: Columns = {
    "kernel": lambda r: r.case,
    "threads": lambda r: 32 * r.num_warps,
    "regs": lambda r: r.registers,
    "stack B": lambda r: r.stack,
    "LDL+STL": lambda r: r.local_ops,
    **_OF_BOTH,
    **{name: _noted(name) for name in ("FFMA", "DFMA", "SHFL", "BAR")},
    "instr": lambda r: r.instructions,
}
TIMES: Columns = {
    "shape": lambda p: p.shape,
    "kernel": lambda p: p.kernel,
    "GB": lambda p: f"{p.bytes / 1e9:.2f}",
    "Gflop": lambda p: f"{p.flops / 1e9:.1f}",
    "memory ms": lambda p: _range(*p.memory),
    **{name: _pipe(name) for name in ("issue", "FP32", "ALU", "MUFU")},
    "predicted ms": lambda p: _range(*p.ms),
    "bound by": lambda p: p.bound,
}
WHOLE: Columns = {
    "shape": lambda w: w.shape,
    "operation": lambda w: f"{w.name} ({w.products} products)",
    "products ms": lambda w: f"{w.gemm_ms:.1f}",
    "added ms": lambda w: _range(*w.added_ms),
    "predicted share of the products' rate": lambda w: (
        f"{100 * w.share[0]:.1f}-{100 * w.share[1]:.1f} %"
    ),
}
GAMES: Columns = {
    "kernel": lambda p: p.kernel,
    "B a game": lambda p: f"{p.bytes / _MILLION:.0f}",
    "memory": lambda p: f"{p.memory[1] * 1e3:.0f}",
    **{name: _pipe(name, 1e3, 0) for name in ("issue", "ALU", "FP32", "MUFU")},
    "bound by": lambda p: p.bound,
}
SMALL = ("kernel", "counted", "memory us", "bound by")

# What a program moves beside the rows, in bytes a row: labels, log-probs, norms, coefficients.
_BESIDE = {"partial_kernel": 8 + 8 * 16, "backward_kernel": 8 + 4 + 8 + 4, "row_kernel": 8 + 4}
# Kernels whose time is not in their bytes: what is counted, bytes, and what bounds them instead.
# N tokens with 16 slices of the vocabulary each; a million games of K responses in float32.
_TOKENS, _MILLION = SHAPES[0].rows, 1_000_000
_LESS_THAN_A_LAUNCH = {
    "finalize_kernel": (_TOKENS * (16 * 8 + 8 + 4 + 8 + 32), "a launch"),
    "segment_sum_kernel": (_TOKENS * 4, "a launch, and latency: a program a sequence"),
    "segment_expand_kernel": (_TOKENS * 4, "a launch, and latency: a program a sequence"),
}
_GAMES = {
    "symmetrize_kernel": (16, 8, "memory, if both orders of a pair come from L1"),
    "targets_warp_kernel": (16, 4, "latency: a lane walks a row of K"),
    "thread_kernel": (8, 4, "steps, which depend on the games; local memory"),
    "shared_kernel": (32, 4, "steps, which depend on the games; FP64 and shared memory"),
    "global_kernel": (64, 4, "steps, which depend on the games; L2"),
    "aggregate_kernel": (16, 24, "the comparisons' order: 40 B each, read at random"),
}


def cells(shown: Columns, items: Iterable) -> list[list[str]]:
    """The rows of a table."""
    return [[str(get(item)) for get in shown.values()] for item in items]


def _cuda_rows(reports: list[Report]) -> list[list[str]]:
    """A row a kernel: one value, or one a target where they differ."""
    by_case: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda r: (r.case, r.target)):
        by_case.setdefault(report.case, []).append(report)
    return [
        [
            " / ".join(found if len({*found}) > 1 else found[:1])
            for found in zip(*targets, strict=True)
        ]
        for targets in (cells(OF_CUDA, found) for found in by_case.values())
    ]


def predictions(reports: list[Report]) -> list[Prediction]:
    """The kernels that sweep, at every shape, in bfloat16, as compiled for sm_90.

    Raises:
        ValueError: the launcher would choose another block for some shape than was compiled.
    """
    found = []
    for shape in SHAPES:
        for r in reports:
            if not r.sweeps or r.target != 90 or not _belongs(r, shape):
                continue
            block = block_of(r.kernel, "bf16", shape.vocab)
            if block != (r.block, r.num_warps):
                raise ValueError(f"{r.case}: at {shape} the launcher takes {block}")
            small = _BESIDE.get(r.kernel, 16)
            moved = predict.moved_bytes(r.passes, shape.rows, shape.vocab, r.itemsize, small)
            threads = shape.rows * shape.vocab / r.elements
            found.append(
                predict.predict(str(shape), r.case, moved, threads, Counter(r.sweep), H200)
            )
    return found


def _belongs(report: Report, shape: Shape) -> bool:
    """bfloat16 rows of whole vectors; capped where the shape is, else plain."""
    if report.itemsize != 2 or any(w in report.case for w in ("odd V", "fp16", "bias")):
        return False
    capped = "cap (" in report.case
    return capped == shape.softcap if report.kernel == "row_kernel" else not shape.softcap


def wholes(found: list[Prediction]) -> list[Whole]:
    """The fused operations: their products and what the package adds to them."""
    by_name = {(p.shape, p.kernel.split(" (")[0]): p for p in found}
    operations = (
        ("trainable head", 3, "gradient"), ("frozen head", 2, "gradient"),
        ("no gradient", 1, "values"),
    )  # fmt: skip
    return [
        predict.whole(
            shape, name, products,
            by_name[str(shape), f"rows, {kernel}{', cap' * shape.softcap}"], H200,
        )
        for shape in SHAPES
        for name, products, kernel in operations
    ]  # fmt: skip


def games(reports: list[Report]) -> list[Prediction]:
    """The common path of preference games, a million games in float32, on sm_90."""
    found = []
    for r in sorted(reports, key=lambda r: r.case):
        if r.target == 90 and r.kernel == "targets_thread_kernel" and "float32" in r.case:
            k = int(r.case.split("K = ")[1].split(",")[0])
            moved, counts = _MILLION * (4.0 * k * k + 8 * k + 20), Counter(r.sweep)
            found.append(predict.predict("games", r.case, moved, _MILLION, counts, H200))
    return found


def small_rows(kernels: Iterable[str]) -> list[list[str]]:
    """Kernels that bytes and instructions say little about, with the memory time as a floor.

    `kernels` are the Triton kernels that do not go over the vocabulary.
    """
    unknown = sorted(set(kernels) - set(_LESS_THAN_A_LAUNCH))
    rows = [[name, "not counted", "-", "a launch"] for name in unknown]

    def add(name: str, what: str, moved: float, digits: int, bound: str) -> None:
        time = moved / H200.bandwidth[0] * 1e6
        counted = f"{what}: {moved / 1e6:.{digits}f} MB"
        rows.append([name, counted, f"{time:.{digits}f}", bound])

    for name, (moved, bound) in _LESS_THAN_A_LAUNCH.items():
        add(name, f"N = {_TOKENS}", moved, 2, bound)
    for name, (k, each, bound) in _GAMES.items():
        add(name, f"{_MILLION} games, K = {k}", _MILLION * k * k * each, 0, bound)
    return rows


def text(reports: list[Report], of_cuda: list[Report]) -> str:
    """What the command prints."""
    found = predictions(reports)
    parts = [columns([*STATIC], cells(STATIC, reports))]
    if of_cuda:
        parts.append(columns([*OF_CUDA], _cuda_rows(of_cuda)))
    parts.append("Predicted for an H200, measured nowhere:")
    parts += [
        columns([*TIMES], cells(TIMES, found)),
        columns([*WHOLE], cells(WHOLE, wholes(found))),
    ]
    return "\n\n".join(parts)


def _table(shown: Iterable[str], rows: list[list[str]]) -> str:
    return table([*shown], rows, left=())


def markdown(reports: list[Report], of_cuda: list[Report]) -> str:
    """docs/kernels.md."""
    import triton

    found = predictions(reports)
    row = SHAPES[0].vocab * 2
    low, high = (rate / 1e12 for rate in H200.bandwidth)
    return f"""# Triton and CUDA kernels, as compiled

Written by `python -m benchmarks.kernels --markdown docs/kernels.md`, with Triton
{triton.__version__} and nvcc {cuda.nvcc_version()}. **Nothing here was run on a GPU**: the first
tables are read from cubins compiled ahead of time, the others are arithmetic on them.

## Triton, compiled for sm_80, sm_90 and sm_100

Each kernel is compiled in the configuration that its launcher chooses without a tuned table, for
V = {SHAPES[0].vocab} ("odd V": one more, rows that start anywhere inside a 16-byte vector). `spill`
is the stack in bytes plus local loads and stores; `warps/SM`, out of 64, is what registers, shared
memory, threads and blocks allow, and `limit` the first that runs out. LDG and STG are global
accesses as number x bits of a thread. EX2, LG2 and RCP are MUFU instructions; MMA counts tensor
core instructions (the products are cuBLAS's). All counts are static.

{_table(STATIC, cells(STATIC, reports))}

## CUDA, compiled for sm_80, sm_90 and sm_100

Every instance in csrc/cuda; "a / b / c" where the three targets differ. The solvers keep a game's
tableau in local memory while a thread plays it (K <= 8: `stack B`, indexed by the pivots, so no
register can hold it), in shared memory while a warp does (K <= 32), else in global memory. Their
arithmetic is in float64 and without fused multiply-adds, so that every device gives the same bits.

{_table(OF_CUDA, _cuda_rows(of_cuda))}

## Predicted for an H200, measured nowhere

Bytes are those of the [N, V] array over all passes, and of what lies beside it; flops count a fused
multiply-add as two. `memory ms` is at {high:.1f} and {low:.1f} TB/s. The other columns are what one
pipe alone would take, in ms, with {H200.sms} SMs at {H200.clock / 1e9:.1f} GHz: 128 instructions an
SM and cycle issued, 128 in FP32, 64 in ALU (comparisons, integers, conversions), 16 in MUFU. They
count the instructions of the loops that sweep, or the whole program where there is no loop, with
branches not taken. The largest bounds the kernel; where two are close, expect less than either
alone allows.

{_table(TIMES, cells(TIMES, found))}

The whole operations: their matrix products at {H200.gemm / 1e12:.0f} TFLOP/s (bfloat16), and what
is added to them: the row kernel above and the passes over [N, D]. Launches and the merging of
chunks are not counted, and chunks do not overlap. The last column is to be compared with the
targets: 95 % for D >= 2048, 85 % at D = 896.

{_table(WHOLE, cells(WHOLE, wholes(found)))}

The row kernel reads z twice. It counts one read because the second should come from L2: it keeps
32 warps an SM, so one row of {row / 1e3:.0f} KB an SM, {row * H200.sms / 1e6:.0f} MB of the
{H200.l2 / 1e6:.0f} MB of L2 at V = {SHAPES[0].vocab}, and
{SHAPES[2].vocab * 2 * H200.sms / 1e6:.0f} MB at V = {SHAPES[2].vocab}, which does not fit.
Whether L2 keeps them has to be measured; where it does not, the gradient reads half as much again.

Preference games, float32, the common path, for a million games, in microseconds. Instructions are
those of all four modes together, so the truth should be less.

{_table(GAMES, cells(GAMES, games(of_cuda)))}

The others, for which the time of their bytes is a floor and not a prediction:

{_table(SMALL, small_rows(r.kernel for r in reports if not r.sweeps))}
"""
