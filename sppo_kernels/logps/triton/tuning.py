"""`tune`: times candidate blocks of the kernels that sweep a vocabulary, and keeps the best.

It runs when it is asked to and never else. Every candidate has to agree with float64 before it is
timed, so a table changes speed, and results by rounding at most.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sppo_kernels.backend import triton_interpreted
from sppo_kernels.files import write_json
from sppo_kernels.logps.triton import config, tables
from sppo_kernels.logps.triton.row_logps import row_logps
from sppo_kernels.logps.triton.token_logps import token_logps
from sppo_kernels.logps.triton.token_logps_backward import token_logps_backward
from sppo_kernels.testing import assert_within_budget

IGNORE = -100
SHAPES = ((8192, 128256), (8192, 151936), (4096, 256000), (8192, 32000))  # rows, vocabulary
GATE_ROWS = 8
REPEATS = 9
MARGIN = 0.01  # a candidate has to beat the default by so much of its time

Clock = Callable[[dict[config.Block, Callable[[], object]]], dict[config.Block, float]]


class TuningError(RuntimeError):
    """Tuning cannot be done here; the message says why."""


class Outcome(NamedTuple):
    """What tuning found, where it was written, and what the time was too short for."""

    path: Path
    entries: list[dict]
    left_out: list[str]
    refused: list[str]


def candidates(kernel: str, dtype: torch.dtype, n_cols: int) -> list[config.Block]:
    """Blocks worth timing, the default first: 4 to 32 warps, 1 to 8 16-byte loads a thread."""
    vec = config.vector(dtype)
    warps, loads = ((8, 16, 32), (1, 2, 4)) if kernel == "row" else ((4, 8, 16), (2, 4, 8))
    found = [config.block(kernel, dtype, n_cols)]
    found += [
        config.fit(config.Block(w * 32 * vec * many, w), n_cols, vec)
        for w in warps
        for many in loads
    ]
    return list(dict.fromkeys(found))


class Problem(NamedTuple):
    """Random logits [1, N, V], their labels, and room for a gradient."""

    logits: Tensor
    labels: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """Peaked logits; every eighth row is ignored, as prompts and padding are."""
        logits = torch.empty((1, rows, vocab), dtype=dtype, device=device)
        for part in logits[0].split(1024):
            part.copy_(torch.randn(part.shape, device=device) * 4)
        labels = torch.randint(0, vocab, (1, rows), device=device)
        labels[0, 7::8] = IGNORE
        return cls(logits, labels)


def call(
    kernel: str, block: config.Block, problem: Problem, out: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """One launch of a kernel with a block; gives what it computes. `out`: room for a gradient."""
    logits, labels = problem
    override = {"row" if kernel == "row" else "split": block}
    if kernel == "backward":
        logp, norm = token_logps(logits, labels, IGNORE)
        one = torch.ones_like(logp)
        out = torch.empty_like(logits) if out is None else out

    def run() -> tuple[Tensor, ...]:
        with config.overridden(**override):
            if kernel == "split":
                return token_logps(logits, labels, IGNORE)
            if kernel == "backward":
                token_logps_backward(one, logits, labels, logp, norm, IGNORE, out)
                return (out,)
            return row_logps(logits[0], labels[0], None, 1.0, None, IGNORE, True), logits

    return run


def gate(
    kernel: str, block: config.Block, dtype: torch.dtype, vocab: int, device: torch.device
) -> None:
    """Compare a block's results with float64.

    Raises:
        AssertionError: further away than twice the error of eager float32 and one rounding.
    """
    problem = Problem.random(GATE_ROWS, vocab, dtype, device)
    exact, eager = (_reference(problem, d) for d in (torch.float64, torch.float32))
    found = call(kernel, block, problem)()
    results = {"log p": (found[0], 0), "gradient": (found[-1], 1)}
    for what, (got, at) in results.items():
        if (kernel, what) in (("backward", "log p"), ("split", "gradient")):
            continue
        # Sums in another order differ by roundings of a whole row's log-sum-exp; 2 as in the tests.
        want = (values[at].view_as(got) for values in (eager, exact))
        assert_within_budget(got, *want, what=f"{kernel} {tuple(block)}: {what}", roundings=2.0)


def _reference(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p [1, N] and softmax - onehot [1, N, V], 0 for ignored rows."""
    active = problem.labels != IGNORE
    y = problem.labels.clamp_min(0)[..., None]
    logp = torch.log_softmax(problem.logits.to(dtype), -1)
    dz = logp.exp().scatter_add(-1, y, -torch.ones_like(y, dtype=dtype))
    return logp.gather(-1, y)[..., 0] * active, dz * active[..., None]


