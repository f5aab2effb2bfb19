"""Measures the loss path: gate every provider, time all of them in turn, then their memory.

Used by `python -m benchmarks run` (benchmarks/suite.py), which calls it in a process of its own for
each case: python -m benchmarks.core FILE SECONDS TASK, with a Task as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import memory
from benchmarks import providers as p
from benchmarks.harness import (
    CPU,
    LINUX,
    SPENT,
    Call,
    Refused,
    clock,
    extra_peak,
    interleaved,
    passed,
    set_up,
)
from benchmarks.inputs import Case, Inputs, clear, make_inputs, prepare
from benchmarks.providers import Provider
from benchmarks.rows import GROUPS, LOGITS, Row, environment, write_json
from benchmarks.truth import Truth

SLOW = 3.0  # seconds; a call that takes longer is repeated only SLOW_REPEATS times
SLOW_REPEATS = 2
VERY_SLOW = 8.0


@dataclass(frozen=True)
class Task:
    """What is measured of a case: groups, and of their providers which, how often, and memory.

    Args:
        providers: those whose name has one of these words (all without); the ceiling always runs.
        without: leave out those whose name has one of these words.
        memory_without: measure no memory of those whose name has one of these words.
        repeats: timed calls of each provider; SLOW_REPEATS for those whose call takes over SLOW
            seconds, one over VERY_SLOW.
    """

    case: Case
    groups: tuple[str, ...] = GROUPS
    dtype: str = "bfloat16"
    providers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    memory: bool = True
    memory_without: tuple[str, ...] = ()
    repeats: int = 3

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Task:
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return cls(**found | {"case": Case(*found["case"])})


def step(q: Provider, inputs: Inputs, group: str) -> Call:
    """One call to time: the loss, and its backward where the group has one.

    Its attribute `inputs` is what it works on: a copy of the logits where its gradient replaces
    them, the rows without padding where the provider packs and the case has a length spread.
    """
    given = inputs.logits
    if q.inplace:
        inputs = replace(inputs, logits=given.detach().clone().requires_grad_())
    elif q.packs and inputs.ends is not None:
        inputs = inputs.packed()

    def run() -> torch.Tensor:
        if group.endswith("forward"):
            with torch.no_grad():
                return q.loss(inputs)
        clear(inputs)
        value = q.loss(inputs)
        value.backward()
        return value

    def setup() -> None:  # unclocked
        clear(inputs)
        if q.inplace:
            inputs.logits.detach().copy_(given.detach())

    run.setup, run.inputs = setup, inputs
    return run


class Batch:
    """Inputs of a case and their float64 truth, made once for all groups that share them.

    With `gate_rows` the truth is that of a smaller batch of at most so many rows, for cases whose
    own truth would be too large.
    """

    def __init__(
        self, group: str, case: Case, dtype: torch.dtype, device: torch.device,
        gate_rows: int | None = None, seed: int | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind_of(group)
        self.inputs = self.gated = make_inputs(self.kind, case, dtype, device, seed)
        if gate_rows is not None and gate_rows < case.rows:
            few = case._replace(rows=max(case.responses, gate_rows))
            self.gated = make_inputs(self.kind, few, dtype, device, seed)
        self.truth = Truth(prepare("trainable", self.gated))
        self.what = f"{self.inputs.what}; mean log p of a label {self.truth.mean_logp:.1f}"

    def gate(self, q: Provider, run: Call, group: str) -> float:
        """Call `run`, for the first time, and give the error of its loss and gradients.

        Raises:
            Refused: they do not pass.
        """
        small = self.gated is not self.inputs
        first = step(q, prepare(group, self.gated), group) if small else run
        error = self.truth.check(set_up(first)(), first.inputs, q.task)
        if small:
            set_up(run)()
        return error


def kind_of(group: str) -> str:
    return "logits" if group in LOGITS else "linear"


def run_case(
    group: str,
    task: Task,
    device: torch.device = CPU,
    *,
    batch: Batch | None = None,
    found: Sequence[Provider] | None = None,
    deadline: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
    fresh: bool = True,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Gate, then time every provider of a group in turn, then measure memory.

    Args:
        batch: the inputs, when several groups share them.
        found: the providers, instead of those of the table.
        deadline: of time.monotonic(); providers not gated by then become rows that say so.
        timer: the clock on the CPU.
        fresh: on the CPU, measure memory in fresh processes.
        keep: called with the rows when their times are known and memory is not.
    """
    found = p.of_group(group) if found is None else found
    if any(q.compiles for q in found):
        torch._dynamo.reset()
        p.compiled.cache_clear()
    case, dtype = task.case, getattr(torch, task.dtype)
    batch = batch or Batch(group, case, dtype, device)
    inputs = prepare(group, batch.inputs)

    def row(name: str, counted: tuple[float | None, float | None]) -> Row:
        flops, moved = counted
        return Row(
            group, case.title(group), task.dtype, name, flops=flops, bytes=moved, inputs=batch.what
        )

    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    wanted: dict[str, int] = {}
    for q in found:
        if not _named(q.name, task.providers or ("",)) or _named(q.name, task.without):
            continue
        rows[q.name] = this = row(q.name, p.counted(group, inputs))
        reason = q.why_not(case, dtype, device)
        if reason is not None:
            this.note = f"cannot run: {reason}"
            continue
        if deadline is not None and time.monotonic() > deadline:
            this.note = SPENT
            continue
        print(f"  {q.name}", file=sys.stderr, flush=True)
        run, began = step(q, inputs, group), time.perf_counter()

        def gate(q=q, run=run) -> float:
            with time_limit(first_call_until(deadline)):
                return batch.gate(q, run, group)

        if passed(this, gate):
            calls[q.name], took = run, time.perf_counter() - began
            # The first call had the gate in it, maybe a compiler; far too slow ones need no more.
            if device.type == "cuda" or q.compiles or SLOW < took < 1.5 * VERY_SLOW:
                took = _once(run, device)
            most = task.repeats if took <= SLOW else SLOW_REPEATS if took <= VERY_SLOW else 1
            wanted[q.name] = min(task.repeats, most)
            this.note = q.includes
            if wanted[q.name] < task.repeats:
                calls_made = f"{wanted[q.name]} calls" if wanted[q.name] > 1 else "1 call"
                this.note = _join(this.note, f"{calls_made} of {took:.0f} s")
        clear(inputs)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = p.ceiling_name(group)
    rows[name] = row(name, p.ceiling_counted(group, inputs))
    calls[name], wanted[name] = p.ceiling(group, inputs), task.repeats
    # The gate was the first warm-up; a second one only where it costs little.
    warmups = 1 if sum(wanted.values()) == task.repeats * len(wanted) else 0
    for name, times in interleaved(
        calls, wanted, device, warmups=warmups, deadline=deadline, timer=timer
    ).items():
        rows[name].times = times
    clear(inputs)
    keep(list(rows.values()))
    if task.memory:
        for name in [n for n in calls if _named(n, task.memory_without)]:
            rows[name].note = _join(rows[name].note, "memory left out")
            del calls[name]
        # The quickest first: when the time is up, few are lost.
        measured = {n: calls[n] for n in sorted(calls, key=lambda n: rows[n].times or [0.0])}
        _measure_memory(rows, measured, group, task, device, deadline, fresh)
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


