"""Replacing objects of another package, and putting the very same objects back.

An adapter names every place of a framework that it relies on in a table of `Hook`s. `Installed`
compares the whole table with what is installed, and only then replaces anything.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Hook", "Installed", "IntegrationError", "Swap", "parameters_of", "require_module", "resolve",
    "version_of",
]  # fmt: skip

MISSING = object()


class IntegrationError(RuntimeError):
    """The framework is not laid out as the adapter expects; the message says what was found."""


# --- looking at a framework -----------------------------------------------------------------------


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
        ImportError: the framework, or a package that it needs, is not installed or cannot be
            imported; the message and `name` say which. IntegrationError: the framework has no such
            module, or the module lacks what another one of the framework imports from it.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        if absent and error.name == package:
            raise ImportError(
                f"{package} is needed here: pip install {package}", name=package
            ) from error
        if error.name is not None and _inside(error.name, package):
            raise IntegrationError(
                f"{package} {version_of(package)}: expected an importable module {name} (as in "
                f"{tested}), got {type(error).__name__}: {error}"
            ) from error
        needed = f"the module {error.name}, which is not installed" if absent else "what it imports"
        raise ImportError(
            f"{package} {version_of(package)}: {name} needs {needed}: {error}", name=error.name
        ) from error


def resolve(path: str, tested: str, kind: type = object) -> Any:
    """The object at "module" or "module:attribute".

    Raises:
        ImportError, IntegrationError: as `require_module`; IntegrationError: there is no such
            attribute, or it is no `kind`.
    """
    name, _, attribute = path.partition(":")
    module = require_module(name, tested)
    found = getattr(module, attribute, MISSING) if attribute else module
    if found is MISSING or not isinstance(found, kind):
        expected = f"{name}.{attribute}{'' if kind is object else f', a {kind.__name__},'}"
        raise _unexpected(name, expected, tested, "none" if found is MISSING else repr(found))
    return found


def parameters_of(owner: Any, name: str) -> tuple[str, ...] | None:
    """Names of the parameters of `owner.name`; None where it is absent or None."""
    found = getattr(owner, name, None)
    return None if found is None else tuple(inspect.signature(found).parameters)


def _check_parameters(hook: Hook, owner: Any, package: str, tested: str) -> None:
    expected = tuple(hook.parameters.split(", "))
    names = parameters_of(owner, hook.name)
    parameters = inspect.signature(getattr(owner, hook.name)).parameters.values()
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rest = list(parameters)[len(expected) :]
    optional = all(p.default is not p.empty or p.kind in loose for p in rest)
    if names[: len(expected)] != expected or not optional or (hook.exact and rest):
        where = _where(owner, hook.name)
        found = f"{where}({', '.join(names)})"
        raise _unexpected(package, f"{where}({hook.parameters})", tested, found)


def _unexpected(module: str, expected: str, tested: str, found: str) -> IntegrationError:
    package = module.partition(".")[0]
    return IntegrationError(
        f"{package} {version_of(package)}: expected {expected} (as in {tested}), found {found}"
    )


def _where(owner: Any, name: str) -> str:
    return f"{getattr(owner, '__name__', owner)}.{name}"


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# --- replacing ------------------------------------------------------------------------------------


def _get(owner: Any, name: str) -> Any:
    """What the owner itself holds, not what it inherits."""
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, MISSING)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner.pop(name) if value is MISSING else owner.update({name: value})
    elif value is MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


class Swap:
    """A set of replaced objects.

    `add` and `add_everywhere` only record; `install` replaces all of them, or none when one fails;
    `uninstall` puts the same objects back.
    """

    def __init__(self, package: str, skip: str | None = None) -> None:
        self.package = package
        self.skip = skip
        self.planned: list[tuple[Any, str, Any]] = []
        self.imported: list[tuple[Any, Any]] = []
        self.undo: list[tuple[Any, str, Any, Any]] = []

    def add(self, owner: Any, name: str, replacement: Any) -> None:
        """Plan `owner.name = replacement`, or `owner[name]` where the owner is a dict."""
        self.planned.append((owner, name, replacement))

    def add_everywhere(self, original: Any, replacement: Any) -> None:
        """Plan the replacement under all names by which the package's loaded modules have it."""
        self.imported.append((original, replacement))

    def _names_of(self, value: Any) -> list[tuple[Any, str]]:
        return [
            (module, name)
            for key, module in list(sys.modules.items())
            if module is not None and _inside(key, self.package)
            if self.skip is None or not _inside(key, self.skip)
            for name, bound in list(vars(module).items())
            if bound is value
        ]

    def install(self) -> None:
        everywhere = [(*at, new) for old, new in self.imported for at in self._names_of(old)]
        try:
            for owner, name, replacement in (*everywhere, *self.planned):
                self.undo.append((owner, name, _get(owner, name), replacement))
                _put(owner, name, replacement)
        except BaseException:
            self.uninstall(strict=False)
            raise

    def uninstall(self, strict: bool = True) -> None:
        """Put everything back.

        Args:
            strict: refuse where another patch lies on top of ours; else leave that one.

        Raises:
            IntegrationError: another patch lies on top of ours; nothing is changed then.
        """
        for owner, name, _, replacement in self.undo:
            current = _get(owner, name)
            if strict and current is not replacement:
                raise IntegrationError(
                    f"{_where(owner, name)}: expected our replacement, found {current!r}; remove "
                    "the later patch first"
                )
        for owner, name, before, replacement in reversed(self.undo):
            if _get(owner, name) is replacement:
                _put(owner, name, before)
        self.undo.clear()
        for original, replacement in self.imported:  # modules that were loaded in between
            for module, name in self._names_of(replacement):
                setattr(module, name, original)


