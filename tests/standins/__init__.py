"""Stand-ins: the smallest faithful copies of the shape of interfaces that adapters attach to.

Each file names the source file and version it follows and holds nothing else of the package. Where
the real package is importable, tests run on it too, and the stand-in's signatures are compared with
its. To have the real ones beside the environment, not in it (they pin other versions):

    pip install --no-deps --target peers verl==0.9.1 openrlhf==0.11.2 axolotl==0.19.0 ...
    PYTHONPATH=peers python -m pytest tests/integrations/test_verl.py
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest

KINDS = ("real", "standin")


def module(name: str, **contents: Any) -> ModuleType:
    """A module of this name with these contents."""
    made = ModuleType(name)
    for key, value in contents.items():
        setattr(made, key, value)
    return made


def use(kind: str, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import` find the real package, or the stand-in; skip where there is no real one."""
    if kind == "standin":
        package = next(iter(modules)).partition(".")[0]
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            monkeypatch.delitem(sys.modules, name)  # the real one, for as long as the test runs
        for name, made in modules.items():
            made.__path__ = []
            monkeypatch.setitem(sys.modules, name, made)
            for k in range(1, name.count(".") + 1):
                parent = ".".join(name.split(".")[:k])
                if parent not in modules:
                    monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[]))
        return
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not importable here: {error}")


def fixture(adapter: Any, standin: Any) -> Any:
    """A fixture: how to import the framework's modules, the real ones and then the stand-in's."""

    @pytest.fixture(params=KINDS)
    def framework(request, monkeypatch):
        provide(request.param, standin, monkeypatch)
        yield importlib.import_module
        if adapter._installed.swap is not None:
            adapter.unpatch()

    return framework


def provide(kind: str, standin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use` of a stand-in's modules; with the real package, of what it needs CUDA to build."""
    if kind == "real":
        for name, made in getattr(standin, "dependencies", dict)().items():
            monkeypatch.setitem(sys.modules, name, made)
    use(kind, standin.modules(), monkeypatch)


def same_shape(standin: Any, real: Any) -> None:
    """The parameters that the stand-in has are those of the real thing, with the same defaults."""
    ours = list(inspect.signature(standin).parameters.values())
    theirs = list(inspect.signature(real).parameters.values())[: len(ours)]
    assert [p.name for p in ours] == [p.name for p in theirs]
    empty = inspect.Parameter.empty
    defaults = [
        [None if p.default is empty else p.default for p in side] for side in (ours, theirs)
    ]
    assert defaults[0] == defaults[1]
