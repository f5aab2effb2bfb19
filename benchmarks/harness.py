"""Timing and memory that can be trusted: interleaved repeats, fresh processes.

Machines are shared and noisy. Providers of a case run in turn, A B C A B C …, so that drift hits
all of them alike, and what is reported are ratios within one run. On the CPU the peak memory is
that of a fresh process; on CUDA it is the allocator's.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.rows import ROOT, Refused, environment, write_json
from benchmarks.rows import Row as Result

__all__ = [
    "ROOT", "Refused", "Result", "clock", "cuda_extra_peak", "environment", "in_fresh_process",
    "interleaved", "resident_extra_peak", "write_json",
]  # fmt: skip


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
    functions: Mapping[str, Callable[[], object]],
    repeats: int | Mapping[str, int],
    device: torch.device,
    *,
    warmups: int = 2,
    deadline: float | None = None,
) -> dict[str, list[float]]:
    """Times of every function, taken in turn after the warm-ups.

    What a function has as its attribute `setup` runs before each call, outside the clock. Two
    warm-ups, because on virtual machines memory that is touched for the first time is slow.

    Args:
        repeats: timed calls of each function, or of each by name.
        deadline: of time.monotonic(); after it no new round starts, but two rounds always run.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    wanted = {n: repeats if isinstance(repeats, int) else repeats[n] for n in functions}
    for function in [*functions.values()] * warmups:
        getattr(function, "setup", int)()
        function()
    gc.collect()
    for number in range(max(wanted.values(), default=0)):
        if number >= 2 and deadline is not None and time.monotonic() > deadline:
            break
        for name, function in functions.items():
            if number < wanted[name]:
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


def in_fresh_process(module: str, *args: str, timeout: float | None = None) -> dict:
    """Run `python -m module args` and read the JSON of its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True,
            check=False, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Refused("the time budget was spent") from None
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")
    return json.loads(done.stdout.strip().splitlines()[-1])
