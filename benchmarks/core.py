"""Measures the loss path: gate every provider, time all of them in turn, then their memory.

Used by `python -m benchmarks run` (benchmarks/suite.py), which calls it in a process of its own for
each case: python -m benchmarks.core --case N D V --groups trainable --json FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import memory
from benchmarks import providers as p
from benchmarks.harness import cuda_extra_peak, interleaved
from benchmarks.inputs import KINDS, PROMPT_SHARE, SEQUENCES, Case, Inputs, make_inputs, prepare
from benchmarks.providers import GROUPS, Loss, Provider
from benchmarks.rows import OURS, Refused, Row, environment, write_json
from benchmarks.truth import Truth, check

CPU_CASE = Case(2048, 1024, 50304)
GATE_ROWS = 64  # of the gate outside a run, for tests and other tools
SLOW = 3.0  # seconds; a call that takes longer is repeated only SLOW_REPEATS times
SLOW_REPEATS = 2
VERY_SLOW = 8.0
SPENT = "not measured: the time budget was spent"
DTYPES = ("bfloat16", "float16", "float32")


def losses(group: str, device: torch.device) -> dict[str, Loss]:
    """The losses of a group's providers by name, of our implementations that of the device only."""
    found = p.of_group(group)
    drop = {f"{OURS} {i}" for i in ("native", "triton", "reference")} - {
        f"{OURS} {p.fast_impl(device)}"
    }
    return {q.name: q.loss for q in found if q.name.removesuffix(", in place") not in drop}


def provider(name: str, group: str) -> Provider:
    return next(q for q in p.of_group(group) if q.name == name)


def step(name: str, loss: Loss, inputs: Inputs, group: str) -> Callable[[], object]:
    """One call to time: the loss, and its backward where the group has one."""
    given = inputs.logits
    if name.endswith("in place"):  # its gradient replaces the logits: it works on a copy of its own
        inputs = replace(inputs, logits=given.detach().clone().requires_grad_())

    def run() -> torch.Tensor:
        if group.endswith("forward"):
            with torch.no_grad():
                return loss(inputs)
        p.clear(inputs)
        value = loss(inputs)
        value.backward()
        return value

    def setup() -> None:  # unclocked
        inputs.logits.grad = None
        inputs.logits.detach().copy_(given.detach())

    if inputs.logits is not given:
        run.setup, run.inputs = setup, inputs
    return run


def passes(run: Callable[[], object], inputs: Inputs, truth: Truth, task: str) -> float:
    """Call `run`, and the error of its loss and gradients, if they pass the gate.

    Raises:
        Refused: they do not.
    """
    getattr(run, "setup", int)()
    value = run()
    own = getattr(run, "inputs", inputs)
    dtype = (own.logits if own.hidden is None else own.hidden).dtype
    before, truth.inputs = truth.inputs, own
    try:
        return check(truth.error(value, task), dtype)
    finally:
        truth.inputs = before


def gate(name: str, loss: Loss, group: str, case: Sequence, dtype, device) -> float:
    """The gate on a batch of its own of at most GATE_ROWS rows; Refused, or the error."""
    case = Case(*case)
    case = case._replace(rows=min(GATE_ROWS, case.rows))
    kind = "logits" if group in p.LOGITS else "linear"
    inputs = prepare(group, make_inputs(kind, case, dtype, device))
    tasks = {q.name: q.task for q in p.of_group(group)}
    run = step(name, loss, inputs, group)
    return passes(run, inputs, Truth(inputs), tasks.get(name, "sppo"))


