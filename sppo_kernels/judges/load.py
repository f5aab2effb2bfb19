"""Judges by their names."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from sppo_kernels import judges
from sppo_kernels.judges.base import Judge, JudgeError
from sppo_kernels.judges.function import CallableJudge


def kinds() -> dict[str, tuple[Any, str]]:
    """kind: (class, what follows the colon), of each file of this room that says `JUDGE`."""
    found = {}
    for module in pkgutil.iter_modules(judges.__path__):
        kind = getattr(importlib.import_module(f"{judges.__name__}.{module.name}"), "JUDGE", None)
        if kind is not None:
            found[module.name] = kind
    return found


def names() -> str:
    """The forms of a judge's name, in words."""
    return ", ".join(f"{kind}:{rest}" for kind, (_, rest) in kinds().items()) + (
        " or MODULE:FUNCTION"
    )


def load_judge(spec: str, **options: Any) -> Judge:
    """A judge by its name.

    Args:
        spec: "pairrm:PATH", "reward:PATH", "recorded:FILE.csv" or "MODULE:FUNCTION".
        options: for the judge's class.

    Raises:
        JudgeError: the name has none of these forms.
    """
    kind, _, rest = spec.partition(":")
    known = kinds()
    if not rest:
        raise JudgeError(f"judge: expected {names()}, got {spec!r}")
    if kind in known:
        return known[kind][0](rest, **options)
    return CallableJudge(spec, **options)
