"""Measures preference games on the CPU against eager torch, evalica, choix, nashpy and scipy.

    python -m benchmarks games [--games 100000] [--threads 1] [--json PATH]

Every figure passes a correctness check first. Competitors run in turns within one process. With one
thread (the default) the clock is the CPU time of that thread: what a core spends on a game. Peers
take one game a call, so they are timed on a sample; all times are divided by their games.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import game_timing
from benchmarks.game_cases import (
    measure_aggregate,
    measure_bradley_terry,
    measure_large_nash,
    measure_linearity,
    measure_nash,
    measure_targets,
    measure_tournament,
)
from benchmarks.memory import forked
from benchmarks.rows import Row, environment, write_json

SPENT = "not measured: the time budget was spent"


def plan(games: int) -> list[Callable[[], list[Row]]]:
    """What is measured, the most important first."""
    tenth = max(20, games // 10)
    return [
        lambda: measure_targets(games, 5),
        lambda: measure_nash(games, 5),
        lambda: measure_targets(games, 16),
        lambda: measure_nash(tenth, 16),
        lambda: measure_bradley_terry(games, 5),
        lambda: measure_aggregate(games, 5, 20),
        lambda: measure_bradley_terry(tenth, 16),
        lambda: measure_aggregate(tenth, 16, 240),
        lambda: measure_nash(max(20, tenth // 10), 32, 5),
        measure_large_nash,
        lambda: measure_tournament(tenth, 5),
        lambda: measure_tournament(tenth, 16),
        lambda: measure_linearity(games=max(20, games // 50)),
    ]


def measure(games: int, seconds: float | None = None) -> list[Row]:
    """All rows; what the time did not suffice for becomes one row that says so."""
    end = None if seconds is None else time.monotonic() + seconds
    rows: list[Row] = []
    steps = plan(games)
    for number, step in enumerate(steps):
        if end is not None and time.monotonic() > end:
            left = f"{len(steps) - number} of {len(steps)} cases"
            rows.append(Row("games", left, "float64", "all providers", note=SPENT))
            break
        rows += step()
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks games", description=__doc__)
    parser.add_argument("--games", type=int, default=100_000, help="prompts a batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--seconds", type=float, help="time budget")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.threads == 1 and sys.platform.startswith("linux"):  # only then fit to be forked
        game_timing.remember = lambda call: forked(lambda: game_timing.second_call_peak(call))
    rows = measure(args.games, args.seconds)
    if args.json:
        write_json(args.json, rows, environment())
    from benchmarks.render import compact

    print(compact(rows, 80))
    return 0


if __name__ == "__main__":
    sys.exit(main())
