"""Rows of preference data: files, canonical rows, token ids, batches."""

from sppo_kernels.data.rows import (
    DataError,
    OverLengthError,
    canonical_row,
    from_uclaml,
    load_rows,
    read_parquet,
    to_uclaml,
    write_parquet,
)

__all__ = [
    "DataError",
    "OverLengthError",
    "canonical_row",
    "from_uclaml",
    "load_rows",
    "read_parquet",
    "to_uclaml",
    "write_parquet",
]
