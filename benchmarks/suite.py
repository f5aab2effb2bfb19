"""python -m benchmarks run: the whole suite within a time budget, the most important cases first.

Every case runs in a process of its own (what it times in turn shares that process), so that a crash
or a spent budget costs one case. What did not fit is a row that says so. Writes results.json,
table.md and plots to a folder, by default benchmarks/results/<machine>/ for the whole suite, and
runs/bench/<machine>/ when an option picks a part of it. What the processes say goes to log.txt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from benchmarks.core import Task
from benchmarks.harness import SPENT, Process
from benchmarks.inputs import KINDS, PROMPT_SHARE, SEQUENCES, Case
from benchmarks.render import document, print_table
from benchmarks.rows import (
    GROUPS,
    RESULTS,
    ROOT,
    Row,
    environment,
    machine_slug,
    read_json,
    write_json,
)
from benchmarks.truth import DTYPES

ALL_GROUPS = (*GROUPS, "games", "trainer")
LEAST = 12.0  # seconds; with less left a case is not begun
# On two cores ten minutes do not suffice for what says least.
CPU_WITHOUT = ("reference", "cross_entropy, sum")
SLOWEST = ("linear_cross_entropy",)  # memory of these would take a tenth of the budget
COMPILED = ("torch.compile", "Liger", "CCE")  # compiled once more to measure their memory


@dataclass(frozen=True)
class Job:
    """One process of at most `share` of the budget: a task of the loss path, or another suite."""

    share: float
    task: Task | None = None
    suite: tuple[str, ...] = ()  # module and options
    group: str = ""
    title: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        return self.task.groups if self.task else (self.group,)

    @property
    def dtype(self) -> str:
        return self.task.dtype if self.task else "float32"

    def name(self, group: str) -> str:
        return self.task.case.title(group) if self.task else self.title

    def command(self, out: Path, seconds: float) -> list[str]:
        if self.task:
            return ["benchmarks.core", str(out), f"{seconds:.0f}", self.task.text()]
        return [*self.suite, "--json", str(out), "--seconds", f"{seconds:.0f}"]

    def absent(self, note: str, groups: Sequence[str] | None = None) -> list[Row]:
        """Rows that say why the groups were not measured."""
        chosen = self.groups if groups is None else groups
        return [Row(g, self.name(g), self.dtype, "all providers", note=note) for g in chosen]


GAMES = Job(0.15, suite=("benchmarks.games",), group="games", title="K=5 and K=16")
TRAINER = Job(
    0.25, suite=("benchmarks.trainer_step", "--steps", "3"), group="trainer", title="Llama"
)


def cpu_plan() -> list[Job]:
    """Two cores, ten minutes: the shape of docs/decisions.md, then the games and the trainer."""
    case = Case(2048, 1024, 50304)
    dense = case._replace(prompt=0.0)
    few = {"providers": ("native", "eager"), "memory": False}
    lean = {"without": (*CPU_WITHOUT, "linear_cross_entropy", "Liger"), "memory_without": COMPILED}
    return [
        Job(0.45, Task(case, GROUPS[:1], without=CPU_WITHOUT, memory_without=SLOWEST)),
        Job(0.15, Task(case, GROUPS[3:], repeats=7, without=CPU_WITHOUT)),
        GAMES,
        Job(0.3, Task(case, ("frozen",), **lean)),
        Job(0.3, Task(case, ("forward",), **lean)),
        TRAINER,
        Job(0.35, Task(dense, GROUPS[:3], **few)),
        Job(0.1, Task(case._replace(inputs="flat"), ("logits",), **few)),
        Job(0.3, Task(dense, GROUPS[:1], "float32", without=("float32",), **few)),
    ]


def cuda_plan() -> list[Job]:
    """The shapes by which the kernels are judged, every row counting, then inputs as in life."""
    first = Case(8192, 4096, 128256, prompt=0.0)
    capped = Case(4096, 3584, 256000, prompt=0.0, softcap=30.0)
    plan = (
        (0.4, first, GROUPS[:3]),
        (0.2, first, GROUPS[3:]),
        (0.25, Case(8192, 896, 151936, prompt=0.0), GROUPS[:2]),
        (0.25, Case(16384, 2048, 128256, prompt=0.0), GROUPS[:1]),
        (0.25, capped, GROUPS[:1]),
        (0.25, first._replace(prompt=PROMPT_SHARE), GROUPS[:2]),
        (0.15, first._replace(inputs="flat"), ("logits",)),
    )
    jobs = [Job(share, Task(case, groups, repeats=10)) for share, case, groups in plan]
    return [*jobs, replace(GAMES, share=0.2)]


def select(plan: Sequence[Job], groups: Sequence[str], dtypes: Sequence[str]) -> list[Job]:
    """The plan's jobs, cut down to some groups and dtypes; all where a list is empty."""
    out = []
    for job in plan:
        kept = tuple(g for g in job.groups if not groups or g in groups)
        if kept and not (job.task and dtypes and job.dtype not in dtypes):
            out.append(replace(job, task=job.task and replace(job.task, groups=kept)))
    total = sum(job.share for job in out)  # a part may take the time that the rest does not need
    return [replace(job, share=job.share / min(1.0, total)) for job in out]


