"""docs/tour.md leads through the code as it is, and CONTRIBUTING's table tells how it grows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def table(document: str, columns: int) -> list[list[str]]:
    """Cells of the rows of a document's table with so many columns, without its head."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return [r for r in rows if len(r) == columns and not set("".join(r)) <= set("- ")][1:]


def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_ten_stops_each_a_file_and_a_name_in_it():
    stops = table("docs/tour.md", 4)
    assert [int(s[0]) for s in stops] == list(range(1, 11))
    for number, path, name, _ in stops:
        file = ROOT / path.strip("`")
        assert name.strip("`") in names(file), f"stop {number}: {file} has no {name}"


GROWTH = {row[0]: row for row in table("CONTRIBUTING.md", 4)}
MOST = {"operator": 4, "objective": 1, "judge": 1, "model family": 1, "integration": 1}


@pytest.mark.parametrize("what", MOST)
def test_the_smallest_example_touches_the_files_that_contributing_names(what):
    """The files of the package and of csrc/ that know the example's word, and no others."""
    _, files, example, _ = GROWTH[what]
    word = re.findall(r"`([^`]+)`", example)[0]
    told = set(re.findall(r"`([^`]+)`", files))
    assert len(told) <= MOST[what], told
    places = [*(ROOT / "sppo_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    known = [p for p in places if re.search(rf"\b{word}\b", p.read_text(encoding="utf-8"))]
    assert {str(p.relative_to(ROOT)) for p in known} == told
