"""python -m benchmarks compare A B: what is slower in B than in A, beyond the spread.

A row's figure is its best time over the best time of the ceiling measured in turn with it; where
there is no ceiling, or with --absolute, the best time itself. How far a figure may move is the sum,
over the times that enter it in both runs, of (median − best) / best: how much other work slowed a
typical call of that run. Never less than the floor (5 %), nor less than twice the floor when a
row has fewer than three times. B's figure beyond A's by more is a regression; so is extra memory
that grew by more than 5 % and 8 MiB, and a row that A has and B has not. Exit status 1 tells.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.render import table
from benchmarks.rows import Row, ceiling_of, read_json

FLOOR = 0.05
MEMORY_FLOOR = 8 << 20
BAD = ("slower", "more memory", "gone")
HEADER = ("group", "case", "dtype", "provider", "A", "B", "change", "allowed", "verdict")


@dataclass(frozen=True)
class Change:
    """One row in both runs: change = B / A − 1, allowed = what the spread explains."""

    row: Row
    a: float | None
    b: float | None
    allowed: float
    verdict: str

    @property
    def change(self) -> float | None:
        return None if self.a is None or self.b is None else self.b / self.a - 1

    @property
    def bad(self) -> bool:
        return self.verdict in BAD


def noise(times: Sequence[float]) -> float:
    """How far a typical call lies above the best one, relative to it."""
    best, middle = min(times), sorted(times)[len(times) // 2]
    return (middle - best) / best


def figure(rows: Sequence[Row], row: Row, absolute: bool) -> tuple[float, float]:
    """A row's time in units of its ceiling (or seconds), and the noise of what enters it."""
    ceiling = None if absolute or row.is_ceiling else ceiling_of(rows, row)
    if ceiling is None:
        return row.best, noise(row.times)
    return row.best / ceiling.best, noise(row.times) + noise(ceiling.times)


def compare(
    a: Sequence[Row], b: Sequence[Row], *, floor: float = FLOOR, absolute: bool = False
) -> list[Change]:
    """Every row of either run, with a verdict: agrees, slower, faster, more memory, gone, new.

    Ceilings are compared in seconds only with `absolute`; else they are the measure.
    """
    other = {(r.key, r.provider): r for r in b}
    out = []
    for row in a:
        match = other.pop((row.key, row.provider), None)
        if not row.times:
            if match is not None and match.times:
                out.append(Change(match, None, figure(b, match, absolute)[0], 0.0, "new"))
            continue
        mine, my_noise = figure(a, row, absolute)
        if match is None or not match.times:
            out.append(Change(match or row, mine, None, 0.0, "gone"))
            continue
        theirs, their_noise = figure(b, match, absolute)
        few = min(len(row.times), len(match.times)) < 3
        allowed = max(floor * (2 if few else 1), my_noise + their_noise)
        verdict = "agrees"
        if row.is_ceiling and not absolute:
            verdict = "measure"
        elif theirs > mine * (1 + allowed):
            verdict = "slower"
        elif theirs * (1 + allowed) < mine:
            verdict = "faster"
        if verdict in ("agrees", "faster") and _more_memory(row, match, floor):
            verdict = "more memory"
        out.append(Change(match, mine, theirs, allowed, verdict))
    out += [
        Change(r, None, figure(b, r, absolute)[0], 0.0, "new") for r in other.values() if r.times
    ]
    return out


def _more_memory(a: Row, b: Row, floor: float) -> bool:
    if a.extra_peak is None or b.extra_peak is None:
        return False
    return b.extra_peak > a.extra_peak * (1 + floor) + MEMORY_FLOOR


def cells(change: Change) -> tuple[str, ...]:
    row = change.row

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    verdict = change.verdict
    if verdict == "gone" and row.note:
        verdict = f"gone: {row.note}"
    moved = change.change
    return (
        row.group, row.case, row.dtype, row.provider, number(change.a), number(change.b),
        "" if moved is None else f"{100 * moved:+.0f} %", f"{100 * change.allowed:.0f} %", verdict,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", type=Path, help="results file, or its folder: the one before")
    parser.add_argument("b", type=Path, help="results file, or its folder: the one after")
    parser.add_argument("--floor", type=float, default=FLOOR, help="least change that counts")
    parser.add_argument("--absolute", action="store_true", help="seconds, not shares of a ceiling")
    parser.add_argument("--all", action="store_true", help="show the rows that agree, too")
    args = parser.parse_args(argv)
    a, b = (read_json(file)[0] for file in (args.a, args.b))
    changes = compare(a, b, floor=args.floor, absolute=args.absolute)
    shown = [c for c in changes if args.all or c.verdict not in ("agrees", "measure")]
    if shown:
        print(table(HEADER, map(cells, shown)))
    counts = Counter(c.verdict for c in changes)
    print(", ".join(f"{n} {v}" for v, n in counts.items()) or "nothing to compare")
    return int(any(c.bad for c in changes))


if __name__ == "__main__":
    sys.exit(main())
