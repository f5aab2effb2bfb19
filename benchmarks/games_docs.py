"""Regenerates what docs/games.md shows: the table of real games and the plot of self-play.

    python -m benchmarks.games_docs --llmfao ../shared/data/llmfao

The table stands between the `llmfao` markers of docs/games.md and is rewritten in place; every row
is checked against evalica first. The plot goes to docs/games-selfplay.svg and needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.game_cases import evalica_win_rates
from benchmarks.llmfao import by_id
from benchmarks.render import table
from sppo_kernels.games.comparisons import aggregate, load_comparisons
from sppo_kernels.games.solvers import bradley_terry, nash, tournament
from sppo_kernels.results import Comparisons

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- llmfao: begin -->", "<!-- llmfao: end -->"


def llmfao_table(folder: Path) -> str:
    """Markdown table with one row a prompt, and one for all prompts together."""
    path = folder / "crowd-comparisons.csv"
    names = by_id(folder / "models.jsonl", "id", "name")
    slugs = by_id(folder / "prompts.jsonl", "id", "slug")
    header = (
        "prompt", "models", "comparisons", "ties", "best by win rate", "its rate",
        "in equilibrium", "exploitability", "3-cycles", "Smith set", "wins connect all",
        "difference to evalica",
    )  # fmt: skip
    by_prompt, together = load_comparisons(path), load_comparisons(path, game=None)
    together = together._replace(games=["all"])
    titles = {**slugs, "all": "all prompts"}
    rows = [row(t, g, titles, names) for t in (by_prompt, together) for g in range(len(t.games))]
    ties = float((together.outcome == 0.5).float().mean())
    found = table(header, rows, left=("best by win rate", "wins connect all"))
    return (
        f"{found}\n\n"
        f"{len(by_prompt.games)} prompts, {len(together.outcome):,} comparisons, {ties:.0%} ties."
    )


def row(table: Comparisons, g: int, titles: dict[str, str], names: dict[str, str]) -> list:
    """The game number g of a table, after its win rates have been compared with evalica's."""
    pooled, n = aggregate(table), int(table.lengths[g])
    p, lengths = pooled.P[g], table.lengths[g]
    equilibrium, majority = nash(p, lengths), tournament(p, lengths)
    strengths = bradley_terry(p, lengths, counts=pooled.counts[g])
    rows = table.game == g
    outcomes = table.outcome[rows]
    theirs = evalica_win_rates(table.i[rows], table.j[rows], outcomes)()
    rates = pooled.win_rate[g, :n]
    difference = np.abs(rates.numpy() - theirs.to_numpy()).max()
    assert difference < 1e-12, (table.games[g], difference)
    best = int(rates.argmax())
    return [
        titles.get(table.games[g], table.games[g]),
        n,
        f"{int(rows.sum()):,}",
        f"{float((outcomes == 0.5).float().mean()):.0%}",
        names.get(table.responses[g][best], table.responses[g][best]),
        f"{float(rates[best]):.3f}",
        int((equilibrium.strategy > 0).sum()),
        f"{float(equilibrium.residual):.1e}",
        int(majority.cycles),
        int(majority.smith.sum()),
        "yes" if strengths.connected else "no",
        f"{difference:.1e}",
    ]


def self_play(p: torch.Tensor, eta: float, steps: int) -> tuple[list[float], list[float], float]:
    """Exploitability of the last and of the mean policy after every step of tabular SPPO."""
    policy = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    mean, last, average = torch.zeros(3, dtype=torch.float64), [], []
    for t in range(1, steps + 1):
        mean += (policy - mean) / t
        last.append(float((p @ policy).max()) - 0.5)
        average.append(float((p @ mean).max()) - 0.5)
        policy = torch.softmax(policy.log() + eta * (p @ policy), -1)
    return last, average, float((mean - nash(p).strategy).abs().max())


def plot_self_play(path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sppo-kernels"
    import matplotlib.pyplot as plt

    p = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.75], [0.7, 0.25, 0.5]], dtype=torch.float64)
    last, average, distance = self_play(p, eta=0.01, steps=50_000)
    assert distance < 5e-3, distance
    figure, axes = plt.subplots(figsize=(6, 3.5))
    steps = range(1, len(last) + 1)
    axes.loglog(steps, last, linewidth=0.8, label="policy of the round")
    axes.loglog(steps, average, label="mean of the policies so far")
    axes.set_xlabel("rounds of self-play")
    axes.set_ylabel("exploitability (win rate above 1/2)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"{path}: mean policy within {distance:.1e} of nash() after {len(last)} rounds")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llmfao", type=Path, help="folder with the llmfao comparisons")
    options = parser.parse_args(arguments)
    if options.llmfao:
        page = DOCS / "games.md"
        text = page.read_text()
        head, rest = text.split(BEGIN)
        _, tail = rest.split(END)
        page.write_text(f"{head}{BEGIN}\n{llmfao_table(options.llmfao)}\n{END}{tail}")
    plot_self_play(DOCS / "games-selfplay.svg")


if __name__ == "__main__":
    main()
