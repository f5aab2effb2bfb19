"""Replacing objects of another package, and putting the very same objects back."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["IntegrationError", "Swap", "check_parameters", "require_module", "version_of"]

MISSING = object()


class IntegrationError(RuntimeError):
    """The framework is not laid out as the adapter expects; the message says what was found."""


def version_of(package: str) -> str:
    """The installed version of a package, or what can be said instead, for messages."""
    module = sys.modules.get(package)
    found = getattr(module, "__version__", None)
    if found is not None:
        return str(found)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require_module(name: str, tested: str) -> Any:
    """Import a module of a framework.

    Raises:
        ImportError: the framework is not installed. IntegrationError: it has no such module, or
            the module cannot be imported; the message names both.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ImportError(f"{package} is needed here: pip install {package}") from error
        raise
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IntegrationError(
            f"{package} {version_of(package)}: expected an importable module {name} (as in "
            f"{tested}), got {type(error).__name__}: {error}"
        ) from error


def check_parameters(
    owner: Any, name: str, expected: tuple[str, ...], package: str, tested: str
) -> Any:
    """`owner.name`, after checking the names of its leading parameters.

    Further parameters are accepted when they have defaults.

    Raises:
        IntegrationError: there is no such attribute, or its parameters are others.
    """
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    found = getattr(owner, name, MISSING)
    if found is MISSING:
        raise IntegrationError(
            f"{package} {version_of(package)}: expected {where} (as in {tested}), found none"
        )
    parameters = list(inspect.signature(found).parameters.values())
    names = tuple(p.name for p in parameters)
    rest = parameters[len(expected) :]
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    optional = all(p.default is not p.empty or p.kind in loose for p in rest)
    if names[: len(expected)] != expected or not optional:
        raise IntegrationError(
            f"{package} {version_of(package)}: expected {where}{_list(expected)} (as in {tested}), "
            f"found {where}{_list(names)}"
        )
    return found


def _list(names: tuple[str, ...]) -> str:
    return f"({', '.join(names)})"


class Swap:
    """A set of replaced attributes.

    `add` only records; `install` replaces all of them; `uninstall` puts the same objects back.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.planned: list[tuple[Any, str, Any]] = []
        self.undo: list[tuple[Any, str, Any, Any]] = []
        self.imported: list[tuple[str, Any, Any]] = []
        self.items: list[tuple[dict, str, Any]] = []

    def add(self, owner: Any, name: str, replacement: Any) -> None:
        """Plan `owner.name = replacement`."""
        self.planned.append((owner, name, replacement))

    def add_everywhere(self, name: str, original: Any, replacement: Any) -> None:
        """Plan the replacement in every loaded module of the package that imported `original`."""
        for module in self._modules_with(name, original):
            self.add(module, name, replacement)
        self.imported.append((name, original, replacement))

    def add_item(self, registry: dict, key: str, value: Any) -> None:
        """Plan a new entry of a registry."""
        self.items.append((registry, key, value))

    def _modules_with(self, name: str, value: Any) -> list[Any]:
        prefix = self.package + "."
        return [
            module
            for key, module in list(sys.modules.items())
            if (key == self.package or key.startswith(prefix))
            and vars(module).get(name, MISSING) is value
        ]

    def install(self) -> None:
        for registry, key, value in self.items:
            registry[key] = value
        for owner, name, replacement in self.planned:
            before = vars(owner).get(name, MISSING)
            setattr(owner, name, replacement)
            self.undo.append((owner, name, before, replacement))

    def uninstall(self) -> None:
        """Put everything back.

        Raises:
            IntegrationError: another patch lies on top of ours; nothing is changed then.
        """
        for owner, name, _, replacement in self.undo:
            current = vars(owner).get(name, MISSING)
            if current is not replacement:
                raise IntegrationError(
                    f"{getattr(owner, '__name__', owner)}.{name}: expected our replacement, found "
                    f"{current!r}; remove the later patch first"
                )
        for owner, name, before, _ in reversed(self.undo):
            if before is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self.undo.clear()
        for name, original, replacement in self.imported:  # modules that were loaded in between
            for module in self._modules_with(name, replacement):
                setattr(module, name, original)
        for registry, key, _ in self.items:
            registry.pop(key, None)


class Installed:
    """At most one installed `Swap` of a framework; the state behind patch() and unpatch()."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.swap: Swap | None = None

    def install(self, build: Callable[[], Swap]) -> None:
        """Build and install.

        Raises:
            IntegrationError: already installed.
        """
        if self.swap is not None:
            raise IntegrationError(f"{self.package} is patched already; call unpatch() first")
        swap = build()
        swap.install()
        self.swap = swap

    def uninstall(self) -> None:
        """Put the package's own objects back.

        Raises:
            IntegrationError: nothing is installed, or another patch lies on top.
        """
        if self.swap is None:
            raise IntegrationError(f"{self.package} is not patched")
        self.swap.uninstall()
        self.swap = None


def scoped(
    patch: Callable[..., None], unpatch: Callable[[], None]
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`patched(**options)`: `patch(**options)` for a block, and `unpatch()` after it."""

    @contextlib.contextmanager
    def patched(**options: Any) -> Iterator[None]:
        patch(**options)
        try:
            yield
        finally:
            unpatch()

    return patched
