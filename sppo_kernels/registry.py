"""Operators under `torch.ops.sppo_kernels`: their schemas, fakes, kernels and gradients.

    define("name", "(Tensor x, str impl) -> Tensor")

    @fake("name")
    def _(x, impl): ...

    @kernel("name")
    def _(x, impl): ...

    formula("name", backward, save)

Kernels run with autocast off, on CPU and CUDA alike; none of these functions reads a value from a
device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "sppo_kernels"
lib = torch.library.Library(NAMESPACE, "FRAGMENT")
kernels: dict[str, Callable] = {}  # what `kernel` registered, by operator


def define(name: str, schema: str) -> None:
    """Declare an operator; `schema` is what follows its name."""
    lib.define(name + schema)


def op(name: str) -> torch._ops.OpOverload:
    """The operator's default overload."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def fake(name: str) -> Callable[[Callable], Callable]:
    """Register what the operator returns for tensors without values."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=lib)


def kernel(name: str) -> Callable[[Callable], Callable]:
    """Register what the operator does on CPU and CUDA, with autocast off."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            device = next(a.device.type for a in args if isinstance(a, Tensor))
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(*args)
            return function(*args)

        for key in ("CPU", "CUDA"):
            lib.impl(name, run, key)
        kernels[name] = function
        return function

    return register


def formula(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Register the operator's gradient."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=lib
    )


def once(name: str) -> None:
    """Make differentiating the operator, itself a gradient, an error that says what to do."""

    def backward(ctx, *grads):
        raise RuntimeError(
            "sppo_kernels: the fused log-probs can be differentiated once; for second derivatives "
            "use impl='reference'"
        )

    formula(name, backward)
