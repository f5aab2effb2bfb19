"""Backends. Siblings never import each other; what they share is in streaming.py."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor


def load(impl: str) -> ModuleType:
    """The module of a backend with fused kernels: "native" or "triton"."""
    return importlib.import_module(f"sppo_kernels.impl.{impl}")


def empty(backend: ModuleType, like: Tensor, *shape: int, **options) -> Tensor:
    """A large buffer: from the backend's own allocator where it has one."""
    allocate = getattr(backend, "empty", None)
    return (
        like.new_empty(shape, **options) if allocate is None else allocate(like, *shape, **options)
    )
