"""A folder of the package is a room: floors go down, and no room imports sideways.

python -m tests.test_rooms    # lines a room, and imports against the table; `.ci/run` ends on one
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sppo_kernels"

# What each room may import beside itself. A module at the top of the package is a room of its own.
FOUNDATION = (
    "backend",
    "checks",
    "files",
    "optional",
    "options",
    "registry",
    "results",
    "testing",
    "_C",
)
BELOW = dict.fromkeys(FOUNDATION, ()) | {"backend": ("_C",), "checks": ("backend",)}
BELOW["logps"] = FOUNDATION
BELOW["games"] = FOUNDATION
BELOW["loss"] = (*BELOW["logps"], "logps")
BELOW["models"] = (*BELOW["loss"], "loss")
BELOW["data"] = (*BELOW["games"], "games")
BELOW["judges"] = (*BELOW["data"], "data")
BELOW["trainer"] = (*BELOW["models"], "models", "data", "games")
BELOW["integrations"] = (*BELOW["trainer"], "trainer")
BELOW["selfplay"] = (*BELOW["trainer"], "trainer", "judges")
BELOW["cli"] = (*BELOW["selfplay"], "selfplay")
BELOW["__main__"] = ("cli",)
BELOW["__init__"] = ("logps", "loss", "games", "results")

# Backends of a room know nothing of each other.
SIBLINGS = {"logps": ("native", "reference", "triton"), "games": ("native", "reference")}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """Of a path or module inside the package: its first part, "__init__" for the package itself."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def imported(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, parts below the package) of every import of the package in a file, however deep."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module == "sppo_kernels" else []
            names = names or [module]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "sppo_kernels":
                found.append((node.lineno, parts[1:]))
    return found


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() or name == "_C"


def wrong_imports() -> list[str]:
    """Imports that the table does not allow, each as file:line."""
    wrong = []
    for path in files():
        inside = path.relative_to(PACKAGE).parts
        room = room_of(inside)
        if room not in BELOW:
            wrong.append(f"{path.relative_to(ROOT)}: {room} is not in the table of rooms")
            continue
        for line, parts in imported(path):
            target = room_of(parts)
            if not is_room(target):  # a name of the package itself: `from sppo_kernels import nash`
                target = "__init__"
            allowed = (room, *BELOW[room])
            # the public names are those of logps, loss, games and results together
            if target == "__init__" and set(BELOW["__init__"]) <= set(allowed):
                continue
            if target not in allowed:
                where = f"{path.relative_to(ROOT)}:{line}"
                wrong.append(f"{where}: {room} imports {target}, which is not below it")
            backends = SIBLINGS.get(room, ())
            mine = inside[1].removesuffix(".py") if len(inside) > 1 else ""
            if mine in backends and target == room and len(parts) > 1:
                other = parts[1]
                if other in backends and other != mine:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {mine} imports {other}")
    return wrong


def lines_a_room() -> dict[str, int]:
    found: Counter[str] = Counter()
    for path in files():
        room = room_of(path.relative_to(PACKAGE).parts)
        room = room if (PACKAGE / room).is_dir() else "foundation"
        found[room] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def test_every_import_goes_down():
    assert wrong_imports() == []


def test_the_rule_sees_imports_wherever_they_stand(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import sppo_kernels.cli.options\n"
        "def f():\n    from sppo_kernels.trainer import SPPOTrainer\n"
        "from sppo_kernels import nash, games\n"
    )
    assert [parts for _, parts in imported(file)] == [
        ("cli", "options"),
        ("nash",),
        ("games",),
        ("trainer",),
    ]


def test_floors_have_no_circle():
    for room, below in BELOW.items():
        for other in below:
            assert room not in BELOW.get(other, ()), f"{room} and {other}"


if __name__ == "__main__":
    counts = lines_a_room()
    for name, count in counts.items():
        print(f"{count:6} {name}")
    print(f"{sum(counts.values()):6} all")
    found = wrong_imports()
    print("\n".join(found) or "every import goes down")
    sys.exit(bool(found))
