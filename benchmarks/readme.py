"""Write the table of measured figures into the README, from the committed results.

python -m benchmarks.readme [--check]      (--check: exit 1 if the README is not current)
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.harness import ROOT, Result
from benchmarks.render import is_ceiling

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = """\
Loss path on the CPU, 2048 tokens (8 responses), D = 1024, V = 50304: ratios of the best times of
one interleaved run, and extra peak memory of a fresh process. Ceilings: the 3, 2 or 1 bare matrix
products; for logits-in a copy of the logits, which forward alone beats, since it writes nothing.
Every provider passed a gate against float64 before it was timed."""
TITLES = {
    "trainable": "hidden-in, trainable head",
    "frozen": "hidden-in, frozen head",
    "forward": "hidden-in, no gradient",
    "logits": "logits-in, with gradient",
    "logits-forward": "logits-in, no gradient",
}
PEERS = ("eager", "eager, float32 log-probs", "torch.compile", "TRL chunked", "Liger sppo_hard")


def short(commit: str) -> str:
    """A commit's first characters, and whether the tree had changes beside it."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def line(title: str, ours: Result, same: dict[str, Result], ceiling: Result) -> str:
    """One row of the table: `ours` against the ceiling and the peers of the same run."""
    cells = [title, f"{ours.best / ceiling.best:.2f}"]
    for name in PEERS:
        peer = same.get(name)
        cells.append(f"{peer.best / ours.best:.2f}" if peer and peer.best else "–")
    eager = same["eager"].extra_peak
    cells.append(
        "–" if eager is None or ours.extra_peak is None else f"{ours.extra_peak / eager:.2f}"
    )
    return "| " + " | ".join(cells) + " |"


def core_rows() -> tuple[list[str], str]:
    """One line a group and dtype of core-cpu*.json, and the machine's line."""
    results, notes = [], []
    for path in sorted(RESULTS.glob("core-cpu*.json")):
        data = json.loads(path.read_text())
        known = Result.__dataclass_fields__
        results += [Result(**{k: v for k, v in r.items() if k in known}) for r in data["results"]]
        machine, versions = data["machine"], data["versions"]
        notes.append(
            f"{machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, commit "
            f"{short(data['commit'])}, {data['date'][:10]}"
        )
    lines = [
        "| case | x bare GEMMs, or copy | " + " | ".join(f"{p}, x ours" for p in PEERS)
        + " | memory, ours : eager |",
        "|" + " --- |" * (len(PEERS) + 3),
    ]  # fmt: skip
    for group, dtype in dict.fromkeys((r.group, r.dtype) for r in results):
        same = {r.provider: r for r in results if (r.group, r.dtype) == (group, dtype)}
        ours = next(r for n, r in same.items() if n.startswith("sppo-kernels"))
        ceiling = next((r for r in same.values() if is_ceiling(r)), None)
        lines.append(line(f"{TITLES[group]}, {dtype}", ours, same, ceiling))
        for name, result in same.items():
            if name.endswith("in place"):
                lines.append(line(f"{TITLES[group]}, in place, {dtype}", result, same, ceiling))
    return lines, "; ".join(dict.fromkeys(notes))


def block() -> str:
    """The README's text between the marks."""
    lines, machine = core_rows()
    games = json.loads((RESULTS / "games-cpu.json").read_text())
    return "\n".join(
        [
            BEGIN,
            *INTRODUCTION.splitlines(),
            "",
            *lines,
            "",
            f"Measured on: {machine} (a shared machine; `python -m benchmarks.core`).",
            "",
            *game_lines(games),
            END,
        ]
    )


def game_lines(games: dict) -> list[str]:
    """Preference games on one core: nanoseconds or microseconds a game, and ratios."""
    fused, nash = games["fused path"], games["nash"]
    bt, agg = games["bradley_terry"], games["aggregate"]
    lines = [
        "| preference games, one core | K = 5 | K = 16 |",
        "| --- | --- | --- |",
        "| fused path (symmetrise, win rates, pair, targets), ns a prompt | "
        + " | ".join(f"{fused[k]['ns_per_prompt']:.0f}" for k in ("K=5", "K=16")) + " |",
        "| – times faster than the eager reference / the leanest eager code | "
        + " | ".join(
            f"{fused[k]['times_faster_than_reference']:.1f} / "
            f"{fused[k]['times_faster_than_lean_eager']:.1f}" for k in ("K=5", "K=16")
        ) + " |",
        "| `nash`, µs a game (largest exploitability 1e-14) / times faster than nashpy | "
        + " | ".join(
            f"{nash[k]['us_per_game']:.2f} / {nash[k]['times_faster_than_nashpy']:.0f}"
            for k in ("K=5", "K=16")
        ) + " |",
        "| `bradley_terry`, times faster than evalica | "
        + " | ".join(f"{bt[k]['times_faster_than_evalica']:.0f}" for k in ("K=5", "K=16")) + " |",
        "| `aggregate`, times faster than evalica | "
        + " | ".join(f"{v['times_faster_than_evalica']:.0f}" for v in list(agg.values())[:2])
        + " |",
    ]  # fmt: skip
    machine = games["machine"]
    lines += [
        "",
        f"Measured on: {machine['cpu']}, {games['clock']}, torch {machine['versions']['torch']}, "
        f"commit {machine['commit'][:12]} (`python -m benchmarks.games`).",
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    head, rest = text.split(BEGIN, 1)
    current = head + block() + rest.split(END, 1)[1]
    if args.check:
        return int(current != text)
    path.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
