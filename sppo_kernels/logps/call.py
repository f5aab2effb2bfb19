"""One hidden-in call, checked once and carried from the public function to the kernel.

The operators of torch take flat arguments, so `LinearCall` is a tuple in the order of their
schemas: `op(*call, ...)` hands it over, `LinearCall.taken` takes it back, `save` and `saved` bring
it through an autograd context.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve

# Rows of a chunk: enough for the GEMMs to run at full rate, few enough for the logits of a chunk
# to stay small. Fixed, so that policy and reference see GEMMs of the same shapes.
CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}

_TENSORS = 5  # fields that are tensors; the others are constants


def load(impl: str) -> ModuleType:
    """The kernels of "native" or "triton"; siblings never import each other."""
    return importlib.import_module(f"sppo_kernels.logps.{impl}")


class LinearCall(NamedTuple):
    """Labels, and what their logits are computed from: N hidden rows, V tokens, L labels."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [L], on the device of hidden or on the host
    rows: Tensor | None  # [L] rows of hidden; None: label i belongs to row i
    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_rows: int  # rows whose logits are computed at once
    retain_rows: int  # rows whose logits' gradient is kept for the weight's
    impl: str  # resolved

    @staticmethod
    def schema() -> str:
        return (
            "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, "
            "float logit_scale, float? softcap, int ignore_index, SymInt chunk_rows, "
            "SymInt retain_rows, str impl"
        )

    @classmethod
    def taken(cls, args: tuple) -> tuple[LinearCall, tuple]:
        """The call at the front of an operator's arguments, and what follows it."""
        size = len(cls._fields)
        return cls(*args[:size]), args[size:]

    def save(self, ctx: Any, *more: Tensor) -> None:
        ctx.save_for_backward(*self[:_TENSORS], *more)
        ctx.constants = self[_TENSORS:]

    @classmethod
    def saved(cls, ctx: Any) -> tuple[LinearCall, tuple[Tensor, ...]]:
        """The call of `save`, and the tensors saved with it."""
        tensors = ctx.saved_tensors
        return cls(*tensors[:_TENSORS], *ctx.constants), tensors[_TENSORS:]


def checked(
    hidden: object,
    weight: object,
    bias: object,
    labels: object,
    rows: object,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int | None,
    impl: str,
) -> LinearCall:
    """Check and flatten: hidden to [N, D], labels and rows to [L]; cast as autocast would.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        RuntimeError: `impl` cannot run here.
    """
    hidden = checks.floating("hidden", hidden)
    weight = checks.floating("weight", weight, 2)
    labels = checks.integers("labels", labels)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape [..., D], got {tuple(hidden.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}] (D of hidden), got "
            f"{tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    if labels.device.type != "cpu":  # host labels let ignored rows be dropped without a sync
        checks.same_device("labels", labels, "hidden", hidden)
    if rows is None:
        checks.shape("labels", labels, hidden.shape[:-1], "that of hidden without its last one")
    else:
        rows = checks.integers("rows", rows)
        checks.shape("rows", rows, labels.shape, "that of labels")
        if rows.device.type != "cpu":
            checks.same_device("rows", rows, "hidden", hidden)
    if bias is not None:
        bias = checks.floating("bias", bias, 1)
        checks.shape("bias", bias, weight.shape[:1], "V of weight")
        checks.same_device("bias", bias, "hidden", hidden)
    logit_scale = checks.positive("logit_scale", logit_scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    checks.labels_in_range(labels, weight.shape[0], ignore_index)
    budget = checks.budget(memory_budget)

    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight: expected {hidden.dtype}, the dtype of hidden, got {weight.dtype} (under "
            "torch.autocast both are cast)"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    if rows is not None:
        checks.rows_in_range(rows, hidden.shape[0])
        rows = rows.reshape(-1).contiguous().to(hidden.device, torch.int64, non_blocking=True)
    call = LinearCall(
        hidden, weight, bias, labels.reshape(-1).contiguous(), rows, logit_scale, softcap,
        int(ignore_index), 0, 0, resolve(impl, device, hidden.dtype),
    )  # fmt: skip
    chunk = chunk_rows(call, budget)
    return call._replace(chunk_rows=chunk, retain_rows=_retain_rows(call, budget, chunk))


def needs_gradient(call: LinearCall) -> tuple[bool, bool, bool]:
    """Whether hidden, weight, bias need a gradient now: this decides between 1U, 2U and 3U."""
    if not torch.is_grad_enabled():
        return False, False, False
    bias = call.bias is not None and call.bias.requires_grad
    return call.hidden.requires_grad, call.weight.requires_grad, bias


def row_bytes(call: LinearCall) -> int:
    """Bytes of a row of logits."""
    return call.weight.shape[0] * call.hidden.element_size()


def chunk_rows(call: LinearCall, budget: int | None) -> int:
    """Rows of a chunk; fewer than usual only when the budget cannot hold the usual chunk."""
    rows = CHUNK_ROWS.get(call.hidden.device.type, 1024)
    while budget is not None and rows > 64 and rows * row_bytes(call) > budget // 2:
        rows //= 2
    return rows


def _retain_rows(call: LinearCall, budget: int | None, chunk: int) -> int:
    """Rows to keep for the gradients of weight and bias: all, or what a chunk leaves, in chunks."""
    if not any(needs_gradient(call)[1:]):
        return 0
    total = call.labels.shape[0]
    if budget is None or total * row_bytes(call) <= budget:
        return total
    return max(0, budget // row_bytes(call) - chunk) // chunk * chunk
