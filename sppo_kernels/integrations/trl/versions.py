"""Which TRL this is: found by looking at what will be replaced, never by its version number alone.

TRL has had four layouts of its chunked log-prob function. A layout is recognised by the parameters
of the function, and by who reads the names that are replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from sppo_kernels.integrations._swap import (
    IntegrationError,
    parameters_of,
    require_module,
    version_of,
)

__all__ = ["LAYOUTS", "Found", "Layout", "UnsupportedTRLError", "detect"]

TESTED = "TRL 1.16.0"
FUNCTION, ADD_HEAD, COMPACT = "_ChunkedLogProbFunction", "add_fused_lm_head", "_use_triton"


class UnsupportedTRLError(IntegrationError):
    """The installed TRL is not of a layout that is known; the message says what was found."""


@dataclass(frozen=True)
class Layout:
    """How a range of TRL versions asks for log-probs.

    Attributes:
        versions: first and last release with this layout, as published.
        parameters: of the function, without `ctx`; `last_hidden` reads `hidden`.
        outputs: 5 (log-probs and the optional ones by `outputs`), or 2 (log-probs and entropy).
        fused_head: whether models get the head by `add_fused_lm_head`, which can be guarded.
        trainers: the trainers that call it.
        tested: what of it this package's tests run.
    """

    versions: tuple[str, str]
    parameters: tuple[str, ...]
    outputs: int
    fused_head: bool
    trainers: str
    tested: str


_BIASED = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale",
)  # fmt: skip
_FUSED = (*_BIASED, "outputs")
_CAPPED = tuple(name for name in _BIASED if name != "bias")
_SCALED = tuple(name for name in _CAPPED if name != "final_logit_softcapping")

LAYOUTS = (
    Layout(
        ("1.15.0", "1.16.0"), _FUSED, 5, True, "DPO, KTO, SFT, GRPO, RLOO, AsyncGRPO",
        "1.16.0: the whole test suite; 1.15.0: detection, and DPO and KTO runs",
    ),
    Layout(
        ("1.13.0", "1.14.2"), _BIASED, 2, False,
        "AsyncGRPO; in 1.14 also DPO, KTO and GRPO with use_liger_kernel",
        "1.13.0, 1.14.2: detection, and equality with its own function; 1.14.2: DPO and KTO runs",
    ),
    Layout(
        ("1.5.0", "1.12.0"), _CAPPED, 2, False, "AsyncGRPO",
        "1.10.0: detection, and equality with its own function",
    ),
    Layout(
        ("1.1.0", "1.4.0"), _SCALED, 2, False, "AsyncGRPO",
        "1.1.0, 1.4.0: detection, and equality with its own function",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The installed TRL, and the objects in it that a patch replaces."""

    version: str
    layout: Layout
    utils: ModuleType
    function: Any
    add_head: Any | None
    compact: Any | None


def detect() -> Found:
    """Look at the installed TRL.

    Raises:
        ImportError: there is no TRL, or a package that it needs is missing.
        UnsupportedTRLError: it is of no known layout.
    """
    require_module("trl", TESTED)
    version, utils = version_of("trl"), require_module("trl.trainer.utils", TESTED)
    where, head = (f"{utils.__name__}.{name}" for name in (FUNCTION, ADD_HEAD))
    function = getattr(utils, FUNCTION, None)
    if function is None:
        raise _unsupported(version, f"{where}, which is absent (or None, without Triton)")
    if not (hasattr(function, "apply") and hasattr(function, "forward")):
        raise _unsupported(version, f"{where}, an autograd function; it is {function!r}")
    names = parameters_of(function, "forward")[1:]
    names = tuple("hidden" if name == "last_hidden" else name for name in names)
    layout = next((known for known in LAYOUTS if known.parameters == names), None)
    if layout is None:
        raise _unsupported(version, f"{where} with known parameters; they are {names}")

    add_head = getattr(utils, ADD_HEAD, None)
    if layout.fused_head:
        names = parameters_of(utils, ADD_HEAD)
        if names is None:
            raise _unsupported(version, f"{head}, which is absent")
        if names[:2] != ("model", "temperature"):
            wanted = f"{head}(model, temperature, ...)"
            raise _unsupported(version, f"{wanted}; its parameters are {names}")
        if FUNCTION not in _global_names(add_head.__code__):
            raise _unsupported(version, f"{head} to look up {FUNCTION} when called; it does not")
    compact = getattr(utils, COMPACT, None)
    readers = [] if compact is None else sorted(_readers(utils, COMPACT))
    if compact is not None and readers != [ADD_HEAD]:
        raise _unsupported(
            version, f"{COMPACT} to be read by {ADD_HEAD} alone in {utils.__name__}; {readers}"
        )
    return Found(version, layout, utils, function, add_head, compact)


def _unsupported(version: str, looked_for: str) -> UnsupportedTRLError:
    table = "; ".join(f"{a} to {b}" for a, b in (layout.versions for layout in LAYOUTS))
    return UnsupportedTRLError(
        f"TRL {version} cannot be patched: looked for {looked_for}. Known layouts: {table} "
        "(1.16.0 is the one tested in full)."
    )


def _readers(module: ModuleType, name: str) -> Iterator[str]:
    """Functions and methods of `module` whose code reads the global `name`."""
    for key, value in vars(module).items():
        members = vars(value).values() if inspect.isclass(value) else (value,)
        for member in members:
            member = inspect.unwrap(getattr(member, "__func__", member))
            code = getattr(member, "__code__", None)
            own = getattr(member, "__module__", None) == module.__name__
            if own and isinstance(code, CodeType) and name in _global_names(code):
                yield key
                break


def _global_names(code: CodeType) -> set[str]:
    """Names of globals and attributes in a function and in the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names
