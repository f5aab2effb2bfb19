"""What every public function on games does first: convert, choose an implementation, check."""

from __future__ import annotations

import logging
import math
import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sppo_kernels.backend import checks_enabled, logger, native_error, traced_as_constant

IMPLS = ("reference", "native")
GAP_WARNING = 1e-2  # judges round to two digits; more than that is a bias, not rounding


class Games(NamedTuple):
    """A batch with its leading dimensions flattened: x [G, K, K], lengths [G] int64 or None."""

    x: Tensor
    lengths: Tensor | None
    batch: torch.Size

    def restore(self, t: Tensor) -> Tensor:
        """Gives a result [G, ...] the leading dimensions of the input back."""
        return t.reshape(self.batch + t.shape[1:])


def as_tensor(value: Any, name: str) -> Tensor:
    """`value` (tensor, array, nested list) as a tensor; TypeError when it is none of these."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor, an array or nested lists of numbers, "
            f"got {type(value).__name__} ({error})"
        ) from error


def as_games(value: Any, name: str, lengths: Any = None) -> Games:
    """Flattens [..., K, K] into float32 or float64 games and checks shape and lengths."""
    x = as_tensor(value, name)
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name}: expected shape [..., K, K], got {list(x.shape)}")
    if x.shape[-1] < 2:
        raise ValueError(f"{name}: a game needs K >= 2 responses, got K = {x.shape[-1]}")
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32 if x.is_floating_point() else torch.get_default_dtype())
    batch, k = x.shape[:-2], x.shape[-1]
    if lengths is not None:
        lengths = _as_lengths(lengths, batch, k).to(x.device).reshape(-1).contiguous()
    return Games(x.reshape(-1, k, k), lengths, batch)


def _as_lengths(value: Any, batch: torch.Size, k: int) -> Tensor:
    lengths = as_tensor(value, "lengths")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != batch:
        raise ValueError(
            f"lengths: expected shape {list(batch)}, one a game, got {list(lengths.shape)}"
        )
    if reads_values(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 2 or high > k:
            raise ValueError(
                f"lengths: expected 2 <= length <= K = {k}, got {low if low < 2 else high}"
            )
    return lengths.to(torch.int64)


def reads_values(t: Tensor) -> bool:
    """Whether values may be looked at: not while compiling, on a device only when asked for."""
    if torch.compiler.is_compiling():
        return False
    return t.device.type == "cpu" or checks_enabled()


def unavailable(impl: str, device_type: str) -> str | None:
    """Why `impl` cannot play games on this device, or None when it can."""
    if impl == "reference":
        return None
    error = native_error()
    if error is not None or device_type == "cpu":
        return error
    if device_type != "cuda":
        return f"it runs on CPU and CUDA, and the input is on {device_type!r}"
    from sppo_kernels._C import build_info

    return None if build_info()["cuda"] else "the extension was built without CUDA"


@cache
def _auto(device_type: str) -> str:
    why = unavailable("native", device_type)
    impl = "native" if why is None else "reference"
    if why is None:
        logger.info("games: impl='auto' on %s: 'native'", device_type)
    else:
        logger.log(
            logging.WARNING,
            "games: impl='auto' on %s: 'reference' (slower), because 'native' is unavailable: %s; "
            "with a C++17 compiler, run `pip install --no-build-isolation .` in its source tree",
            device_type,
            why,
        )
    return impl


@traced_as_constant
def _resolve(impl: str, device_type: str) -> str:
    if impl == "auto":
        return _auto(device_type)
    if impl not in IMPLS:
        raise ValueError(f"impl: expected 'auto' or one of {IMPLS}, got {impl!r}")
    why = unavailable(impl, device_type)
    if why is not None:
        raise RuntimeError(f"impl={impl!r} cannot run here: {why}")
    return impl


def is_native(impl: str, device: torch.device) -> bool:
    """Whether the compiled operators run; says once why not when "auto" falls back.

    Raises:
        ValueError: `impl` is not "auto", "reference" or "native".
        RuntimeError: "native" was asked for and cannot run; the message says why.
    """
    return _resolve(impl, device.type) == "native"


def targets_module(impl: str, device: torch.device) -> ModuleType:
    """The module that holds symmetrize, win_rates and targets for this choice."""
    if is_native(impl, device):
        from sppo_kernels.games import native as games
    else:
        from sppo_kernels.games.reference import targets as games
    return games


def solvers_module(impl: str, device: torch.device) -> ModuleType:
    """The module that holds the solvers for this choice."""
    if is_native(impl, device):
        from sppo_kernels.games import native as games
    else:
        from sppo_kernels.games.reference import solvers as games
    return games


def check_values(
    games: Games, name: str, impl: str, *, logits: bool = False, want_gap: bool = False
) -> None:
    """Refuses NaN and, for probabilities, values outside [0, 1]; warns about a large gap.

    The diagonal is never read, so its values do not matter. Runs on CPU always, on other devices
    under SPPO_KERNELS_CHECK=1 (it synchronises), under torch.compile never.
    """
    if not reads_values(games.x):
        return
    x = games.x.detach()
    if x.device.type == "cpu" and is_native(impl, x.device):
        from sppo_kernels.games.native import check
    else:
        from sppo_kernels.games.reference.targets import check
    high = torch.finfo(x.dtype).max if logits else 1.0
    bad, gap, at = check(x, games.lengths, -high if logits else 0.0, high, want_gap)
    if bad >= 0:
        value = float(x.reshape(-1)[bad])
        wanted = "finite logits" if logits else "probabilities in [0, 1]"
        raise ValueError(f"{name}: expected {wanted}, got {value} at {_where(games, bad)}")
    if want_gap and gap > GAP_WARNING:
        warnings.warn(
            f"{name}: P_ij + P_ji should be 1, and differs from it by up to {gap:.3g}, "
            f"at {_where(games, at)}; symmetrize it first to remove position bias",
            UserWarning,
            stacklevel=3,
        )


def _where(games: Games, flat: int) -> list[int]:
    k = games.x.shape[-1]
    game, entry = divmod(flat, k * k)
    index = []
    for size in reversed(games.batch):
        game, at = divmod(game, size)
        index.insert(0, at)
    return [*index, entry // k, entry % k]


def positive(value: float, name: str) -> float:
    """`value` as a float; ValueError unless it is finite and positive."""
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return value
