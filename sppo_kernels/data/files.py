"""Files of rows: Parquet and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sppo_kernels.files import atomic_file
from sppo_kernels.optional import require


class DataError(ValueError):
    """A row or a file of preference data cannot be used; the message names row and column."""


def write_parquet(rows: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write rows to a Parquet file that is there whole or not at all (also on a full disk)."""
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


def read_parquet(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a Parquet file.

    Raises:
        DataError: the file is missing, damaged, or no Parquet file; the message names it.
    """
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """One JSON value a line; empty lines do not count.

    Raises:
        DataError: the file is missing or a line is no JSON; the message names it.
    """
    try:
        lines = Path(path).read_text().splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines ({error})") from error


def load_rows(source: Any) -> Iterator[Mapping[str, Any]]:
    """Rows of a Parquet or JSON-lines path, a datasets.Dataset, or a list of dicts."""
    if isinstance(source, (str, os.PathLike)):
        json_lines = Path(source).suffix in (".json", ".jsonl")
        return iter((read_json_lines if json_lines else read_parquet)(source))
    return iter(source)
