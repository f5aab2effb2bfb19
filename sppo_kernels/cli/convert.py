"""`sppo convert`: between this package's rows and the five columns of the released SPPO data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sppo_kernels.cli.options import OptionError, _help, needed, parse
from sppo_kernels.data.rows import canonical_row, from_uclaml, load_rows, to_uclaml, write_parquet


@dataclass
class ConvertOptions:
    """Files and direction."""

    input: str = _help("Parquet or JSON lines file.", "")
    output: str = _help("Parquet file to write.", "")
    to: str = _help("'uclaml' (the released columns) or 'sppo' (this package's rows).", "sppo")


def run(argv: Sequence[str]) -> None:
    (options,) = parse((ConvertOptions,), argv, "sppo convert", __doc__)
    needed(options, "input", "output")
    if options.to not in ("uclaml", "sppo"):
        raise OptionError(f"--to: expected 'uclaml' or 'sppo', got {options.to!r}")
    rows = list(load_rows(options.input))
    if options.to == "uclaml":
        found = to_uclaml(canonical_row(row, i) for i, row in enumerate(rows))
    else:
        found = from_uclaml(rows)
    write_parquet(found, options.output)
    print(
        f"{options.output}: {len(found)} rows, columns {', '.join(found[0]) if found else 'none'}"
    )
