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

import torch

from benchmarks import game_cases as cases
from benchmarks.game_cases import GameCase
from benchmarks.harness import LINUX, SPENT, Call, extra_peak, forked
from benchmarks.render import finish, outputs
from benchmarks.rows import Row


def plan(games: int) -> list[tuple[int, Callable[[], list[GameCase]]]]:
    """Turns and cases, the most important first."""
    tenth, fiftieth = max(20, games // 10), max(20, games // 50)
    return [
        (15, lambda: [cases.targets_case(games, 5)]),
        (9, lambda: [cases.nash_case(games, 5)]),
        (15, lambda: [cases.targets_case(games, 16)]),
        (9, lambda: [cases.nash_case(tenth, 16)]),
        (7, lambda: [cases.bradley_terry_case(games, 5)]),
        (7, lambda: [cases.aggregate_case(games, 5, 20)]),
        (7, lambda: [cases.bradley_terry_case(tenth, 16)]),
        (7, lambda: [cases.aggregate_case(tenth, 16, 240)]),
        (5, lambda: [cases.nash_case(max(20, tenth // 10), 32)]),
        (3, lambda: [cases.nash_case(4, 128, peers=False, methods=("simplex", "mirror"))]),
        (5, lambda: [cases.tournament_case(tenth, 5)]),
        (5, lambda: [cases.tournament_case(tenth, 16)]),
        (7, lambda: cases.linearity_cases(games=fiftieth)),
    ]


def in_a_fork(call: Call) -> int | None:
    """Extra memory of a call after a first one that loads its code, in a forked process."""

    def second() -> int:
        call()
        return extra_peak(call)

    return forked(second)


def measure(games: int, seconds: float | None = None, memory: bool = False) -> list[Row]:
    """All rows; what the time did not suffice for becomes one row that says so."""
    end = None if seconds is None else time.monotonic() + seconds
    remember = in_a_fork if memory else lambda call: None
    rows: list[Row] = []
    steps = plan(games)
    for number, (turns, make) in enumerate(steps):
        if end is not None and time.monotonic() > end:
            left = f"{len(steps) - number} of {len(steps)} cases"
            rows.append(Row("games", left, "float64", "all providers", note=SPENT))
            break
        for case in make():
            rows += case.measure(turns, memory=remember)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks games", description=__doc__)
    parser.add_argument("--games", type=int, default=100_000, help="prompts a batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides")
    args = outputs(parser).parse_args(argv)
    torch.set_num_threads(args.threads)
    # only one thread is fit to be forked
    finish(measure(args.games, args.seconds, args.threads == 1 and LINUX), args.json, 80)
    return 0


if __name__ == "__main__":
    sys.exit(main())
