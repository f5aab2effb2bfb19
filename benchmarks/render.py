"""Results as a table: ratios to ours and to the ceiling of the same run, memory beside them.

Ratios are of the best times: other work on a machine only ever slows a call down. Medians and the
spread around them stand beside them, and all times are in the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.harness import Result

HEADER = (
    "group", "case", "dtype", "provider", "best", "median", "spread", "x ours", "x ceiling",
    "memory",
)  # fmt: skip


def is_ceiling(result: Result) -> bool:
    return result.provider.startswith(("bare GEMMs", "copy of"))


def rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row a result, in the order of HEADER; a provider that is absent says why."""
    results = list(results)
    out = []
    for r in results:
        same = [q for q in results if (q.group, q.case, q.dtype) == (r.group, r.case, r.dtype)]
        ours = next((q.best for q in same if q.provider.startswith("sppo-kernels")), None)
        ceiling = next((q.best for q in same if is_ceiling(q)), None)
        if r.median is None:
            out.append((r.group, r.case, r.dtype, r.provider, r.note, *[""] * 5))
            continue
        spread = (max(r.times) - min(r.times)) / r.median
        out.append(
            (
                r.group,
                r.case,
                r.dtype,
                r.provider,
                f"{r.best * 1e3:.1f} ms",
                f"{r.median * 1e3:.1f} ms",
                f"±{50 * spread:.0f} %",
                f"{r.best / ours:.2f}" if ours else "",
                f"{r.best / ceiling:.2f}" if ceiling else "",
                f"{r.extra_peak / 2**20:.0f} MiB" if r.extra_peak is not None else "",
            )
        )
    return out


def markdown(results: Iterable[Result]) -> str:
    """A Markdown table of all results."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join(lines) + "\n"


def print_table(results: Iterable[Result]) -> None:
    """The table on a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(results))
        return
    table = Table(*HEADER)
    for row in rows(results):
        table.add_row(*row)
    Console(width=160).print(table)
