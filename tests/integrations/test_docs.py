"""The snippets of docs/integrations.md compile, name what exists, and switch in three lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sppo_kernels as sk

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "integrations.md").read_text()
SECTIONS = {
    part.split("\n", 1)[0]: re.findall(r"```(\w+)\n(.*?)```", part, flags=re.DOTALL)
    for part in TEXT.split("\n## ")[1:]
}
SNIPPETS = [(name, kind, code) for name, found in SECTIONS.items() for kind, code in found]
NEEDS = {"trl": "trl", "transformers": "transformers", "liger": "liger_kernel"}


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_row_of_the_table_has_a_section_that_switches_in_three_lines():
    linked = re.findall(r"^\| \[.*?\]\(#(.*?)\)", TEXT, flags=re.MULTILINE)
    by_anchor = {anchor(title): found for title, found in SECTIONS.items()}
    assert len(linked) == 9 and set(linked) <= set(by_anchor)
    for link in linked:
        kind, code = by_anchor[link][0]
        lines = [line for line in code.splitlines() if line.strip()]
        assert kind in ("python", "yaml", "bash") and 1 <= len(lines) <= 3, link


def exists(path: str) -> None:
    """A dotted path under sppo_kernels: a module, or a name at the end of one."""
    if source(path):
        return
    module, _, name = path.rpartition(".")
    assert source(module), path
    assert re.search(rf"(class|def) {name}\b|\"{name}\"", source(module).read_text()), path


def source(path: str) -> Path | None:
    """The file of a module, found without importing it or its parents."""
    whole = ROOT.joinpath(*path.split("."))
    found = [p for p in (whole.with_suffix(".py"), whole / "__init__.py") if p.exists()]
    return found[0] if found else None


@pytest.mark.parametrize("section, kind, code", SNIPPETS)
def test_snippet(section, kind, code):
    for path in re.findall(r"sppo_kernels(?:\.\w+)+", code):
        exists(path)
    if kind != "python":
        return
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    for node in imports:
        for alias in node.names:
            part = f"{getattr(node, 'module', None) or ''}.{alias.name}".split(".")
            if len(part) > 2 and part[1] == "integrations":
                pytest.importorskip(NEEDS.get(part[2], "torch"))
    scope: dict = {}
    exec(compile(ast.Module(imports, []), section, "exec"), scope)
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):  # what the snippet calls by a module's name is there
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id not in names or hasattr(scope[node.value.id], node.attr), node.attr


def test_figures_of_the_table():
    """The number of objectives is not written by hand and forgotten."""
    from sppo_kernels.loss.objectives import KINDS

    assert f"{len(KINDS)} objectives of pairs" in TEXT
    assert callable(sk.pairwise_loss)
