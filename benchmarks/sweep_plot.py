"""Plots of a sweep file on logarithmic axes: best times, spread as bars, fitted exponents."""

from __future__ import annotations

from pathlib import Path

_COLOURS = ("#1b6ca8", "#7a7a7a", "#c44536", "#3a7d44")


def plot(data: dict, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg from what `benchmarks.sweeps` wrote; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sppo-kernels"  # the same file from the same data
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(row["sweep"] for row in data["rows"]))
    columns = min(3, max(1, len(sweeps)))
    lines = max(1, -(-len(sweeps) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    exponents = {
        (f["sweep"], f["provider"]): f["exponent"]
        for f in data["fits"]
        if f["quantity"] == "seconds"
    }
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        mine = [r for r in data["rows"] if r["sweep"] == sweep and r["times"]]
        for colour, provider in zip(
            _COLOURS * 2, dict.fromkeys(r["provider"] for r in mine), strict=False
        ):
            found = sorted((r for r in mine if r["provider"] == provider), key=lambda r: r["x"])
            x = [r["x"] for r in found]
            best = [min(r["times"]) * 1e3 for r in found]
            above = [max(r["times"]) * 1e3 - b for r, b in zip(found, best, strict=True)]
            exponent = exponents.get((sweep, provider))
            label = provider if exponent is None else f"{provider}, exponent {exponent:.2f}"
            axis.errorbar(
                x, best, yerr=[[0] * len(x), above], color=colour, marker="o", label=label,
                markersize=4, linewidth=1.3, capsize=2,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(
            {"prompt share": "rows that count", "length spread": "padded rows"}.get(sweep, sweep)
        )
        axis.set_ylabel("ms, best to worst")
        axis.set_title(sweep, fontsize=10)
        if mine:
            axis.legend(fontsize=6.5)
    machine = data["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {data['date'][:10]}", fontsize=9)
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in files:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
    return files
