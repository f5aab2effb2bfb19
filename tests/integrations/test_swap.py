"""What every adapter owes: the layout is checked by name, and the very same objects come back."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("transformers")

from sppo_kernels.integrations import _swap
from sppo_kernels.integrations._swap import IntegrationError
from tests import standins

# adapter -> options with which it replaces all that it can
OPTIONS = {
    "verl": {"eta": 2.0},
    "openrlhf": {"loss": "sppo"},
    "llamafactory": {"loss": "sppo", "win_rates": "columns"},
    "liger": {},
    "trl": {},
}
CASES = [
    (name, kind)
    for name in OPTIONS
    for kind in (("real",) if name in ("liger", "trl") else standins.KINDS)
]
CHECKED = [case for case in CASES if case[0] != "trl"]  # test_trl_patch.py has TRL's layouts
STANDINS = [name for name, kind in CASES if kind == "standin"]


@pytest.fixture
def adapter(request, monkeypatch):
    """An adapter, the state behind its patch(), and patch() with all options."""
    name, kind = request.param
    if name == "trl":
        pytest.importorskip("trl", minversion="1.1")
        importlib.import_module("trl.trainer.dpo_trainer")
    elif name == "liger":
        pytest.importorskip("liger_kernel.chunked_loss")
    else:
        standin = importlib.import_module(f"tests.standins.{name}")
        standins.provide(kind, standin, monkeypatch)
    public = importlib.import_module(f"sppo_kernels.integrations.{name}")
    home = importlib.import_module(public.patch.__module__)
    yield SimpleNamespace(
        name=name,
        public=public,
        state=home._installed,
        patch=lambda: public.patch(**OPTIONS[name]),
        unpatch=public.unpatch,
    )
    if home._installed.swap is not None:
        public.unpatch()


def every(cases):
    ids = ["-".join(case) for case in cases]
    return pytest.mark.parametrize("adapter", cases, indirect=True, ids=ids)


def hooks_of(adapter, monkeypatch):
    """The adapter's table."""
    found = []
    with monkeypatch.context() as m:
        m.setattr(adapter.state, "install", found.extend)
        adapter.patch()
    return found


