"""The table of docs/objectives.md is that of KINDS.

python -m tests.loss.test_objectives    # writes it
"""

import math
import re
from pathlib import Path

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.loss.objectives import ALIASES, FAMILIES, KINDS, REFUSED
from sppo_kernels.loss.objectives.base import REFERENCE, log1mexp

DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
MARKED = re.compile(r"(?<=<!-- kinds: begin -->\n).*?(?=\n<!-- kinds: end -->)", re.S)


def taken(objective) -> str:
    """What a kind takes, as the table says it."""
    rest = [name for name in objective.needs if name not in REFERENCE]
    found = ["reference"] if set(REFERENCE) <= set(objective.needs) else []
    found += [f"`{name}`" for name in rest]
    found += [f"[`{name}`]" for name in objective.optional]
    found += [
        f"`{name}`" + ("" if default is None else f" {default:g}")
        for name, default in objective.settings.items()
    ]
    return ", ".join(found)


def tables() -> str:
    """A table for each family, under the first words of its docstring."""
    found = []
    for family in FAMILIES:
        rows = [
            f"| `{o.name}` | {o.equation.replace('|', chr(92) + '|')} | {taken(o)} | {o.source} |"
            for o in KINDS.values()
            if o.function.__module__ == family.__name__
        ]
        head = ["| kind | loss of a pair | takes | source |", "| --- | --- | --- | --- |"]
        found.append("\n".join([f"### {family.__doc__.split(':')[0]}\n", *head, *rows]))
    return "\n\n".join(found) + "\n"


def test_the_docs_hold_the_table():
    assert MARKED.search(DOCS.read_text(encoding="utf-8"))[0] == tables()
    assert tables().count("\n| `") == len(KINDS)


def test_every_kind_says_its_equation_and_source():
    text, help_text = DOCS.read_text(encoding="utf-8"), sk.pairwise_loss.__doc__
    for objective in KINDS.values():
        assert objective.equation and objective.source, objective.name
        assert f"{objective.name}: {objective.equation}" in help_text
    for name in (*ALIASES, *REFUSED):
        assert f"`{name}`" in text, name


def test_log1mexp_at_both_ends():
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 3e-7)):
        leaf = (-torch.logspace(-6.5, 1.9, 60, dtype=dtype)).requires_grad_()
        found = log1mexp(leaf)
        found.sum().backward()
        x = leaf.detach().double()
        exact = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x]
        exact = torch.tensor(exact, dtype=torch.float64)
        slope = torch.exp(x) / torch.expm1(x)
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-30)
        torch.testing.assert_close(leaf.grad.double(), slope, rtol=4 * tolerance, atol=1e-30)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("comparisons", "games.comparisons"), ("nn", "loss.modules"), ("types", "results"),
        ("objectives", "loss.objectives"), ("objectives.base", "loss.objectives.base"),
        ("pairwise", "loss.pairwise"), ("preference", "games.targets"),
    ],
)  # fmt: skip
def test_modules_by_their_old_names(old, new):
    from importlib import import_module

    assert import_module(f"sppo_kernels.{old}") is import_module(f"sppo_kernels.{new}")
    assert getattr(sk, old.split(".")[0]).__name__.startswith("sppo_kernels.")


if __name__ == "__main__":
    DOCS.write_text(MARKED.sub(lambda _: tables(), DOCS.read_text(encoding="utf-8")))
