"""python -m benchmarks run: the whole suite within a time budget, the most important cases first.

Every case runs in a process of its own (what it times in turn shares that process), so that a crash
or a spent budget costs one case. What did not fit is a row that says so. Writes results.json,
table.md and plots to a folder, by default benchmarks/results/<machine>/ for the whole suite, and
runs/bench/<machine>/ when an option picks a part of it. What the processes say goes to log.txt.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from benchmarks.rows import RESULTS, ROOT, Row, environment, machine_slug, read_json, write_json

LOSS_GROUPS = ("trainable", "frozen", "forward", "logits", "logits-forward")
ALL_GROUPS = (*LOSS_GROUPS, "games", "trainer")
SPENT = "not measured: the time budget was spent"
LEAST = 12.0  # seconds; with less left a case is not begun
# On two cores ten minutes do not suffice for what says least.
CPU_WITHOUT = ("reference", "cross_entropy, sum")
SLOWEST = ("linear_cross_entropy",)  # memory of these would take a tenth of the budget
COMPILED = ("torch.compile", "Liger", "CCE")  # compiled once more to measure their memory


@dataclass(frozen=True)
class Job:
    """One process: some groups of one case. `share` of the budget is the most it may take."""

    module: str
    groups: tuple[str, ...]
    title: str
    dtype: str = "float32"
    options: tuple[str, ...] = ()
    share: float = 1.0

    def command(self, out: Path, seconds: float) -> list[str]:
        return [
            sys.executable, "-m", self.module, *self.options, "--json", str(out),
            "--seconds", f"{seconds:.0f}",
        ]  # fmt: skip

    def absent(self, note: str, groups: Sequence[str] | None = None) -> list[Row]:
        """Rows that say why the groups were not measured."""
        chosen = self.groups if groups is None else groups
        return [Row(g, self.title, self.dtype, "all providers", note=note) for g in chosen]


def loss_job(
    shape: Sequence[int],
    groups: Sequence[str],
    dtype: str = "bfloat16",
    *,
    inputs: str = "zipf",
    prompt: float = 0.25,
    softcap: float | None = None,
    providers: Sequence[str] = (),
    without: Sequence[str] = (),
    memory_without: Sequence[str] = (),
    repeats: int = 3,
    share: float = 1.0,
    memory: bool = True,
) -> Job:
    """A job of benchmarks.core: `shape` is N, D, V."""
    rows, dim, vocab = map(str, shape)
    options = [
        "--case", rows, dim, vocab, "--groups", *groups, "--dtype", dtype, "--inputs", inputs,
        "--prompt-share", str(prompt), "--repeats", str(repeats),
    ]  # fmt: skip
    options += ["--softcap", str(softcap)] if softcap else []
    options += ["--providers", *providers] if providers else []
    options += ["--without", *without] if without else []
    options += ["--memory-without", *memory_without] if memory_without else []
    options += [] if memory else ["--no-memory"]
    title = f"N={rows} V={vocab} D={dim}" + (f" softcap={softcap:g}" if softcap else "")
    return Job("benchmarks.core", tuple(groups), title, dtype, tuple(options), share)


def cpu_plan() -> list[Job]:
    """Two cores, ten minutes: the shape of docs/decisions.md, then the games and the trainer."""
    shape, few = (2048, 1024, 50304), ("native", "eager")
    lean = {"without": (*CPU_WITHOUT, "linear_cross_entropy", "Liger"), "memory_without": COMPILED}
    return [
        loss_job(
            shape, ["trainable"], without=CPU_WITHOUT, memory_without=SLOWEST, share=0.45
        ),
        loss_job(shape, ["logits", "logits-forward"], repeats=7, without=CPU_WITHOUT, share=0.15),
        Job("benchmarks.games", ("games",), "K=5 and K=16", share=0.15),
        loss_job(shape, ["frozen"], **lean, share=0.3),
        loss_job(shape, ["forward"], **lean, share=0.3),
        Job(
            "benchmarks.trainer_step", ("trainer",), "Llama", options=("--steps", "3"), share=0.25
        ),
        loss_job(
            shape, ["trainable", "frozen", "forward"], prompt=0.0, providers=few, share=0.35,
            memory=False,
        ),
        loss_job(shape, ["logits"], inputs="flat", providers=few, share=0.1, memory=False),
        loss_job(shape, ["trainable"], "float32", prompt=0.0, providers=few, without=["float32"],
                 share=0.3, memory=False),
    ]  # fmt: skip


def cuda_plan() -> list[Job]:
    """The shapes by which the kernels are judged, every row counting, then inputs as in life."""
    first = (8192, 4096, 128256)
    return [
        loss_job(first, ["trainable", "frozen", "forward"], prompt=0.0, repeats=10, share=0.4),
        loss_job(first, ["logits", "logits-forward"], prompt=0.0, repeats=10, share=0.2),
        loss_job((8192, 896, 151936), ["trainable", "frozen"], prompt=0.0, repeats=10, share=0.25),
        loss_job((16384, 2048, 128256), ["trainable"], prompt=0.0, repeats=10, share=0.25),
        loss_job(
            (4096, 3584, 256000), ["trainable"], prompt=0.0, softcap=30.0, repeats=10, share=0.25
        ),
        loss_job(first, ["trainable", "frozen"], repeats=10, share=0.25),
        loss_job(first, ["logits"], prompt=0.0, inputs="flat", repeats=10, share=0.15),
        Job("benchmarks.games", ("games",), "K=5 and K=16", share=0.2),
    ]


def select(plan: Sequence[Job], groups: Sequence[str], dtypes: Sequence[str]) -> list[Job]:
    """The plan's jobs, cut down to some groups and dtypes; all where a list is empty."""
    out = []
    for job in plan:
        kept = tuple(g for g in job.groups if not groups or g in groups)
        loss = job.module == "benchmarks.core"
        if not kept or (loss and dtypes and job.dtype not in dtypes):
            continue
        options = list(job.options)
        if loss:
            at = options.index("--groups") + 1
            options[at : at + len(job.groups)] = kept
        out.append(replace(job, groups=kept, options=tuple(options)))
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
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
            why = f"not measured: the process failed with status {status}, see log.txt"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the job and what it started
            process.wait()
            why = SPENT
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        rows = read_json(out)[0] if out.exists() else []
    found = {row.group for row in rows}
    return rows + job.absent(why, [g for g in job.groups if g not in found])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument("--budget", type=float, default=575.0, help="seconds (default 575)")
    parser.add_argument("--groups", nargs="+", choices=ALL_GROUPS, default=[])
    parser.add_argument("--case", nargs=3, type=int, metavar=("N", "D", "V"), help="one shape")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--providers", nargs="+", help="those whose name has one of these words")
    parser.add_argument("--inputs", choices=("zipf", "flat"), help="with --case")
    parser.add_argument("--prompt-share", type=float, help="with --case; 0: every row counts")
    parser.add_argument("--softcap", type=float, help="with --case")
    parser.add_argument("--repeats", type=int, help="timed calls of each provider")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and plots")
    args = parser.parse_args(argv)
    if not args.case and (args.inputs or args.prompt_share is not None or args.softcap):
        parser.error("--inputs, --prompt-share and --softcap go with --case")
    return args


