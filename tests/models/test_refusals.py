"""The table of refusals: every entry is raised, reads as one message, and stands in docs/models.md.

python -m tests.models.test_refusals     writes the table of docs/models.md anew
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

import sppo_kernels
from sppo_kernels.models.refusals import REFUSALS, HeadProbeError, refused
from tests.head_cases import DOCS, write_table

SOURCES = "".join(
    file.read_text()
    for file in Path(sppo_kernels.__file__).parent.rglob("*.py")
    if file.name != "refusals.py"
)


def table() -> str:
    """The Markdown table of docs/models.md."""
    lines = ["| head | refused, because | instead |", "| --- | --- | --- |"]
    for head, _, why, instead in REFUSALS.values():
        why = why.format(reason="the message says where the two part")
        lines.append(f"| {head} | {why} | {instead} |")
    return "\n".join(lines)


@pytest.mark.parametrize("key", REFUSALS)
def test_every_entry_is_raised_with_the_values_it_names(key):
    raised = re.findall(rf'raise refused\(\s*"{key}",(.*?)\)(?: from error)?\n', SOURCES, re.S)
    assert raised, "an entry that nothing raises"
    _, message, why, instead = REFUSALS[key]
    fields = {f for _, f, _, _ in string.Formatter().parse(message + why) if f}
    assert "name" in fields
    for given in raised:
        assert fields <= set(re.findall(r"(\w+)=", given)) or "**" in given
    values = {f: 0.5 if f in ("fused", "own", "gap", "allowed") else f.upper() for f in fields}
    error = refused(key, **values)
    assert isinstance(error, HeadProbeError)
    assert str(error).endswith(f"; {instead}")
    assert "NAME" in str(error) and "{" not in str(error)


def test_the_table_in_the_docs_is_this_one():
    assert table() in DOCS.read_text(), "run python -m tests.models.test_refusals"


if __name__ == "__main__":
    write_table("refusals", table())
