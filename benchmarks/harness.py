"""What all suites share: the gate, timing in turn, extra memory, and processes of their own.

Machines are shared and noisy. Providers of a case run in turn, A B C A B C …, so that drift hits
all of them alike, and what is reported are ratios within one run. On the CPU the peak memory is
what a process reached; on CUDA it is the allocator's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from benchmarks.rows import ROOT, Row

SPENT = "not measured: the time budget was spent"
CPU = torch.device("cpu")
LINUX = sys.platform.startswith("linux")
Call = Callable[[], object]


class Refused(Exception):
    """A provider that fails the correctness gate."""


def within(error: float, limit: float, what: str = "") -> float:
    """The error, if it is at most the limit.

    Raises:
        Refused: it is not, or it is NaN.
    """
    if not error <= limit:
        raise Refused(f"{what}wrong by {error:.1e}, more than {limit:.0e}")
    return error


def passed(row: Row, gate: Callable[[], float | None]) -> bool:
    """Whether a provider may be timed: `gate` returns its error or raises, and the row says so."""
    try:
        row.error = gate()
        return True
    except Refused as refusal:
        row.note = f"refused: {refusal}"
    except Exception as error:  # a peer may fail in any way; the row says how
        text = str(error).strip().partition("\n")[0][:90]
        row.note = f"cannot run: {type(error).__name__}: {text}"
    return False


def missing(package: str) -> str | None:
    """Why a provider that needs a package cannot run, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def thread_timer() -> Callable[[], float]:
    """CPU time of the thread where there is one thread: what others take of a core is left out."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def clock(
    function: Call, device: torch.device, timer: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call: device events on CUDA, `timer` on the CPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = timer()
    function()
    return max(timer() - begin, 1e-9)


def set_up(function: Call) -> Call:
    """The function, after what it has as its attribute `setup` has run, which is never timed."""
    getattr(function, "setup", int)()
    return function


def interleaved(
    functions: Mapping[str, Call],
    repeats: int | Mapping[str, int],
    device: torch.device = CPU,
    *,
    warmups: int = 2,
    deadline: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times of every function, taken in turn after the warm-ups, each after its `setup`.

    Two warm-ups, because on virtual machines memory that is touched for the first time is slow.

    Args:
        repeats: timed calls of each function, or of each by name.
        deadline: of time.monotonic(); after it no new round starts, but two rounds always run.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    wanted = {n: repeats if isinstance(repeats, int) else repeats[n] for n in functions}
    for function in [*functions.values()] * warmups:
        set_up(function)()
    gc.collect()
    for number in range(max(wanted.values(), default=0)):
        if number >= 2 and deadline is not None and time.monotonic() > deadline:
            break
        for name, function in functions.items():
            if number < wanted[name]:
                times[name].append(clock(set_up(function), device, timer))
    return times


def extra_peak(function: Call, device: torch.device = CPU) -> int | None:
    """Bytes that a call held at most, beyond what was held before; None where it is not known.

    On CUDA of the allocator; on Linux of resident memory, after what is free was given back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not LINUX:
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a libc without it keeps freed pages
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    function()
    return max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    """Bytes of this process: "VmRSS", what is resident, or "VmHWM", its high-water mark (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def forked(measure: Callable[[], int]) -> int | None:
    """What `measure` returns in a forked child; None when the child fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, str(measure()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return int(text) if status == 0 else None


class Process:
    """A command in a session of its own, so that it can be stopped with all that it started.

    A command that begins with a module's name is run as `python -m`. With `log` all it says goes
    there.
    """

    def __init__(
        self, *command: str, log: IO[str] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        if command[0].startswith("benchmarks."):
            command = (sys.executable, "-m", *command)
        if log is not None:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
        self._popen = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE if log is None else log,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, seconds: float | None = None) -> tuple[int | None, str, str]:
        """Exit status (None: the time was up), output, and the last line of the errors."""
        try:
            out, errors = self._popen.communicate(timeout=seconds)
            status = self._popen.returncode
        except BaseException as stop:
            os.killpg(self._popen.pid, signal.SIGKILL)
            out, _ = self._popen.communicate()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
            status, errors = None, "the time budget was spent"
        return status, out or "", ((errors or "").strip().splitlines() or ["it failed"])[-1]

    def result(self, seconds: float | None = None) -> dict:
        """The JSON of the last line of the output.

        Raises:
            Refused: it failed, or the time was up.
        """
        status, out, why = self.finish(seconds)
        if status != 0:
            raise Refused(why)
        return json.loads(out.strip().splitlines()[-1])
