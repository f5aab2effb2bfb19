"""Stages of work in parts that are written whole, so that a killed run loses at most one part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sppo_kernels.data.rows import DataError, read_parquet, write_parquet
from sppo_kernels.files import read_json, write_json


def derive_seed(*parts: Any) -> int:
    """A seed that depends on all of `parts` and on nothing else."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def in_parts(
    items: Sequence[Any],
    size: int,
    path: str | Path,
    work: Callable[[Sequence[Any], int], list[dict[str, Any]]],
    title: str,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rows of `work(items[a:b], part)` for all parts, in one Parquet file at `path`.

    Finished parts lie beside `path` until all are; a later call goes on after them. When `path` is
    there, its rows are returned and nothing is done.
    """
    path = Path(path)
    if path.exists():
        return read_parquet(path)
    from tqdm import tqdm

    folder = path.with_name(path.stem + ".parts")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(items), desc=title, disable=quiet) as bar:
        for part, start in enumerate(range(0, len(items), size)):
            file = folder / f"{part:06d}.parquet"
            chunk = items[start : start + size]
            if not file.exists():
                write_parquet(work(chunk, part), file)
            rows += read_parquet(file)  # new ones too, as a resumed run would see them
            bar.update(len(chunk))
    write_parquet(rows, path)
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def same_settings(path: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Write the settings of a run, or refuse to go on with other ones.

    A run that was started before a setting existed had that setting's default.

    Raises:
        DataError: the run in this folder was started with other settings; names them.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        write_json(settings, path)
        return
    saved = defaults | read_json(path)
    names = sorted(set(saved) | set(settings))
    different = [n for n in names if saved.get(n) != settings.get(n)]
    if different:
        name = different[0]
        raise DataError(
            f"{path.parent}: was started with other {', '.join(different)} ({name}: "
            f"{saved.get(name)!r} then, {settings.get(name)!r} now); use another folder"
        )
