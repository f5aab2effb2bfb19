"""Tables of tuned blocks: the user's file, else the one that comes with the package.

Reading a table is all that ever happens by itself; `sppo tune` writes one (tuning.py). A table is

    {"schema": 1, "note": ..., "entries": [{"kernel": "split" | "backward" | "row",
      "dtype": "bfloat16", "columns": 128256, "block": 8192, "warps": 4, "device": "NVIDIA H200",
      "triton": "3.7.1", ...}]}

with times and versions beside it for the reader. Entries of another device or of another major
version of Triton are left out. A file that is not such a table is refused as a whole, with a
warning that names it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sppo_kernels.files import FileError, read_json

logger = logging.getLogger("sppo_kernels")

SCHEMA = 1
KERNELS = ("split", "backward", "row")
DTYPES = ("float32", "bfloat16", "float16")
MAX_BLOCK = 65536


def _power_of_two(least: int, most: int) -> tuple[Callable, str]:
    def good(value: int) -> bool:
        return least <= value <= most and value & (value - 1) == 0

    return good, f"a power of two from {least} to {most}"


# Field of an entry -> its type, what its value has to be, and that in words.
_FIELDS = {
    "kernel": (str, lambda v: v in KERNELS, f"one of {KERNELS}"),
    "dtype": (str, lambda v: v in DTYPES, f"one of {DTYPES}"),
    "columns": (int, lambda v: v >= 1, "an int of at least 1"),
    "block": (int, *_power_of_two(16, MAX_BLOCK)),
    "warps": (int, *_power_of_two(1, 32)),
    "device": (str, bool, "a name"),
    "triton": (str, bool, "a version"),
}


class Table(NamedTuple):
    """Where a table is from, in words, and its entries for a device."""

    source: str
    entries: tuple[dict, ...]


def word(dtype: torch.dtype) -> str:
    """A dtype as tables spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def slug(device_name: str) -> str:
    """A device's name as a file is called: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_file(device_name: str) -> Path | None:
    """The user's table: $SPPO_KERNELS_TUNED, or one in the cache folder; None where "0" is set."""
    given = os.environ.get("SPPO_KERNELS_TUNED")
    if given == "0":
        return None
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sppo_kernels" / "tuned" / f"{slug(device_name)}.json"


def package_file(device_name: str) -> Path:
    """The table that comes with the package, which need not exist."""
    return Path(__file__).parent / "tuned" / f"{slug(device_name)}.json"


def read(path: Path) -> list[dict]:
    """The entries of a table.

    Raises:
        FileError, OSError: it is not a table, or cannot be read; the message names it and why.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise FileError(f"{path}: expected a table of tuned blocks with schema {SCHEMA}")
    entries = found.get("entries")
    if not isinstance(entries, list):
        raise FileError(f"{path}: expected a list of entries, got {type(entries).__name__}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise FileError(f"{path}: entry {number}: expected settings, got {kind}")
        for name, (kind, good, expected) in _FIELDS.items():
            value = entry.get(name)
            if type(value) is not kind or not good(value):
                where = f"{path}: entry {number}: {name}"
                raise FileError(f"{where}: expected {expected}, got {value!r}")
    return entries


@functools.cache
def table(device_name: str) -> Table:
    """The table in use for a device, read once in a process (`table.cache_clear` forgets it)."""
    mine = user_file(device_name)
    if mine is None:
        return Table("defaults (SPPO_KERNELS_TUNED=0)", ())
    named = bool(os.environ.get("SPPO_KERNELS_TUNED"))
    for path, kind in ((mine, "user's table"), (package_file(device_name), "package's table")):
        if not path.exists() and not (named and path == mine):
            continue
        try:
            entries = read(path)
        except (FileError, OSError) as error:
            logger.warning("tuned blocks: %s; it is not used", error)
            continue
        fit = tuple(e for e in entries if _serves(e, device_name))
        if len(fit) < len(entries):
            logger.info(
                "tuned blocks: %s: %d of %d entries are of another device or Triton",
                *(path, len(entries) - len(fit), len(entries)),
            )
        if fit:
            return Table(f"{kind} {path} ({len(fit)} entries)", fit)
    return Table("defaults (no tuned entry for this device)", ())


def _serves(entry: dict, device_name: str) -> bool:
    """Whether an entry is of this device and of this major version of Triton."""
    import triton

    same = entry["triton"].split(".")[0] == triton.__version__.split(".")[0]
    return same and entry["device"] == device_name


@functools.cache
def lookup(kernel: str, dtype: str, columns: int, device_name: str) -> tuple[int, int] | None:
    """(block, warps) of the nearest entry whose vocabulary is within the same powers of two."""
    near = [
        e
        for e in table(device_name).entries
        if (e["kernel"], e["dtype"]) == (kernel, dtype)
        and (e["columns"] - 1).bit_length() == (columns - 1).bit_length()
    ]
    if not near:
        return None
    best = min(near, key=lambda e: (abs(e["columns"] - columns), e["columns"]))
    return best["block"], best["warps"]


def forget() -> None:
    """Read the files again at the next launch."""
    table.cache_clear()
    lookup.cache_clear()


@functools.cache
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(device: torch.device | None) -> str | None:
    """The name by which tables know a device; None for one that is never tuned."""
    if device is None or device.type != "cuda":
        return None
    return _cuda_name(torch.cuda.current_device() if device.index is None else device.index)


def in_use() -> str:
    """Which table launches take their blocks from, in words, for `sppo env`."""
    if not torch.cuda.is_available():
        return "defaults (no CUDA device)"
    return table(torch.cuda.get_device_name()).source