Execute = Callable[[Job, float], list[Row]]


def run_plan(
    plan: Sequence[Job],
    budget: float,
    execute: Execute,
    *,
    clock: Callable[[], float] = time.monotonic,
    after: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Run the jobs in order within `budget` seconds; what does not fit becomes rows that say so.

    Args:
        execute: runs one job within the seconds it is given.
        after: called with all rows so far after every job.
    """
    end, rows = clock() + budget, []
    for job in plan:
        left = end - clock()
        if left < min(LEAST, budget / 2):
            rows += job.absent(SPENT)
        else:
            rows += execute(job, min(left, job.share * budget))
        after(rows)
    return rows


def in_process(job: Job, seconds: float, log: IO[str]) -> list[Row]:
    """Run a job in a process of its own; groups that it did not finish become rows that say why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = job.command(out, 0.85 * seconds)  # the rest is for starting and for the last call
        status, *_ = Process(*command, log=log).finish(seconds)
        why = f"not measured: the process failed with status {status}, see log.txt"
        rows = read_json(out)[0] if out.exists() else []
    found = {row.group for row in rows}
    why = SPENT if status is None else why
    return rows + job.absent(why, [g for g in job.groups if g not in found])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--budget", type=float, default=575.0, help="seconds (default 575)")
    parser.add_argument("--groups", nargs="+", choices=ALL_GROUPS, default=[])
    parser.add_argument("--case", nargs=3, type=int, metavar=("N", "D", "V"), help="one shape")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[])
    parser.add_argument("--providers", nargs="+", help="those whose name has one of these words")
    parser.add_argument("--inputs", choices=KINDS, help="with --case")
    parser.add_argument("--prompt-share", type=float, help="with --case; 0: every row counts")
    parser.add_argument("--softcap", type=float, help="with --case")
    parser.add_argument("--repeats", type=int, help="timed calls of each provider")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and plots")
    args = parser.parse_args(argv)
    if not args.case and (args.inputs or args.prompt_share is not None or args.softcap):
        parser.error("--inputs, --prompt-share and --softcap go with --case")
    if args.case and args.case[0] < SEQUENCES:
        parser.error(f"--case: expected at least {SEQUENCES} rows, got {args.case[0]}")
    return args


def chosen_plan(args: argparse.Namespace, cuda: bool) -> list[Job]:
    """The jobs that the options ask for."""
    if args.case:
        prompt = PROMPT_SHARE if args.prompt_share is None else args.prompt_share
        case = Case(*args.case, args.inputs or "zipf", prompt, args.softcap)
        groups = tuple(args.groups or GROUPS)
        plan = [Job(1.0, Task(case, groups, dtype)) for dtype in args.dtypes or ["bfloat16"]]
    else:
        plan = select(cuda_plan() if cuda else cpu_plan(), args.groups, args.dtypes)
    asked = {"providers": tuple(args.providers or ()), "repeats": args.repeats}
    changes = {name: value for name, value in asked.items() if value}
    changes |= {"memory": False} if args.no_memory else {}
    return [replace(j, task=j.task and replace(j.task, **changes)) for j in plan]


def run(plan: Sequence[Job], budget: float, out: Path, env: dict, log: IO[str]) -> list[Row]:
    """Measure a plan, keeping results.json in `out` current; then the table and the plots."""

    def execute(job: Job, seconds: float) -> list[Row]:
        what = f"{job.name(job.groups[0])} {job.dtype}: {', '.join(job.groups)}"
        print(what, file=sys.stderr, flush=True)
        return in_process(job, seconds, log)

    def keep(rows: list[Row]) -> None:
        write_json(out / "results.json", rows, env)

    rows = run_plan(plan, budget, execute, after=keep)
    (out / "table.md").write_text(document(rows, env), encoding="utf-8")
    try:
        from benchmarks.plot import plot

        plot(out, out)
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    env = environment()
    plan = chosen_plan(args, env["machine"]["gpu"] is not None)
    part = bool(args.groups or args.case or args.dtypes or args.providers or args.no_memory)
    out = args.out or (ROOT / "runs" / "bench" if part else RESULTS) / machine_slug(env["machine"])
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        rows = run(plan, args.budget, out, env, log)
    failed = [r for r in rows if "failed with status" in r.note]
    if failed:
        print((out / "log.txt").read_text(encoding="utf-8")[-4000:], file=sys.stderr)
    print_table(rows)
    print(f"written: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
