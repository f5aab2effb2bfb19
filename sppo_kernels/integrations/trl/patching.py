"""`patch()`: TRL's trainers compute their log-probs with this package; `unpatch()`: they do not.

Replaced are names in TRL's modules, wherever they are bound: the chunked log-prob function, the
function that gives a model its fused head (to guard it), and the switch by which TRL leaves out
the positions without a label (on a CPU it would compute them all).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sppo_kernels import checks
from sppo_kernels.integrations.trl.function import (
    DEFAULT_BUDGET,
    FusedLogProbs,
    Settings,
    prove,
)
from sppo_kernels.integrations.trl.heads import guarded
from sppo_kernels.integrations.trl.versions import COMPACT, Found, Layout, detect

__all__ = ["is_patched", "patch", "patched", "unpatch"]

logger = logging.getLogger("sppo_kernels")


@dataclass
class _Patch:
    found: Found
    settings: Settings
    swaps: list[tuple[Any, Any]]  # (original, replacement), wherever TRL binds them
    compact: Any | None = None  # replaces _use_triton in trl.trainer.utils alone


_patch: _Patch | None = None


def is_patched() -> bool:
    """Whether TRL's function is replaced now."""
    return _patch is not None


def patch(
    *, memory_budget: int | None = DEFAULT_BUDGET, impl: str = "auto", probe: bool = True
) -> Layout:
    """Make every TRL trainer with a fused head compute its log-probs with this package.

    Before or after the trainer is made: TRL looks its function up at every call. Models that get
    their head after this call are also guarded: heads that TRL's formula is wrong for raise
    HeadProbeError, and LoRA on the head is merged. Calling it again only sets the options; calls
    are not counted, so that one `unpatch()` undoes them.

    Args:
        memory_budget: bytes a call may hold for logits; rows over it are computed again in
            backward. The default is at most what TRL's function holds on a CPU; None: no bound.
        impl: "auto", "reference", "triton" or "native".
        probe: compare each model's first fused call with its own logits (two short forwards).

    Returns:
        The layout that was recognised, from `versions.LAYOUTS`.

    Raises:
        ImportError: TRL is not installed.
        TypeError, ValueError: an option is not one of the above.
        UnsupportedTRLError: it is of no known layout; nothing is replaced.
    """
    global _patch
    checks.choice("impl", impl, ("auto", "native", "triton", "reference"))
    settings = Settings(checks.budget(memory_budget), impl, probe)
    if _patch is not None:
        _assign(_patch.settings, settings)
        return _patch.found.layout
    found = detect()
    function = FusedLogProbs(found, settings)
    prove(found)
    new = _Patch(found, settings, [(found.function, function)])
    if found.layout.fused_head:
        new.swaps.append((found.add_head, guarded(found.add_head, _settings)))
    if found.compact is not None:
        new.compact = _always
    try:
        _patch = new
        for original, replacement in new.swaps:
            _rebind(original, replacement)
        if new.compact is not None:
            setattr(found.utils, COMPACT, new.compact)
    except BaseException:
        unpatch()
        raise
    logger.info(
        "sppo_kernels: TRL %s computes log-probs with this package (%s)",
        found.version,
        "heads are checked" if found.layout.fused_head else "its heads cannot be checked",
    )
    return found.layout


def unpatch() -> None:
    """Put back the very same objects; without a patch in place, do nothing."""
    global _patch
    if _patch is None:
        return
    for original, replacement in _patch.swaps:
        _rebind(replacement, original)
    if _patch.compact is not None:
        setattr(_patch.found.utils, COMPACT, _patch.found.compact)
    _patch = None


@contextlib.contextmanager
def patched(**options: Any) -> Iterator[Layout]:
    """`patch(**options)` for a while; afterwards, also after an error, all is as it was before.

    Within another patch it sets the options and leaves that patch, with its own, in place.
    """
    before = None if _patch is None else replace(_patch.settings)
    try:
        yield patch(**options)
    finally:
        if before is None:
            unpatch()
        elif _patch is None:  # undone inside
            patch(**vars(before))
        else:
            _assign(_patch.settings, before)


def _settings() -> Settings | None:
    return None if _patch is None else _patch.settings


def _always(device: object) -> bool:
    """Leave out the positions without a label on every device."""
    return True


def _assign(settings: Settings, values: Settings) -> None:
    for name, value in vars(values).items():
        setattr(settings, name, value)


def _rebind(old: Any, new: Any) -> None:
    """Bind `new` to every name in TRL's loaded modules that is bound to `old`."""
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] != "trl" or name.startswith("trl.kernels"):
            continue
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)
