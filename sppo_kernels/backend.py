"""Which implementation runs: the compiled extension, Triton, or the eager reference.

`resolve` turns the `impl` argument of every public function into one of the names in `IMPLS`, or
in `GAME_IMPLS` for games, whose one compiled text runs on CPU and CUDA, in float32 and float64.
"auto" takes the fastest that can run on the tensors' device and says once, through the logger
"sppo_kernels", what it took and why. An explicit choice that cannot run raises.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger("sppo_kernels")

IMPLS = ("reference", "triton", "native")
GAME_IMPLS = ("reference", "native")
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def traced_as_constant(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo."""
    function._dynamo_marked_constant = True
    return function


@cache
def native_error() -> str | None:
    """Load the compiled extension; None when it is loaded, else the reason why it is not."""
    if os.environ.get("SPPO_KERNELS_NATIVE") == "0":
        return "SPPO_KERNELS_NATIVE=0 is set"
    try:
        import sppo_kernels._C  # noqa: F401
    except ImportError as error:
        return f"the compiled extension cannot be loaded ({error})"
    return None


@cache
def triton_error() -> str | None:
    """None when Triton can be imported, else the reason why it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def checks_enabled() -> bool:
    """Whether checks that force a device synchronisation run (SPPO_KERNELS_CHECK=1)."""
    return os.environ.get("SPPO_KERNELS_CHECK") == "1"


def unavailable(
    impl: str, device_type: str, dtype: torch.dtype | None, games: bool = False
) -> str | None:
    """Why `impl` cannot run on this device and dtype, or None when it can."""
    if impl == "reference":
        return None
    if games:
        return _games_unavailable(device_type)
    if dtype not in _FAST_DTYPES:
        return f"it takes float32, bfloat16 or float16, and the input is {dtype}"
    if impl == "native":
        if device_type != "cpu":
            return f"it runs on the CPU, and the input is on {device_type!r}"
        return native_error()
    if device_type != "cuda" and not (device_type == "cpu" and triton_interpreted()):
        return f"it runs on CUDA devices, and the input is on {device_type!r}"
    return triton_error()


def _games_unavailable(device_type: str) -> str | None:
    error = native_error()
    if error is not None or device_type == "cpu":
        return error
    if device_type != "cuda":
        return f"it runs on CPU and CUDA, and the input is on {device_type!r}"
    from sppo_kernels._C import build_info

    return None if build_info()["cuda"] else "the extension was built without CUDA"


@cache
def _auto(device_type: str, dtype: torch.dtype | None, games: bool = False) -> str:
    first = "triton" if device_type == "cuda" and not games else "native"
    why = unavailable(first, device_type, dtype, games)
    where = f"{device_type}, for games" if games else f"{device_type} with {dtype}"
    if why is None:
        logger.info("impl='auto' on %s: %r", where, first)
        return first
    level = logging.INFO if not games and dtype not in _FAST_DTYPES else logging.WARNING
    message = "impl='auto' on %s: 'reference' (slower), because %r is unavailable: %s"
    hint = ""
    if first == "native" and native_error() is not None:
        hint = (
            "; with a C++17 compiler, run `pip install --no-build-isolation .` in its source tree"
        )
    logger.log(level, message, where, first, why + hint)
    return "reference"


@traced_as_constant
def resolve(impl: str, device_type: str, dtype: torch.dtype | None, games: bool = False) -> str:
    """The implementation to run for `impl` in "auto", "reference", "triton", "native".

    For `games` there is no "triton", and the dtype does not matter.

    Raises:
        ValueError: `impl` is not one of these names.
        RuntimeError: an explicit choice cannot run; the message says why.
    """
    if impl == "auto":
        return _auto(device_type, None if games else dtype, games)
    known = GAME_IMPLS if games else IMPLS
    if impl not in known:
        raise ValueError(f"impl: expected 'auto' or one of {known}, got {impl!r}")
    why = unavailable(impl, device_type, dtype, games)
    if why is not None:
        raise RuntimeError(f"impl={impl!r} cannot run here: {why}")
    return impl
