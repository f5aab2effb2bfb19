"""Write the measured figures into the README, from the committed results.

python -m benchmarks readme [--check]      (--check: exit 1 if the README is not current)

Every folder of benchmarks/results/ is a machine. All its results files are used, results.json
first: a case that it measured is not taken from another file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.render import ours_of, seconds, table
from benchmarks.rows import RESULTS, ROOT, SCHEMA_VERSION, Row, ceiling_ratio, read_json, same_case

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
INTRODUCTION = """\
Every provider passed a gate against float64 before it was timed, on all rows of the batch. Of
ceiling: our rate over that of the bare matrix products (3, 2 or 1) of the rows that count, or over
the bandwidth of a copy of the logits to fresh memory, in the same run, which what writes in place
or only reads can exceed.
Other columns: a provider's best time over ours, calls taken in turn. Memory: our extra peak over
eager's. Prompts and padding are rows that do not count: providers that cannot leave them out pay
for them, as in life; "all rows" has none."""
TITLES = {
    "trainable": "trainable head",
    "frozen": "frozen head",
    "forward": "hidden-in, no gradient",
    "logits": "logits-in",
    "logits-forward": "logits-in, no gradient",
}
# column: providers, of whose cells all that exist are shown
COLUMNS = {
    "eager / with float32 log-probs": ("eager", "eager, float32 log-probs"),
    "torch.compile": ("torch.compile",),
    "TRL": ("TRL chunked",),
    "Liger": ("Liger sppo_hard",),
    "Apple CCE": ("Apple CCE",),
    "`F.linear_cross_entropy`": ("F.linear_cross_entropy",),
    "released SPPO": ("released SPPO",),
}


def times(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"


def short(commit: str) -> str:
    """A commit's first characters, and whether the tree had changes beside it."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def machine_rows(folder: Path) -> tuple[list[Row], list[dict]]:
    """All rows of a machine, and the environments of the files they are from."""
    whole = folder / "results.json"
    rows, envs = [], []
    for path in sorted(folder.glob("*.json"), key=lambda p: (p != whole, p)):
        if "rows" not in (data := json.loads(path.read_text())) or data["schema"] != SCHEMA_VERSION:
            continue  # another kind of file, such as a sweep
        known = {r.key for r in rows if r.times}
        found, env = read_json(path)
        if fresh := [r for r in found if r.key not in known]:
            rows, envs = rows + fresh, [*envs, env]
    return rows, envs


def loss_lines(rows: Sequence[Row]) -> list[str]:
    """The loss path: one line for each of our implementations on each case."""
    rows = [r for r in rows if r.group in TITLES]
    fast = {r.key: ours_of(rows, r) for r in rows}
    lines = [r for r in rows if r.times and r.is_ours and "reference" not in r.provider]
    if not lines:
        return []
    measured = {r.provider for r in rows if r.times}
    shown = [column for column, names in COLUMNS.items() if measured & {*names}]
    out = []
    for ours in sorted(lines, key=lambda r: [*TITLES].index(r.group)):
        same = {r.provider: r for r in same_case(rows, ours) if r.times}
        share = ceiling_ratio(rows, ours)
        cells = [_case(ours, fast[ours.key]), "–" if share is None else f"{100 * share:.0f} %"]
        for column in shown:
            found = [same[n] for n in COLUMNS[column] if n in same]
            cells.append(" / ".join(f"{r.best / ours.best:.2f}" for r in found) or "–")
        eager = same.get("eager", ours).extra_peak
        known = "eager" in same and eager and ours.extra_peak is not None
        out.append([*cells, f"{ours.extra_peak / eager:.2f}" if known else "–"])
    return [table(["case", "of ceiling", *shown, "memory"], out)]


def _case(ours: Row, fast: Row) -> str:
    text = TITLES[ours.group]
    if ours is not fast:
        text += ours.provider.removeprefix(fast.provider)
    kind = ours.inputs.partition(",")[0]
    text += f", {ours.dtype}, {kind}" + (", all rows" if " all " in ours.inputs else "")
    return f"{text}, {ours.case}"


