"""Rows of a sweep, and the exponents fitted through them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass
class SweepRow(Row):
    """One provider at one point; `group` is the sweep and `value` what varies in it.

    x: what the exponent is fitted over, which for the prompt share is the rows that count, for the
    length spread the padded rows, and else the value itself.
    """

    value: float = 0.0
    x: float = 0.0

    @property
    def amount(self) -> float | None:
        """Operations, or bytes, of a call."""
        return self.flops or self.bytes

    def as_dict(self) -> dict:
        """The row as a sweep's file holds it."""
        names = ("case", "dtype", "provider", "times", "extra_peak", "error", "flops", "bytes")
        found = {"sweep": self.group, "value": self.value, "x": self.x}
        return found | {name: getattr(self, name) for name in (*names, "note")}


@dataclass
class Fit:
    """y ~ x^exponent by least squares in log-log; `expected` is that of the counted operations.

    quantity: "seconds" (the best of a point) or "extra_peak". r2: coefficient of determination.
    stderr: standard error of the exponent, None for fewer than three points.
    """

    sweep: str
    provider: str
    quantity: str
    exponent: float
    stderr: float | None
    r2: float
    points: int
    expected: float | None


def fit(quantity: str, rows: list[SweepRow]) -> Fit | None:
    """The exponent over one provider's rows that have it; None for fewer than two distinct x."""
    from scipy.stats import linregress

    name = {"seconds": "best"}.get(quantity, quantity)
    rows = [r for r in rows if getattr(r, name)]
    if len({r.x for r in rows}) < 2:
        return None
    log_x = [math.log(r.x) for r in rows]
    line = linregress(log_x, [math.log(getattr(r, name)) for r in rows])
    expected = None
    if quantity == "seconds" and all(r.amount for r in rows):
        expected = float(linregress(log_x, [math.log(r.amount) for r in rows]).slope)
    return Fit(
        rows[0].group, rows[0].provider, quantity, float(line.slope),
        float(line.stderr) if len(rows) > 2 else None, float(line.rvalue) ** 2, len(rows), expected,
    )  # fmt: skip


def fits(rows: list[SweepRow]) -> list[Fit]:
    """Fits of every sweep, provider and quantity."""
    lines: dict[tuple[str, str], list[SweepRow]] = {}
    for row in rows:
        lines.setdefault((row.group, row.provider), []).append(row)
    found = [fit(q, line) for line in lines.values() for q in ("seconds", "extra_peak")]
    return [f for f in found if f is not None]
