"""Files and folders that are there whole or not at all, also after a kill or on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file is not what it should be; the message names it."""


class atomic_file:
    """A temporary path beside `path` that takes its place when the block ends without error."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise OSError(
                    error.errno, f"cannot write {self.path} ({error.strerror or error})"
                ) from error
            return
        with open(self.temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.temporary, self.path)


def whole_folder(path: Path, work: Callable[[Path], None]) -> Path:
    """A folder filled by `work(temporary)` that appears under its name only when complete."""
    if path.exists():
        return path
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    work(temporary)
    os.replace(temporary, path)
    return path


def write_json(value: Any, path: Path) -> None:
    """JSON that is there whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """
    Raises:
        FileError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileError(f"{path}: cannot be read as JSON ({error})") from error
