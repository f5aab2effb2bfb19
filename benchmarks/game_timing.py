"""How games are timed: in turns, a core's time by the game, memory in a process of its own."""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable

import torch

from benchmarks.harness import resident_extra_peak
from benchmarks.rows import OURS, Refused, Row

NATIVE = f"{OURS} native"
# What measures a call's extra memory; set by a process that is fit to be forked.
remember: Callable[[Callable[[], object]], int | None] | None = None


def timed(calls: dict[str, tuple[Callable[[], object], int]], turns: int) -> dict[str, list[float]]:
    """Seconds a game of each call over `turns` rounds in which every call has one turn.

    Args:
        calls: the call and the number of games it plays, by provider.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()
    for _ in range(turns):
        for name, (call, games) in calls.items():
            start = clock()
            call()
            times[name].append(max(clock() - start, 1e-9) / games)
    return times


def rows_of(
    case: str,
    calls: dict[str, tuple[Callable[[], object], int]],
    turns: int,
    *,
    dtype: str = "float64",
    inputs: str,
    errors: dict[str, float] | None = None,
    absent: dict[str, str] | None = None,
    per: str = "game",
) -> list[Row]:
    """Time the calls in turn; `absent` names providers that cannot run, and why."""
    most = max(games for _, games in calls.values())
    rows = []
    for name, times in timed(calls, turns).items():
        call, games = calls[name]
        rows.append(
            Row(
                "games", case, dtype, name, times=times, inputs=inputs, per=per,
                error=(errors or {}).get(name), extra_peak=remember(call) if remember else None,
                note="" if games == most else f"timed on {games} of them",
            )
        )  # fmt: skip
    return rows + [
        Row("games", case, dtype, name, note=f"cannot run: {why}", inputs=inputs, per=per)
        for name, why in (absent or {}).items()
    ]


def second_call_peak(call: Callable[[], object]) -> int:
    """Extra memory of a call after a first one that loads its code."""
    call()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_extra_peak(call)


def missing(*packages: str) -> dict[str, str]:
    """Those of the packages that are not installed, with the words that say so."""
    return {
        name: f"{name} is not installed"
        for name in packages
        if importlib.util.find_spec(name) is None
    }


def within(what: str, error: float, limit: float) -> float:
    """The error, if it is at most the limit.

    Raises:
        Refused: it is not, or it is NaN.
    """
    if not error <= limit:
        raise Refused(f"{what}: wrong by {error:.1e}, more than {limit:.0e}")
    return error


def times_faster(rows: list[Row], provider: str) -> float:
    """How many times as long as ours a provider's best game takes."""
    best = {r.provider: r.best for r in rows}
    return best[provider] / best[NATIVE]
