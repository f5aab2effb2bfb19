"""Everything that needs a GPU, in one command without network: build, test, measure, report.

    python -m benchmarks gpu --out FOLDER [--budget 480]

Works with the machine's own Python, torch and triton. Peers that are not installed are rows that
say so. Stops by itself within the budget: cases run in order of importance, each in a process of
its own, and what did not fit is a row that says so; time that is left tunes kernel configurations.
FOLDER gets results.json, table.md, plots, tests.xml, tuned.json and log.txt; a table of at most 60
lines is printed last.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from benchmarks.harness import Process
from benchmarks.render import compact
from benchmarks.rows import ROOT, Row, environment
from benchmarks.suite import Job, cuda_plan, run, select

BUILD_SHARE, TEST_SHARE = 0.25, 0.35  # of the budget, at most
LINES = 60  # of what is printed
RESERVE = 10.0  # seconds kept for the table and the plots
LEAST_TUNING = 40.0  # with fewer seconds left, no configurations are tuned

# Runs a command for at most some seconds: its exit status, or None when the time was up.
Run = Callable[[Sequence[str], float], "int | None"]


def gpu_test_files() -> list[str]:
    """Test files with tests for a GPU: the others may import what a GPU machine lacks."""
    files = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("benchmarks/test_bench_*.py")])
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def runner(log: IO[str]) -> Run:
    """Commands with their output in `log`."""

    def call(command: Sequence[str], seconds: float) -> int | None:
        status, *_ = Process(*command, log=log).finish(max(1.0, seconds))
        return status

    return call


def outcome(status: int | None) -> str:
    return "ok" if status == 0 else "time was up" if status is None else f"failed ({status})"


def prepare(call: Run, out: Path, budget: float) -> tuple[bool, list[str]]:
    """Build the extension in place and run the tests marked gpu: whether both passed, and how."""
    built = call([sys.executable, "setup.py", "build_ext", "--inplace"], budget * BUILD_SHARE)
    tests = call(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
         f"--junitxml={out / 'tests.xml'}", *gpu_test_files()],
        budget * TEST_SHARE,
    )  # fmt: skip
    lines = [f"build: {outcome(built)}", f"tests marked gpu: {outcome(tests)}"]
    return built == 0 and tests == 0, lines


def report(summary: Sequence[str], rows: Sequence[Row], out: Path) -> str:
    """What is printed last: the summary and the table, LINES lines at most."""
    head = [*summary, f"written: {out}", ""]
    return "\n".join([*head, compact(rows, LINES - len(head))])


def measure(
    call: Run, plan: Sequence[Job], budget: float, out: Path, env: dict, log: IO[str],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[bool, str]:  # fmt: skip
    """All of it within the budget: whether everything passed, and the report."""
    end = clock() + budget
    passed, summary = prepare(call, out, budget)
    rows = run(plan, max(1.0, end - RESERVE - clock()), out, env, log)
    left = end - RESERVE - clock()
    if left >= LEAST_TUNING:  # last: the suite measures what is committed, not what is found here
        table = out / "tuned.json"
        command = [sys.executable, "-m", "sppo_kernels", "tune", "--out", str(table)]
        tuned = call([*command, "--budget", f"{0.8 * left:.0f}"], left)
        summary.append(f"tuned configurations: {outcome(tuned)}")
    summary.append(f"rows measured: {sum(bool(r.times) for r in rows)} of {len(rows)}")
    refused = [r for r in rows if r.note.startswith("refused") and r.is_ours]
    summary += [f"REFUSED {r.group} {r.case} {r.provider}: {r.note}" for r in refused]
    return passed and not refused, report(summary, rows, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds (default 480)")
    parser.add_argument("--groups", nargs="+", default=[], help="some groups of the plan only")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("SPPO_KERNELS_CUDA_ARCHS", f"{major}{minor}")
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        passed, text = measure(
            runner(log), select(cuda_plan(), args.groups, []), args.budget, out, environment(), log
        )
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
