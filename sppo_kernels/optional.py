"""Packages that only a part of this one needs."""

from __future__ import annotations

import importlib
from typing import Any


def require(package: str, extra: str = "trainer") -> Any:
    """Import an optional package, or say which pip package brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ImportError(
            f"{name} is needed here: pip install {name} (or sppo-kernels[{extra}])"
        ) from error
