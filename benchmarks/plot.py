"""python -m benchmarks plot FILE: ratio and memory bars of a results file, as PNG and SVG.

ratios: times over ours, a panel for each group and case, the ceiling as a line. memory: extra peak
of the same providers. The same file gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.render import ours_of
from benchmarks.rows import Row, ceiling_of, read_json

TITLES = {
    "trainable": "hidden-in, trainable head",
    "frozen": "hidden-in, frozen head",
    "forward": "hidden-in, no gradient",
    "logits": "logits-in, with gradient",
    "logits-forward": "logits-in, no gradient",
}
OURS_COLOUR, OTHER_COLOUR, CEILING_COLOUR = "#1b6ca8", "#b8bec6", "#c0392b"


def panels(rows: Sequence[Row]) -> list[list[Row]]:
    """The loss path's rows with times, one list a case, in the order of the file."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.group in TITLES and row.times:
            found.setdefault(row.key, []).append(row)
    return [p for p in found.values() if ours_of(p, p[0]) is not None]


def _title(row: Row) -> str:
    inputs = row.inputs.partition(" (")[0].partition(";")[0]
    return f"{TITLES[row.group]}, {row.dtype}\n{row.case}" + (f"\n{inputs}" if inputs else "")


def _bars(axis, names: list[str], values: list[float], rows: list[Row], labels: list[str]) -> None:
    at = range(len(names))
    axis.barh(at, values, color=[OURS_COLOUR if r.is_ours else OTHER_COLOUR for r in rows])
    axis.set_yticks(at, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(max(values), 1e-9))
    for y, (value, label) in enumerate(zip(values, labels, strict=True)):
        axis.text(value, y, f" {label}", va="center", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _ratios(axis, rows: list[Row]) -> None:
    ours, ceiling = ours_of(rows, rows[0]), ceiling_of(rows, rows[0])
    shown = [r for r in rows if not r.is_ceiling]
    values = [r.best / ours.best for r in shown]
    _bars(axis, [r.provider for r in shown], values, shown, [f"{v:.2f}" for v in values])
    axis.set_xlabel("time over ours", fontsize=8)
    if ceiling is not None:
        line = ceiling.best / ours.best
        axis.axvline(
            line, color=CEILING_COLOUR, linewidth=1.2, label=f"{ceiling.provider}: {line:.2f}"
        )
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def _memory(axis, rows: list[Row]) -> None:
    shown = [r for r in rows if r.extra_peak is not None]
    values = [r.extra_peak / 2**20 for r in shown]
    _bars(axis, [r.provider for r in shown], values, shown, [f"{v:.0f}" for v in values])
    axis.set_xlabel("extra peak memory, MiB", fontsize=8)


@contextlib.contextmanager
def canvas(
    panels: int, columns: int, size: tuple[float, Sequence[float]], path: Path, text: str = "none"
) -> Iterator[tuple]:
    """A figure and the axes of its panels, written as PNG and SVG when the block ends.

    Args:
        size: width of a column, and height of each line.
        text: "none" keeps the SVG's text as text, "path" draws it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width, heights = size
    with matplotlib.rc_context({"svg.hashsalt": "sppo-kernels", "svg.fonttype": text}):
        fig, axes = plt.subplots(
            len(heights), columns, figsize=(width * columns, sum(heights)), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[panels:]:
            axis.remove()
        yield fig, axes.flat[:panels]
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            fig.savefig(path.with_suffix(f".{kind}"), dpi=130, metadata=metadata)
        plt.close(fig)


def figure(groups: list[list[Row]], draw, path: Path) -> list[Path]:
    """Draw one panel a group and write PNG and SVG beside each other."""
    columns = min(2, len(groups))
    heights = [
        0.27 * max(len(g) for g in groups[at : at + columns]) + 1.3
        for at in range(0, len(groups), columns)
    ]
    with canvas(len(groups), columns, (6.2, heights), path) as (_, axes):
        for axis, rows in zip(axes, groups, strict=True):
            draw(axis, rows)
            axis.set_title(_title(rows[0]), fontsize=9, loc="left")
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def plot(file: Path, out: Path) -> list[Path]:
    """Write ratios.* and memory.* to the folder `out`; what has no rows is left out."""
    found = panels(read_json(file)[0])
    out.mkdir(parents=True, exist_ok=True)
    written = figure(found, _ratios, out / "ratios") if found else []
    remembered = [g for g in found if any(r.extra_peak is not None for r in g)]
    return written + (figure(remembered, _memory, out / "memory") if remembered else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("file", type=Path, help="results file, or its folder")
    parser.add_argument("--out", type=Path, help="folder; that of the file without it")
    args = parser.parse_args(argv)
    folder = args.file if args.file.is_dir() else args.file.parent
    written = plot(args.file, args.out or folder)
    for path in written:
        print(path)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