def _named(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def _once(run: Call, device: torch.device) -> float:
    """Wall seconds of one more call, all of its work done."""
    return clock(set_up(run), device)


def _measure_memory(rows, calls, group, task, device, deadline, fresh) -> None:
    if device.type == "cuda" or not fresh:
        for name, run in calls.items():
            rows[name].extra_peak = extra_peak(set_up(run), device)
            set_up(run)  # its gradients are not held while others run
    elif LINUX:
        left = None if deadline is None else max(5.0, deadline - time.monotonic())
        found, why = memory.in_fresh_processes(list(calls), group, task.case, task.dtype, left)
        for name in calls:
            rows[name].extra_peak = found.get(name)
            if name not in found:
                rows[name].note = _join(rows[name].note, f"memory not measured: {why}")


def _join(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


def main(argv: list[str] | None = None) -> int:
    """One case, group by group; the file is rewritten after each, so that a stop loses little."""
    began = time.monotonic()
    out, seconds, text = sys.argv[1:] if argv is None else argv
    task, deadline = Task.parse(text), began + float(seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    batch: Batch | None = None
    env = environment()
    for group in task.groups:
        print(f"{group} {task.case.title(group)} {task.dtype}", file=sys.stderr, flush=True)
        if batch is None or batch.kind != kind_of(group):
            batch = None
            gc.collect()
            batch = Batch(group, task.case, getattr(torch, task.dtype), device)
        rows += run_case(
            group, task, device, deadline=deadline, batch=batch,
            keep=lambda found, before=tuple(rows): write_json(Path(out), [*before, *found], env),
        )  # fmt: skip
        write_json(Path(out), rows, env)
    return 0


if __name__ == "__main__":
    sys.exit(main())
