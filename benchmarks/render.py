"""Results as a table: the share of the ceiling, ratios to ours, memory, rates.

Ratios are of the best times: other work on a machine only ever slows a call down. Medians and the
spread around them stand beside them, and all times are in the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.rows import Row, ceiling_ratio, environment, read_json, same_case, write_json

HEADER = (
    "group", "case", "dtype", "provider", "best", "median", "spread", "of ceiling", "x ours",
    "rate", "memory", "note",
)  # fmt: skip
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def seconds(value: float, per: str = "step") -> str:
    """A time in a readable unit, and what it is of when not of a step."""
    scale, unit = next((u for u in UNITS if value >= u[0]), UNITS[-1])
    text = f"{value / scale:.3g}" if value / scale < 100 else f"{value / scale:.0f}"
    return f"{text} {unit}" + ("" if per == "step" else f" a {per}")


def ours_of(rows: Iterable[Row], row: Row) -> Row | None:
    """Our fastest implementation among the rows measured in turn with `row`."""
    return next((r for r in same_case(rows, row) if r.is_ours and r.times), None)


def cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    """One row of the table, in the order of HEADER; a provider that is absent says why."""
    case = row.case
    if row.inputs.startswith(("zipf", "flat")):
        case += f", {row.inputs[:4]}" + (", all rows" if " all " in row.inputs else "")
    if not row.times:
        return (row.group, case, row.dtype, row.provider, *[""] * 7, row.note)
    ours, share = ours_of(rows, row), ceiling_ratio(rows, row)
    rate = ""
    if row.rate is not None:
        unit = (1e12, "TFLOP/s") if row.flops is not None else (1e9, "GB/s")
        rate = f"{row.rate / unit[0]:.3g} {unit[1]}"
    return (
        row.group, case, row.dtype, row.provider, seconds(row.best, row.per),
        seconds(row.median), f"±{100 * row.spread:.0f} %",
        "" if share is None else f"{100 * share:.0f} %",
        f"{row.best / ours.best:.2f}" if ours else "",
        rate,
        "" if row.extra_peak is None else f"{row.extra_peak / 2**20:.0f} MiB",
        row.note,
    )  # fmt: skip


def table(
    header: Sequence[str], rows: Iterable[Sequence], left: Sequence[str] | None = None
) -> str:
    """A Markdown table; with `left`, columns but the first and those are set to the right."""
    rule = ["---" if left is None or name in (header[0], *left) else "---:" for name in header]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])


def columns(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table for the terminal: the first column set to the left, the others to the right."""
    lines = [[*map(str, row)] for row in [header, *rows]]
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    layout = f"{{:<{first}}}" + "".join(f"  {{:>{width}}}" for width in widths)
    return "\n".join(layout.format(*line) for line in lines)


def markdown(results: Sequence[Row]) -> str:
    """A Markdown table of all results."""
    return table(HEADER, (cells(results, r) for r in results)) + "\n"


def document(results: Sequence[Row], env: dict) -> str:
    """The table with what it was measured on."""
    inputs = dict.fromkeys(r.inputs for r in results if r.inputs)
    return "\n".join(
        [
            markdown(results),
            "Of ceiling: the rate over that of the bare matrix products of the rows that count, or",
            "of a copy of the logits, in the same run. x ours: best time over our best time. Notes",
            "and schema: docs/benchmarks.md.",
            "",
            "Inputs: " + "; ".join(inputs) + ".",
            "",
            "```json",
            json.dumps(env, indent=1),
            "```",
            "",
        ]
    )


def compact(results: Sequence[Row], most: int = 50) -> str:
    """A table of fixed width without inputs and notes, of at most `most` lines."""
    layout = "{:<14} {:<34} {:<30} {:>9} {:>8} {:>7} {:>10}"
    lines = [layout.format("group", "case", "provider", "best", "ceiling", "x ours", "memory")]
    for row in results:
        c = dict(zip(HEADER, cells(results, row), strict=True))
        names = "best", "of ceiling", "x ours", "memory"
        shown = [c[name] for name in names] if row.times else [row.note[:37], "", "", ""]
        lines.append(layout.format(row.group, c["case"], row.provider, *shown).rstrip())
    if len(lines) > most:
        left = len(lines) - most + 1
        lines = [*lines[: most - 1], f"… {left} lines more in table.md"]
    return "\n".join(lines)


def print_table(results: Sequence[Row]) -> None:
    """The table on a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(results))
        return
    shown = Table(*HEADER)
    for row in results:
        shown.add_row(*cells(results, row))
    Console(width=200).print(shown)


def outputs(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that every suite has."""
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--seconds", type=float, help="time budget")
    return parser


def finish(results: Sequence[Row], path: Path | None, most: int = 50) -> None:
    """What every suite ends with: the file, if one is named, and the table."""
    if path:
        write_json(path, results, environment())
    print(compact(results, most))


def main(argv: list[str] | None = None) -> int:
    """python -m benchmarks render FILE: the Markdown table of a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="a file; standard output without it")
    args = parser.parse_args(argv)
    text = document(*read_json(args.file))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0
