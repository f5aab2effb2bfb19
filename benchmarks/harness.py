"""Timing and memory that can be trusted: a gate first, interleaved repeats, fresh processes.

Machines are shared and noisy. Providers of a case run in turn, A B C A B C …, so that drift hits
all of them alike, and what is reported are medians and ratios within one run. On the CPU the peak
memory is that of a fresh process; on CUDA it is the allocator's.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """One provider on one case: seconds, bytes, and in `note` why something is absent."""

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

    @property
    def best(self) -> float | None:
        return min(self.times, default=None)

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None


class Refused(Exception):
    """A provider that fails the correctness gate, or cannot run the case."""


def clock(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: device events on CUDA, the wall clock on the CPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Times of every function, taken in turn after two warm-ups of each.

    What a function has as its attribute `setup` runs before each call, outside the clock. Two,
    because on virtual machines memory that is touched for the first time is slow.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in [*functions.values()] * 2:
        getattr(function, "setup", int)()
        function()
    gc.collect()
    for _ in range(repeats):
        for name, function in functions.items():
            getattr(function, "setup", int)()
            times[name].append(clock(function, device))
    return times


def cuda_extra_peak(function: Callable[[], object]) -> int:
    """Bytes that the CUDA allocator held at most during the call, beyond what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_extra_peak(function: Callable[[], object]) -> int:
    """Bytes of resident memory that this process reached during the call, beyond before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kib("VmRSS")
    function()
    return max(0, _status_kib("VmHWM") - before) * 1024


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def in_fresh_process(module: str, *args: str) -> dict:
    """Run `python -m module args` and read the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment() -> dict:
    """Machine, versions, commit and date of a run."""
    import sppo_kernels

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "trl", "liger_kernel", "evalica", "choix", "nashpy"):
        with contextlib.suppress(Exception):
            from importlib.metadata import version

            versions[name] = version(name.replace("_", "-"))
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    with contextlib.suppress(Exception):
        from sppo_kernels import _C

        machine["build"] = _C.build_info()
    return {
        "machine": machine,
        "versions": versions | {"sppo_kernels": sppo_kernels.__version__},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or os.environ.get("SPPO_KERNELS_COMMIT", "unknown")
    return commit + (
        "+changes"
        if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        else ""
    )


def write_json(path: Path, results: list[Result], env: dict) -> None:
    """All results of a run, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) | {"median": r.median} for r in results]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": 1, **env, "results": rows}, indent=1) + "\n")
    partial.replace(path)
