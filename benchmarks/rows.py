"""What a run leaves behind: rows, the machine they were measured on, and the file that holds both.

The file's schema is benchmarks/schema.json, explained in docs/benchmarks.md. What can be derived
(best, median, spread, rates, the share of the ceiling) is written beside the times for readers and
always recomputed from them, never read back.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA_VERSION = 2
OURS = "sppo-kernels"
GROUPS = ("trainable", "frozen", "forward", "logits", "logits-forward")  # of the loss path
LOGITS = GROUPS[3:]
PACKAGES = (
    "triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "evalica", "choix", "nashpy", "scipy",
)  # fmt: skip


@dataclass
class Row:
    """One provider on one case. Without times it is absent, and `note` says why.

    times: seconds of single calls, divided by what `per` counts ("step", "game", "token", …).
    inputs: what the random inputs looked like; after a semicolon, what was measured of them.
    extra_peak: bytes a call holds beyond its inputs.
    error: relative, against float64, from the gate. flops, bytes: what one call must compute and
    move, counted in code; what a provider does beyond that is its own choice.
    """

    group: str
    case: str
    dtype: str
    provider: str
    times: list[float] = field(default_factory=list)
    extra_peak: int | None = None
    error: float | None = None
    flops: float | None = None
    bytes: float | None = None
    note: str = ""
    inputs: str = ""
    per: str = "step"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What must agree for two rows to have measured the same work."""
        return self.group, self.case, self.dtype, self.inputs.partition(";")[0]

    @property
    def best(self) -> float | None:
        return min(self.times, default=None)

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None

    @property
    def spread(self) -> float | None:
        """Half the range of the times, relative to their median."""
        if not self.times:
            return None
        return (max(self.times) - min(self.times)) / 2 / self.median

    @property
    def rate(self) -> float | None:
        """Operations, or bytes, a second of the best call."""
        amount = self.flops if self.flops is not None else self.bytes
        return amount / self.best if amount is not None and self.times else None

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def is_ceiling(self) -> bool:
        return self.provider.startswith(("bare GEMMs", "copy of"))


def same_case(rows: Iterable[Row], row: Row) -> list[Row]:
    """The rows that were measured in turn with `row`, itself among them."""
    return [r for r in rows if r.key == row.key]


def ceiling_of(rows: Iterable[Row], row: Row) -> Row | None:
    return next((r for r in same_case(rows, row) if r.is_ceiling and r.times), None)


def ceiling_ratio(rows: Iterable[Row], row: Row) -> float | None:
    """The row's rate over that of the ceiling of the same run: 1 is the ceiling itself."""
    ceiling = ceiling_of(rows, row)
    if ceiling is None or row.rate is None or ceiling.rate is None:
        return None
    return row.rate / ceiling.rate


def as_dict(rows: list[Row], row: Row) -> dict:
    """The row as the file holds it, with what is derived from its times."""
    out = {f.name: getattr(row, f.name) for f in fields(Row)}
    rate = row.rate
    return out | {
        "best": row.best,
        "median": row.median,
        "spread": row.spread,
        "tflops": rate / 1e12 if rate is not None and row.flops is not None else None,
        "gbs": rate / 1e9 if rate is not None and row.flops is None else None,
        "ceiling_ratio": ceiling_ratio(rows, row),
    }


def write_json(path: Path, rows: list[Row], env: dict) -> None:
    """All rows of a run, written whole or not at all."""
    from sppo_kernels import files  # torch comes with it, which reading does without

    rows = [as_dict(rows, r) for r in rows]
    files.write_json({"schema": SCHEMA_VERSION, **env, "rows": rows}, path)


def read_json(path: Path) -> tuple[list[Row], dict]:
    """Rows and environment of a results file, or of the results.json of a folder.

    Raises:
        ValueError: the file has another schema.
    """
    path = path / "results.json" if path.is_dir() else path
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{path}: expected schema {SCHEMA_VERSION}, got {data.get('schema')!r}")
    known = {f.name for f in fields(Row)}
    rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in data.pop("rows")]
    return rows, data


def environment() -> dict:
    """Machine, versions, commit and date of a run."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import sppo_kernels

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": None,
    }
    with contextlib.suppress(ImportError):
        from sppo_kernels import _C

        machine["build"] = dict(_C.build_info())
    return {
        "machine": machine,
        "versions": versions | {"sppo-kernels": sppo_kernels.__version__},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine_slug(machine: dict) -> str:
    """The folder of a machine's results: its GPU, or its CPU and the threads used."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree, with "+changes" when tracked files differ from it."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", *args], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "HEAD") or os.environ.get("SPPO_KERNELS_COMMIT", "unknown")
    tracked = ("status", "--porcelain", "--untracked-files=no")
    changed = git(*tracked, "--", ".", ":!benchmarks/results")
    return name + ("+changes" if changed else "")
