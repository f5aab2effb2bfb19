"""Rows of a sweep, and the exponents fitted through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Row:
    """One provider at one point; times in seconds. Without times, `note` says why.

    x: what the exponent is fitted over, which for the prompt share is the rows that count, for the
    length spread the padded rows, and else the value itself.
    """

    sweep: str
    value: float
    x: float
    case: str
    dtype: str
    provider: str
    times: list[float] = field(default_factory=list)
    extra_peak: int | None = None
    error: float | None = None
    flops: float | None = None
    bytes: float | None = None
    note: str = ""


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


def fit(sweep: str, provider: str, quantity: str, rows: list[Row]) -> Fit | None:
    """The exponent over the rows that have the quantity; None for fewer than two distinct x."""
    from scipy.stats import linregress

    def of(row: Row) -> float | None:
        return min(row.times, default=None) if quantity == "seconds" else row.extra_peak

    found = [(r.x, of(r), r.flops or r.bytes) for r in rows if of(r)]
    if len({x for x, _, _ in found}) < 2:
        return None
    log_x = [math.log(x) for x, _, _ in found]
    line = linregress(log_x, [math.log(y) for _, y, _ in found])
    expected = None
    if quantity == "seconds" and all(amount for _, _, amount in found):
        expected = float(linregress(log_x, [math.log(a) for _, _, a in found]).slope)
    enough = len(found) > 2
    return Fit(
        sweep, provider, quantity, float(line.slope), float(line.stderr) if enough else None,
        float(line.rvalue) ** 2, len(found), expected,
    )  # fmt: skip


def fits(rows: list[Row]) -> list[Fit]:
    """Fits of every sweep, provider and quantity."""
    keys = dict.fromkeys((r.sweep, r.provider) for r in rows)
    found = []
    for sweep, provider in keys:
        mine = [r for r in rows if (r.sweep, r.provider) == (sweep, provider)]
        found += [fit(sweep, provider, quantity, mine) for quantity in ("seconds", "extra_peak")]
    return [f for f in found if f is not None]
