"""Backends. Siblings never import each other; what they share is in streaming.py."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(impl: str) -> ModuleType:
    """The module of a backend with fused kernels: "native" or "triton"."""
    return importlib.import_module(f"sppo_kernels.logps.{impl}")