class Batch:
    """Inputs of a case and their float64 truth, made once for all groups that share them."""

    def __init__(self, kind: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.kind = kind
        self.inputs = make_inputs(kind, case, dtype, device)
        self.truth = Truth(prepare("trainable", self.inputs))
        self.what = f"{self.inputs.what}; mean log p of a label {self.truth.mean_logp:.1f}"


def run_case(
    group: str,
    case: Sequence,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    memory_too: bool = True,
    only: Sequence[str] | None = None,
    *,
    without: Sequence[str] = (),
    memory_without: Sequence[str] = (),
    deadline: float | None = None,
    batch: Batch | None = None,
    found: list[Provider] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Gate, then time every provider of a group in turn, then measure memory.

    Args:
        repeats: timed calls of each provider; SLOW_REPEATS for those whose call takes over SLOW
            seconds, one over VERY_SLOW.
        only: providers whose name contains one of these words; the ceiling always runs.
        without: leave out those whose name contains one of these.
        memory_without: measure no memory of those whose name contains one of these.
        deadline: of time.monotonic(); providers not gated by then become rows that say so.
        batch: the inputs, when several groups share them.
        found: the providers, instead of those of the table.
        keep: called with the rows when their times are known and memory is not.
    """
    case = Case(*case)
    torch._dynamo.reset()
    p.compiled.cache_clear()
    kind = "logits" if group in p.LOGITS else "linear"
    batch = batch or Batch(kind, case, dtype, device)
    inputs = prepare(group, batch.inputs)
    flops, moved = p.counted(group, inputs)
    name_of_dtype = str(dtype).removeprefix("torch.")

    def row(name: str, flops: float | None = flops, moved: float | None = moved) -> Row:
        return Row(
            group, case.title(group), name_of_dtype, name, flops=flops, bytes=moved,
            inputs=batch.what,
        )  # fmt: skip

    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    wanted: dict[str, int] = {}
    for q in p.of_group(group) if found is None else found:
        if only and not any(word in q.name for word in only):
            continue
        if any(word in q.name for word in without):
            continue
        rows[q.name] = this = row(q.name)
        this.note = q.includes
        reason = q.why_not(case, dtype, device)
        if reason is None and deadline is not None and time.monotonic() > deadline:
            reason = SPENT
        if reason is not None:
            this.note = reason if reason == SPENT else f"cannot run: {reason}"
            continue
        print(f"  {q.name}", file=sys.stderr, flush=True)
        run, began = step(q.name, q.loss, inputs, group), time.perf_counter()
        try:
            with time_limit(first_call_until(deadline)):
                this.error = passes(run, inputs, batch.truth, q.task)
        except Refused as refusal:
            this.note = f"refused: {refusal}"
        except Exception as error:  # a peer may fail in any way; the row says how
            this.note = f"cannot run: {type(error).__name__}: {_first_line(error)}"
        else:
            calls[q.name] = run
            took = time.perf_counter() - began
            # The first call had the gate in it, maybe a compiler; far too slow ones need no more.
            if device.type == "cuda" or q.compiles or SLOW < took < 1.5 * VERY_SLOW:
                took = _once(run, device)
            most = repeats if took <= SLOW else SLOW_REPEATS if took <= VERY_SLOW else 1
            wanted[q.name] = min(repeats, most)
            if wanted[q.name] < repeats:
                calls_made = f"{wanted[q.name]} calls" if wanted[q.name] > 1 else "1 call"
                this.note = _join(this.note, f"{calls_made} of {took:.0f} s")
        p.clear(inputs)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = p.ceiling_name(group)
    rows[name] = row(name, *p.ceiling_counted(group, inputs))
    calls[name], wanted[name] = p.ceiling(group, inputs), repeats
    gc.collect()
    # The gate was the first warm-up; a second one only where it costs little.
    warmups = 1 if sum(wanted.values()) == repeats * len(wanted) else 0
    for name, times in interleaved(
        calls, wanted, device, warmups=warmups, deadline=deadline
    ).items():
        rows[name].times = times
    p.clear(inputs)
    if keep is not None:
        keep(list(rows.values()))
    if memory_too:
        skipped = [n for n in calls if any(word in n for word in memory_without)]
        for name in skipped:
            rows[name].note = _join(rows[name].note, "memory left out")
        # The quickest first: when the time is up, few are lost.
        measured = {n: calls[n] for n in sorted(calls, key=lambda n: rows[n].times or [0.0])}
        measured = {n: run for n, run in measured.items() if n not in skipped}
        _measure_memory(rows, measured, inputs, group, case, name_of_dtype, device, deadline)
    return list(rows.values())


def first_call_until(deadline: float | None) -> float | None:
    """When a first call, compiling and tuning included, must be over: it may not take all time."""
    if deadline is None:
        return None
    now = time.monotonic()
    return min(deadline, now + max(20.0, 0.4 * (deadline - now)))


@contextlib.contextmanager
def time_limit(deadline: float | None):
    """Stop what runs inside at the deadline (some peers tune themselves for minutes).

    Raises:
        Refused: inside, when the time is up. Only where alarms exist, in the main thread.
    """
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Refused("its first call took more of the time budget than it may")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _once(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one more call, all of its work done."""
    getattr(run, "setup", int)()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _measure_memory(rows, calls, inputs, group, case, dtype, device, deadline) -> None:
    if device.type == "cuda":
        for name, run in calls.items():
            getattr(run, "setup", int)()
            rows[name].extra_peak = cuda_extra_peak(run)
            p.clear(inputs)
        return
    if not sys.platform.startswith("linux"):
        return
    left = None if deadline is None else max(5.0, deadline - time.monotonic())
    found, why = memory.in_fresh_processes(list(calls), group, case, dtype, left)
    for name in calls:
        rows[name].extra_peak = found.get(name)
        if name not in found:
            rows[name].note = _join(rows[name].note, f"memory not measured: {why}")


def _join(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:90] if lines else ""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--case", nargs=3, type=int, metavar=("N", "D", "V"), default=CPU_CASE[:3])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--inputs", choices=KINDS, default="zipf")
    parser.add_argument("--prompt-share", type=float, default=PROMPT_SHARE)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--providers", nargs="+", help="those whose name has one of these words")
    parser.add_argument("--without", nargs="+", default=[], help="leave out those with these words")
    parser.add_argument("--memory-without", nargs="+", default=[], help="no memory of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="time budget")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.case[0] < SEQUENCES:
        parser.error(f"--case: expected at least {SEQUENCES} rows, got {args.case[0]}")
    return args


def main(argv: list[str] | None = None) -> int:
    """One case, group by group; the file is rewritten after each, so that a stop loses little."""
    began = time.monotonic()
    args = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(*args.case, args.inputs, args.prompt_share, args.softcap)
    dtype = getattr(torch, args.dtype)
    deadline = None if args.seconds is None else began + args.seconds
    rows: list[Row] = []
    batch: Batch | None = None
    env = environment()
    for group in args.groups:
        print(f"{group} {case.title(group)} {args.dtype}", file=sys.stderr, flush=True)
        kind = "logits" if group in p.LOGITS else "linear"
        if batch is None or batch.kind != kind:
            batch = None
            gc.collect()
            batch = Batch(kind, case, dtype, device)
        rows += run_case(
            group, case, dtype, device, args.repeats, not args.no_memory, args.providers,
            without=args.without, memory_without=args.memory_without, deadline=deadline,
            batch=batch,
            keep=lambda found, before=tuple(rows): write_json(args.json, [*before, *found], env),
        )  # fmt: skip
        write_json(args.json, rows, env)
    print(json.dumps({"rows": len(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