def chosen_plan(args: argparse.Namespace, cuda: bool) -> list[Job]:
    """The jobs that the options ask for."""
    if args.case:
        groups = args.groups or LOSS_GROUPS
        plan = [
            loss_job(
                args.case, groups, dtype, inputs=args.inputs or "zipf", softcap=args.softcap,
                prompt=0.25 if args.prompt_share is None else args.prompt_share,
            )
            for dtype in args.dtypes or ["bfloat16"]
        ]  # fmt: skip
    else:
        plan = select(cuda_plan() if cuda else cpu_plan(), args.groups, args.dtypes or [])
    more = ["--no-memory"] if args.no_memory else []
    more += ["--repeats", str(args.repeats)] if args.repeats else []
    more += ["--providers", *args.providers] if args.providers else []
    return [
        replace(j, options=(*j.options, *more)) if j.module == "benchmarks.core" else j
        for j in plan
    ]


def run(plan: Sequence[Job], budget: float, out: Path, env: dict, log: IO[str]) -> list[Row]:
    """Measure a plan, keeping results.json in `out` current; then the table and the plots."""
    from benchmarks.render import document

    def execute(job: Job, seconds: float) -> list[Row]:
        print(f"{job.title} {job.dtype}: {', '.join(job.groups)}", file=sys.stderr, flush=True)
        return in_process(job, seconds, log)

    def keep(rows: list[Row]) -> None:
        write_json(out / "results.json", rows, env)

    rows = run_plan(plan, budget, execute, after=keep)
    (out / "table.md").write_text(document(rows, env), encoding="utf-8")
    try:
        from benchmarks.plot import plot

        plot(out / "results.json", out)
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
    from benchmarks.render import print_table

    print_table(rows)
    print(f"written: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