@dataclass(frozen=True)
class Hook:
    """A place of a framework that an adapter calls, replaces or adds to.

    Attributes:
        owner: "module", "module:Class" or "module:REGISTRY", or the object itself.
        name: of the owner's attribute; of the new entry where the owner is a registry, a dict.
        parameters: "self, model, ..." names of its leading parameters; None checks none.
        replacement: makes what takes its place, from the object found (None for a new entry); None
            leaves the place as it is. An object of a module is replaced in every module of the
            package that imported it.
        exact: further parameters are refused; else those with defaults pass.
        only_here: replace it in this module alone.
    """

    owner: Any
    name: str
    parameters: str | None = None
    replacement: Callable[[Any], Any] | None = None
    exact: bool = False
    only_here: bool = False


class Installed:
    """At most one installed `Swap` of a framework; the state behind patch() and unpatch().

    Args:
        package: name of the framework's package. tested: framework and version that the tables
            follow, for messages. skip: a subpackage that keeps its own objects.
        repeatable: patching again and unpatching what is not patched do nothing, and a later patch
            of someone else is left in place; otherwise each of them is an error.
        after: called after the framework's own objects are back.
    """

    def __init__(
        self,
        package: str,
        tested: str,
        *,
        skip: str | None = None,
        repeatable: bool = False,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.package, self.tested, self.skip = package, tested, skip
        self.repeatable, self.after = repeatable, after
        self.swap: Swap | None = None

    def find(self, hook: Hook) -> tuple[Any, Any]:
        """The hook's owner and the object that it names, after the check of the layout.

        Raises:
            ImportError, IntegrationError: as `install`.
        """
        owner = resolve(hook.owner, self.tested) if isinstance(hook.owner, str) else hook.owner
        if isinstance(owner, dict):
            if hook.name in owner:
                raise IntegrationError(f"{hook.owner} has an entry {hook.name!r} already")
            return owner, None
        found = getattr(owner, hook.name, MISSING)
        if found is MISSING:
            raise _unexpected(self.package, _where(owner, hook.name), self.tested, "none")
        if hook.parameters is not None:
            _check_parameters(hook, owner, self.package, self.tested)
        return owner, found

    def install(self, hooks: Iterable[Hook]) -> None:
        """Check all hooks, and then replace what they replace.

        Raises:
            ImportError: the framework, or a package that it needs, is not installed.
            IntegrationError: it is laid out otherwise, or patched already; nothing is changed then.
        """
        if self.swap is not None:
            if self.repeatable:
                return
            raise IntegrationError(f"{self.package} is patched already; call unpatch() first")
        require_module(self.package, self.tested)
        swap = Swap(self.package, self.skip)
        for hook in hooks:
            owner, found = self.find(hook)
            if hook.replacement is None:
                continue
            if inspect.ismodule(owner) and not hook.only_here:
                swap.add_everywhere(found, hook.replacement(found))
            else:
                swap.add(owner, hook.name, hook.replacement(found))
        swap.install()
        self.swap = swap

    def uninstall(self) -> None:
        """Put the framework's own objects back.

        Raises:
            IntegrationError: it is not patched, or another patch lies on top of ours; not where
                patching is repeatable.
        """
        if self.swap is None:
            if self.repeatable:
                return
            raise IntegrationError(f"{self.package} is not patched")
        self.swap.uninstall(strict=not self.repeatable)
        self.swap = None
        if self.after is not None:
            self.after()

    def scoped(
        self, patch: Callable[..., Any], options: Callable[[], Mapping[str, Any]] = dict
    ) -> Callable[..., contextlib.AbstractContextManager[Any]]:
        """`patched(**options)`: `patch(**options)` for a block.

        Args:
            options: gives those in force, to which a block within another patch returns.
        """

        @contextlib.contextmanager
        def patched(**given: Any) -> Iterator[Any]:
            """`patch(...)` for a block; after it, also after an error, all is as it was before."""
            before = None if self.swap is None else dict(options())
            result = patch(**given)
            try:
                yield result
            finally:
                if before is None:
                    self.uninstall()
                else:
                    patch(**before)

        return patched
