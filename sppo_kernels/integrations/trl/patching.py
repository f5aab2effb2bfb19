"""`patch()`: TRL's trainers compute their log-probs with this package; `unpatch()`: they do not.

Replaced are names in TRL's modules, wherever they are bound: the chunked log-prob function, the
function that gives a model its fused head (to guard it), and the switch by which TRL leaves out
the positions without a label (on a CPU it would compute them all).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from sppo_kernels import checks
from sppo_kernels.integrations._swap import Hook, Installed
from sppo_kernels.integrations.trl.function import (
    DEFAULT_BUDGET,
    FusedLogProbs,
    Settings,
    prove,
)
from sppo_kernels.integrations.trl.heads import guarded
from sppo_kernels.integrations.trl.versions import (
    ADD_HEAD,
    COMPACT,
    FUNCTION,
    TESTED,
    Found,
    Layout,
    detect,
)

__all__ = ["is_patched", "patch", "patched", "unpatch"]

logger = logging.getLogger("sppo_kernels")

_installed = Installed("trl", TESTED, skip="trl.kernels", repeatable=True)
_settings = Settings()  # of the patch in place; read at every call
_found: Found | None = None  # what is patched


def is_patched() -> bool:
    """Whether TRL's function is replaced now."""
    return _installed.swap is not None


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
    global _found
    checks.choice("impl", impl, ("auto", "native", "triton", "reference"))
    options = Settings(checks.budget(memory_budget), impl, probe)
    if not is_patched():
        found = detect()
        prove(found)
        _installed.install(_hooks(found))
        _found = found
        logger.info(
            "sppo_kernels: TRL %s computes log-probs with this package (%s)",
            found.version,
            "heads are checked" if found.layout.fused_head else "its heads cannot be checked",
        )
    vars(_settings).update(vars(options))
    return _found.layout


def _hooks(found: Found) -> Iterator[Hook]:
    yield Hook(found.utils, FUNCTION, None, lambda _: FusedLogProbs(found, _settings))
    if found.layout.fused_head:
        yield Hook(found.utils, ADD_HEAD, None, lambda own: guarded(own, _current))
    if found.compact is not None:
        yield Hook(found.utils, COMPACT, None, lambda _: _always, only_here=True)


def _current() -> Settings | None:
    return _settings if is_patched() else None


def _always(device: object) -> bool:
    """Leave out the positions without a label on every device."""
    return True


unpatch = _installed.uninstall
patched = _installed.scoped(patch, lambda: vars(_settings))