def cuda_clock(functions: dict[config.Block, Callable[[], object]]) -> dict[config.Block, float]:
    """Median seconds of each function by CUDA events, in turn after two warm-ups."""
    times: dict[config.Block, list[float]] = {name: [] for name in functions}
    for function in [*functions.values()] * 2:
        function()
    for _ in range(REPEATS):
        for name, function in functions.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def search(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    clock: Clock,
    deadline: float,
    refused: list[str],
    left_out: list[str],
) -> Iterator[dict]:
    """Entries for every shape, dtype and kernel, as far as the time goes (`time.monotonic`).

    Candidates that fail the gate, or that the device cannot launch, are named in `refused`.
    """
    for dtype, (rows, vocab) in itertools.product(dtypes, shapes):
        problem = None
        for kernel in tables.KERNELS:
            title = f"{kernel}, {tables.word(dtype)}, {rows} x {vocab}"
            if time.monotonic() > deadline:
                left_out.append(title)
                continue
            if problem is None:
                problem = Problem.random(rows, vocab, dtype, device)
            out = torch.empty_like(problem.logits) if kernel == "backward" else None
            allowed: dict[config.Block, Callable[[], object]] = {}
            default, *others = candidates(kernel, dtype, vocab)
            for block in (default, *others):
                if allowed and time.monotonic() > deadline:
                    left_out.append(f"{title}, {tuple(block)}")
                    continue
                try:
                    gate(kernel, block, dtype, vocab, device)
                except AssertionError as error:
                    refused.append(str(error))
                except Exception as error:  # more registers or memory than the device has
                    refused.append(f"{title}, {tuple(block)}: {type(error).__name__}: {error}")
                else:
                    allowed[block] = call(kernel, block, problem, out)
            if default not in allowed:
                continue  # the default itself is refused: nothing to compare with
            seconds = clock(allowed)
            allowed.clear()  # they hold the memory of this problem
            best = min(seconds, key=seconds.get)
            if seconds[best] > (1 - MARGIN) * seconds[default]:
                best = default
            yield {
                **{"kernel": kernel, "dtype": tables.word(dtype), "columns": vocab},
                **{"block": best.size, "warps": best.num_warps, "rows": rows},
                **{"ms": seconds[best] * 1e3, "default_ms": seconds[default] * 1e3},
            }


def tune(
    shapes: Sequence[tuple[int, int]] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    out: Path | str | None = None,
    budget: float = 120.0,
) -> Outcome:
    """Time the candidates on the current GPU and write the best of them into a table.

    Args:
        shapes: (rows, vocabulary) pairs; None: the vocabularies of common models.
        dtypes: of the logits; None: bfloat16.
        out: the table; None: the user's own (`tables.user_file`). Entries of other kernels, dtypes,
            vocabularies and devices in it are kept.
        budget: seconds after which nothing new begins.

    Returns:
        Outcome(path, entries written, what was left out, candidates refused by the gate).

    Raises:
        TuningError: no CUDA device, Triton interpreted, or no time for anything.
        files.FileError: `out` exists and is not a table.
    """
    if not torch.cuda.is_available():
        raise TuningError("tune: expected a CUDA device to time kernels on, and none is here")
    if triton_interpreted():
        raise TuningError("tune: TRITON_INTERPRET=1 is set, and interpreted kernels tell no times")
    name = torch.cuda.get_device_name()
    path = Path(out) if out is not None else tables.user_file(name)
    if path is None:
        raise TuningError("tune: SPPO_KERNELS_TUNED=0 is set: give a file, or unset it")
    kept = tables.read(path) if path.exists() else []
    device = torch.device("cuda", torch.cuda.current_device())
    refused: list[str] = []
    left_out: list[str] = []
    deadline = time.monotonic() + budget
    found = list(
        search(
            *(shapes or SHAPES, dtypes or (torch.bfloat16,), device, cuda_clock),
            *(deadline, refused, left_out),
        )
    )
    if not found:
        raise TuningError(f"tune: nothing was timed in {budget:.0f} s; refused: {refused}")
    found = [entry | _versions(name) for entry in found]
    write(path, kept, found)
    tables.forget()
    return Outcome(path, found, left_out, refused)


def _versions(device_name: str) -> dict[str, str]:
    from importlib.metadata import version

    import triton

    return {
        "device": device_name,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "sppo_kernels": version("sppo-kernels"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write(path: Path, kept: list[dict], found: list[dict]) -> None:
    """`found`, and of `kept` what it does not replace, written whole or not at all."""

    def key(entry: dict) -> tuple[Any, ...]:
        return tuple(entry[k] for k in ("device", "kernel", "dtype", "columns"))

    new = {key(entry) for entry in found}
    entries = [e for e in kept if key(e) not in new] + found
    content = {"schema": tables.SCHEMA, "note": "written by `sppo tune`", "entries": entries}
    write_json(content, path)