def game_lines(rows: Sequence[Row]) -> list[str]:
    """Preference games on one core: our time, and how many times longer the peers take."""
    rows = [r for r in rows if r.group == "games" and r.times]
    lines = []
    for what in ("fused path", "nash", "bradley_terry", "aggregate"):
        cells = []
        for size in ("K=5", "K=16"):
            case = [
                r
                for r in rows
                if f"{r.case},".startswith(f"{what} {size},") and not r.case.endswith("each")
            ]
            ours = next((r for r in case if r.is_ours), None)
            if ours is None:
                cells.append("–")
                continue
            peers = [
                f"{r.provider.removeprefix('sppo-kernels ')} {times(r.best / ours.best)}"
                for r in case
                if r is not ours
            ]
            cells.append(f"{seconds(ours.best, ours.per)}; " + ", ".join(peers))
        if set(cells) != {"–"}:
            name = "symmetrise, win rates, pair, targets" if what == "fused path" else f"`{what}`"
            lines.append([name, *cells])
    header = ("games, one core: our time; times as long for others", "K = 5", "K = 16")
    return [table(header, lines)] if lines else []


def trainer_lines(rows: Sequence[Row]) -> list[str]:
    """SPPOTrainer against TRL's DPOTrainer, in a sentence."""
    found = [r for r in rows if r.group == "trainer" and r.times]
    ours = next((r for r in found if r.is_ours), None)
    theirs = next((r for r in found if not r.is_ours), None)
    if ours is None or theirs is None:
        return []
    text = (
        f"Trainer, {ours.case}, {ours.dtype}, one thread: TRL's DPOTrainer (`sppo_hard`) takes "
        f"{theirs.best / ours.best:.1f} times our CPU time a token"
    )
    if ours.extra_peak is not None and theirs.extra_peak:
        text += f" and {theirs.extra_peak / ours.extra_peak:.1f} times our memory above the model"
    return [text + f" ({ours.note})."]


def trl_lines(rows: Sequence[Row]) -> list[str]:
    """TRL's DPOTrainer with and without `patch()`, in a sentence."""
    found = {(r.group, r.provider): r for r in rows if r.group.startswith("trl-dpo") and r.times}
    parts = {}
    for what in ("head", "step"):
        ours, theirs = (found.get((f"trl-dpo-{what}", n)) for n in ("patched", "trl"))
        if ours is None or theirs is None:
            return []
        parts[what] = f"{theirs.best / ours.best:.1f} times faster"
        if ours.extra_peak and theirs.extra_peak:
            parts[what] += f" with {ours.extra_peak / theirs.extra_peak:.2f} of the peak memory"
    compact, more = found.get(("trl-dpo-head", "trl, compact")), ""
    if compact is not None:
        more = (
            f" TRL's own function, given only the positions that have a label, takes "
            f"{compact.best / found['trl-dpo-head', 'patched'].best:.1f} times as long as ours."
        )
    return [
        f"TRL's DPOTrainer after `patch()` ({ours.case}, {ours.dtype}): its head {parts['head']}, "
        f"a whole step {parts['step']}.{more} "
        "Its gate: the step's loss and all gradients within 1e-4 of TRL's own."
    ]


def machine_block(folder: Path) -> list[str]:
    rows, envs = machine_rows(folder)
    machine = envs[0]["machine"]
    runs = dict.fromkeys(
        f"torch {e['versions']['torch']}, commit {short(e['commit'])}, {e['date'][:10]}"
        for e in envs
    )
    threads = max(e["machine"]["threads"] for e in envs)
    name = machine["gpu"] or f"{machine['cpu']}, {threads} threads"
    plots = "".join(
        f" [{n}]({(folder / f'{n}.svg').relative_to(ROOT).as_posix()})"
        for n in ("ratios", "memory")
        if (folder / f"{n}.svg").exists()
    )
    out = [f"**{name}** ({'; '.join(runs)}).{plots}", ""]
    for lines in (loss_lines(rows), game_lines(rows), trainer_lines(rows), trl_lines(rows)):
        out += [*lines, ""] if lines else []
    return out


def block() -> str:
    """The README's text between the marks."""
    out = [BEGIN, *INTRODUCTION.splitlines(), ""]
    for folder in sorted(f for f in RESULTS.iterdir() if f.is_dir()):
        if any(folder.glob("*.json")):
            out += machine_block(folder)
    return "\n".join([*out[:-1], END])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    current = head + block() + rest.split(END, 1)[1]
    if args.check:
        if current != text:
            print("README.md is not current: run python -m benchmarks readme", file=sys.stderr)
        return int(current != text)
    path.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
