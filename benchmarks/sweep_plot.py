"""Plots of a sweep file on logarithmic axes: best times, spread as bars, fitted exponents."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.plot import canvas

_COLOURS = ("#1b6ca8", "#7a7a7a", "#c44536", "#3a7d44")
_X = {"prompt share": "rows that count", "length spread": "padded rows"}


def plot(data: dict, stem: Path) -> None:
    """Write STEM.png and STEM.svg from what `benchmarks.sweeps` wrote."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in data["rows"]))
    exponents = {
        (f["sweep"], f["provider"]): f["exponent"]
        for f in data["fits"]
        if f["quantity"] == "seconds"
    }
    columns = min(3, max(1, len(sweeps)))
    heights = [3.4] * max(1, -(-len(sweeps) // columns))
    with canvas(len(sweeps), columns, (4.2, heights), stem, "path") as (figure, axes):
        for axis, sweep in zip(axes, sweeps, strict=True):
            mine = [r for r in data["rows"] if r["sweep"] == sweep and r["times"]]
            providers = dict.fromkeys(r["provider"] for r in mine)
            for colour, provider in zip(itertools.cycle(_COLOURS), providers, strict=False):
                found = sorted((r for r in mine if r["provider"] == provider), key=lambda r: r["x"])
                best = [min(r["times"]) * 1e3 for r in found]
                above = [max(r["times"]) * 1e3 - b for r, b in zip(found, best, strict=True)]
                exponent = exponents.get((sweep, provider))
                label = provider if exponent is None else f"{provider}, exponent {exponent:.2f}"
                axis.errorbar(
                    [r["x"] for r in found], best, yerr=[[0] * len(best), above], color=colour,
                    marker="o", label=label, markersize=4, linewidth=1.3, capsize=2,
                )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(_X.get(sweep, sweep))
            axis.set_ylabel("ms, best to worst")
            axis.set_title(sweep, fontsize=10)
            if mine:
                axis.legend(fontsize=6.5)
        machine = data["machine"]
        figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {data['date'][:10]}", fontsize=9)