def bound(package):
    """All that the package's loaded modules bind, and what their classes and registries hold."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or not (name == package or name.startswith(package + ".")):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type | dict) and not key.startswith("__"):
                inside = value if isinstance(value, dict) else vars(value)
                found |= {(name, key, str(k)): v for k, v in list(inside.items())}
    return found


def changed(before, after):
    return {key for key in before | after if after.get(key) is not before.get(key)}


@every(CASES)
def test_the_very_same_objects_come_back(adapter, monkeypatch):
    """Also in a module that imported them while patched, and also after an error."""
    package = adapter.state.package
    before = bound(package)
    adapter.patch()
    inside = bound(package)
    ours = changed(before, inside)
    assert ours
    late, originals = ModuleType(f"{package}.late"), {}
    for i, key in enumerate(sorted(k for k in ours if len(k) == 2 and k[1] != "_use_triton")):
        setattr(late, f"name{i}", inside[key])  # what `from .utils import one as another` does
        originals[f"name{i}"] = before[key]
    monkeypatch.setitem(sys.modules, late.__name__, late)
    adapter.unpatch()
    assert all(getattr(late, name) is value for name, value in originals.items())
    monkeypatch.delitem(sys.modules, late.__name__)
    assert not changed(before, bound(package))
    with pytest.raises(KeyError), adapter.public.patched(**OPTIONS[adapter.name]):
        assert changed(before, bound(package)) == ours
        raise KeyError
    assert not changed(before, bound(package))


@every(CASES)
def test_patching_twice_and_unpatching_twice(adapter):
    """Nothing happens where a patch is repeatable; elsewhere an error, which changes nothing."""
    before = bound(adapter.state.package)
    adapter.patch()
    ours = bound(adapter.state.package)
    if adapter.state.repeatable:
        adapter.patch()
    else:
        with pytest.raises(IntegrationError, match="patched already"):
            adapter.patch()
    assert not changed(ours, bound(adapter.state.package))
    adapter.unpatch()
    assert not changed(before, bound(adapter.state.package))
    if adapter.state.repeatable:
        adapter.unpatch()
    else:
        with pytest.raises(IntegrationError, match="not patched"):
            adapter.unpatch()


@every(CASES)
def test_a_later_patch_is_not_undone(adapter):
    """It is named, and nothing is put back; where a patch is repeatable, the rest is."""
    before = bound(adapter.state.package)
    adapter.patch()
    owner, name, original, ours = adapter.state.swap.undo[0]
    later = type("Later", (), {})
    setattr(owner, name, later)
    if adapter.state.repeatable:
        adapter.unpatch()
    else:
        with pytest.raises(
            IntegrationError, match=f"{name}: expected our replacement, found .*Lat"
        ):
            adapter.unpatch()
    assert getattr(owner, name) is later
    setattr(owner, name, original if adapter.state.repeatable else ours)
    if not adapter.state.repeatable:
        adapter.unpatch()
    assert not changed(before, bound(adapter.state.package))


@every(CHECKED)
def test_an_unknown_layout_is_refused_by_name(adapter, monkeypatch):
    """Each place of the table in turn, with other parameters and absent; nothing is replaced."""
    tested = re.escape(adapter.state.tested)

    def refused(message):
        before = bound(adapter.state.package)
        with pytest.raises(IntegrationError, match=message):
            adapter.patch()
        assert adapter.state.swap is None
        assert not changed(before, bound(adapter.state.package))

    hooks = hooks_of(adapter, monkeypatch)
    for hook, (owner, found) in [(h, adapter.state.find(h)) for h in hooks]:
        with monkeypatch.context() as m:
            if hook.parameters is not None:
                expected = re.escape(f"{hook.name}({hook.parameters})")
                m.setattr(owner, hook.name, lambda another: None)
                refused(rf"expected .*{expected} \(as in {tested}\), found .*\(another\)")
            if found is not None and hook.name != "__init__":
                m.delattr(owner, hook.name)
                if not hasattr(owner, hook.name):  # else another one is inherited
                    refused(rf"expected .*{hook.name}.*{tested}\), found none")


@pytest.mark.parametrize("adapter", [("verl", "standin")], indirect=True)
def test_a_registry_is_not_overwritten(adapter, monkeypatch):
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    registry = core.POLICY_LOSS_REGISTRY
    monkeypatch.setitem(registry, "sppo", "theirs")
    with pytest.raises(IntegrationError, match=r"core_algos.*REGISTRY has an entry 'sppo' already"):
        adapter.patch()
    assert registry["sppo"] == "theirs"
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", ["vanilla"])
    with pytest.raises(IntegrationError, match=r"REGISTRY, a dict, .*found \['vanilla'\]"):
        adapter.patch()


@every([case for case in CHECKED if case[1] == "standin"])
def test_a_missing_package_is_no_unsupported_version(adapter, monkeypatch, tmp_path):
    """Absent framework, absent dependency, one of another version; and a module that is gone."""
    package = adapter.state.package
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {package}") as caught:
        adapter.patch()
    assert not isinstance(caught.value, IntegrationError) and caught.value.name == package

    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "absent.py").write_text("import torchaudio_of_nobody")
    (folder / "other.py").write_text("from json import torchaudio_of_nobody")
    (folder / "moved.py").write_text(f"from {package} import torchaudio_of_nobody")
    monkeypatch.syspath_prepend(tmp_path)
    tested = adapter.state.tested
    for module, error, message in (
        ("absent", ImportError, rf"{package}\.absent needs the module torchaudio_of_nobody, which"),
        (
            "other",
            ImportError,
            rf"{package}\.other needs what it imports: cannot import name 'torc",
        ),
        ("moved", IntegrationError, rf"expected an importable module {package}\.moved \(as in"),
        ("gone", IntegrationError, rf"expected an importable module {package}\.gone \(as in"),
    ):
        with pytest.raises(error, match=message):
            _swap.require_module(f"{package}.{module}", tested)
        sys.modules.pop(f"{package}.{module}", None)


def test_a_failed_replacement_leaves_nothing_behind():
    class Owner:
        first = 1

    swap = _swap.Swap("nowhere")
    swap.add(Owner, "first", 2)
    swap.add(SimpleNamespace, "second", 2)  # a built-in class takes no attribute
    with pytest.raises(TypeError):
        swap.install()
    assert Owner.first == 1 and not swap.undo


@pytest.mark.parametrize("name", STANDINS)
def test_standins_have_the_shape_of_the_frameworks(name, monkeypatch):
    """Every place of the adapter's table has the same parameters and defaults in both."""
    public = importlib.import_module(f"sppo_kernels.integrations.{name}")
    standin = importlib.import_module(f"tests.standins.{name}")
    case = SimpleNamespace(state=public._installed, patch=lambda: public.patch(**OPTIONS[name]))
    shapes = {kind: {} for kind in standins.KINDS}
    for kind, found in shapes.items():
        with monkeypatch.context() as m:
            standins.provide(kind, standin, m)
            for hook in hooks_of(case, m):
                owner = hook.owner if isinstance(hook.owner, str) else hook.owner.__name__
                if hook.parameters is not None:
                    found[owner, hook.name] = case.state.find(hook)[1]
            if name == "openrlhf":  # what the tests build it with
                actor = importlib.import_module("openrlhf.models.actor").Actor
                found["openrlhf.models.actor", "Actor"] = actor
    for place, shape in shapes["standin"].items():
        standins.same_shape(shape, shapes["real"][place])
