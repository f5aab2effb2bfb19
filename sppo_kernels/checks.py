"""Checks of arguments. Each error names the argument, what was expected and what came.

Checks of shapes, dtypes and devices always run. Checks of values run for tensors on the CPU; on
other devices, where reading a value stops the device, only under SPPO_KERNELS_CHECK=1. While
torch.compile traces, values do not exist yet and are not checked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sppo_kernels.backend import checks_enabled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def can_read(tensor: Tensor) -> bool:
    """Whether the tensor's values may be looked at now."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.device.type == "cpu" or checks_enabled()


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a local tensor, got a DTensor; gather it with .full_tensor() first"
        )
    return value


def floating(name: str, value: object, dim: int | tuple[int, ...] | None = None) -> Tensor:
    value = tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}"
        )
    dims = (dim,) if isinstance(dim, int) else dim
    if dims is not None and value.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(value.shape)}")
    return value


def integers(name: str, value: object) -> Tensor:
    value = tensor(name, value)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected on {other.device}, as {other_name}, got on {value.device}"
        )


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}"
        )


def labels_in_range(labels: Tensor, vocab: int, ignore_index: int) -> None:
    if vocab == 0:
        raise ValueError("logits: expected at least one column (the vocabulary), got none")
    if not can_read(labels) or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(bad.any()):
        where = bad.reshape(-1).nonzero()[0].item()
        raise ValueError(
            f"labels: expected ignore_index={ignore_index} or values in [0, {vocab}), got "
            f"{labels.reshape(-1)[where].item()} at flat position {where} "
            f"({int(bad.sum())} such labels)"
        )


def rows_in_range(rows: Tensor, count: int) -> None:
    if not can_read(rows) or rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"rows: expected values in [0, {count}), the rows of hidden, got from {low} to {high}"
        )


def offsets(cu_seqlens: object, rows: int) -> Tensor:
    """cu_seqlens as a tensor [S+1], S >= 1, from 0 to `rows`, never decreasing."""
    value = integers("cu_seqlens", cu_seqlens)
    if value.dim() != 1 or value.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: expected shape [S+1] with at least one sequence, got {tuple(value.shape)}"
        )
    if can_read(value):
        lengths = value.diff()
        if int(value[0]) != 0 or int(value[-1]) != rows:
            raise ValueError(
                f"cu_seqlens: expected 0 first and {rows} (the number of labels) last, got "
                f"{int(value[0])} and {int(value[-1])}"
            )
        if bool((lengths < 0).any()):
            where = int((lengths < 0).nonzero()[0])
            raise ValueError(
                f"cu_seqlens: expected no decrease, got {int(value[where])} then "
                f"{int(value[where + 1])} at positions {where}, {where + 1}"
            )
    return value.contiguous()


def _all_values(name: str, value: Tensor, good: Tensor, expected: str) -> None:
    if not bool(good.all()):
        where = int((~good).nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {value[where].item()} at {where}")


def win_rates(value: Tensor, name: str = "win_rate") -> None:
    if can_read(value):
        _all_values(name, value, (value >= 0) & (value <= 1), "values in [0, 1]")


def weights(value: Tensor, name: str = "weights") -> None:
    if can_read(value):
        good = (value >= 0) & value.isfinite()
        _all_values(name, value, good, "finite values of at least 0")


def positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return float(value)


def budget(value: object) -> int | None:
    """memory_budget: bytes above 0, or None for no bound."""
    return None if value is None else int(positive("memory_budget", value))


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    return value
