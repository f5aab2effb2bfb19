"""Time and extra peak memory of a call (resident memory of this process on Linux)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and MiB beyond what was resident before; NaN where the system does not say."""
    function()
    gc.collect()
    peak = float("nan")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _kib("VmRSS")
    except OSError:
        before = None
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    if before is not None:
        peak = (_kib("VmHWM") - before) / 1024
    return seconds, peak
