"""Every path, symbol and figure that a document cites exists."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RESULTS = ROOT / "benchmarks" / "results"

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.*<>-]+)+/?|[\w-]+\.(?:py|md|json|toml|cpp|cu|h|svg|png|yaml)")
SYMBOL = re.compile(r"\b(sppo_kernels(?:\.\w+)+|sk\.\w+)\b")
COMMIT = re.compile(r"\bcommits? ([0-9a-f]{8,40})\b")

# Where a path may start, beside the root and the document's own folder.
BASES = ("", "docs", "sppo_kernels", "benchmarks", "tests", "csrc", "examples")
# First words of what looks like a path and is another project's, or what a run writes.
FOREIGN = (
    *("recipe", "uclaml", "verl", "openrlhf", "llamafactory", "axolotl", "trl", "transformers"),
    *("core", "cli", "data", "train", "runs", "out", "peers", "models", "modeling", "logits"),
    *("rewards", "logps", "sppo", "algorithm", "actor", "std", "eval", "round", "BENCH"),
)
UNTIL_RUN = re.compile(r"[<>*]|^(?:runs|out|/|~|\$)")


def fenced(text: str) -> str:
    """The text without its code blocks, whose paths are a reader's own."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def exists(name: str, document: Path) -> bool:
    places = [document.parent, *(ROOT / base for base in BASES)]
    if any((place / name).exists() for place in places):
        return True
    if "/" not in name:  # a file by its bare name, as code talks of its neighbours
        folders = ("sppo_kernels", "tests", "benchmarks", "csrc", "docs", "examples")
        return any(next((ROOT / f).rglob(name), None) for f in folders)
    return False


def paths(document: Path) -> list[str]:
    """Paths in backticks whose first word is a folder of ours, or that have a file's ending."""
    found = []
    for code in CODE.findall(fenced(document.read_text(encoding="utf-8"))):
        written_by_runs = "/" not in code and code.endswith((".png", ".json", ".yaml"))
        if " " in code or written_by_runs or UNTIL_RUN.search(code) or not PATH.fullmatch(code):
            continue
        first = code.split("/")[0]
        ours = (ROOT / first).exists() or "." in code.rsplit("/", 1)[-1]
        if ours and not ("/" in code and first in FOREIGN and not (ROOT / first).exists()):
            found.append(code)
    return found


def resolved(symbol: str) -> bool:
    """Whether a dotted name leads to a module or to an attribute of one."""
    parts = symbol.replace("sk.", "sppo_kernels.", 1).split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sppo_kernels"):
                return True  # a framework that is not installed here: its adapter cannot be asked
            continue
        except ImportError:
            return True
        for name in parts[depth:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def in_history(commit: str) -> bool:
    command = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_paths_and_links_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [name for name in (*links, *paths(document)) if not exists(name, document)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_symbols_exist(document):
    pytest.importorskip("transformers")
    text = document.read_text(encoding="utf-8")
    names = {n for n in SYMBOL.findall(text) if not n.endswith((".py", ".json", ".md"))}
    assert sorted(n for n in names if not resolved(n)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_figures_come_from_committed_results(document):
    """A commit beside a figure is one of a results file, or one of this history."""
    measured = {
        commit
        for file in RESULTS.rglob("*.json")
        for commit in re.findall(r'"commit":\s*"([0-9a-f]+)', file.read_text(encoding="utf-8"))
    }

    def known(commit: str) -> bool:
        return any(m.startswith(commit) or commit.startswith(m) for m in measured)

    cited = COMMIT.findall(document.read_text(encoding="utf-8"))
    assert [c for c in cited if not known(c) and not in_history(c)] == []


def test_the_patterns_see_what_they_should(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`docs/none.md` [a](gone.md) `x/y` `runs/a/b.json` commit 0123456789")
    assert paths(page) == ["docs/none.md"]
    assert LINK.findall(page.read_text()) == ["gone.md"]
    assert not exists("docs/none.md", page) and not resolved("sk.nothing")
    assert resolved("sk.nash") and resolved("sppo_kernels.loss.objectives.KINDS")
    assert not resolved("sppo_kernels.no_such_room.name")
    assert COMMIT.findall(page.read_text()) == ["0123456789"]
