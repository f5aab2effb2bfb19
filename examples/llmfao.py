"""Responses with pairwise comparisons, as prompts with a win rate for each response.

The format is that of the llmfao data set (CC BY 4.0, dustalov/llmfao): prompts.jsonl (id, text),
results.jsonl (prompt, model, result) and crowd-comparisons.csv (prompt, model_x, model_y, winner).
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Prompt(NamedTuple):
    text: str
    answers: list[str]
    win_rate: list[float]  # mean over the opponents met; a tie counts one half


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def load(folder: Path) -> list[Prompt]:
    """Prompts that have comparisons, with every response that was compared."""
    texts = {row["id"]: row["text"] for row in _rows(folder / "prompts.jsonl")}
    answers = {(r["prompt"], r["model"]): r["result"] for r in _rows(folder / "results.jsonl")}
    score = {"left": 1.0, "right": 0.0, "tie": 0.5}
    met: dict = defaultdict(lambda: defaultdict(list))
    with (folder / "crowd-comparisons.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            prompt, x, y = int(row["prompt"]), int(row["model_x"]), int(row["model_y"])
            won = score[row["winner"]]
            met[prompt, x][y].append(won)
            met[prompt, y][x].append(1.0 - won)
    found = []
    for prompt, text in texts.items():
        models = [m for p, m in met if p == prompt and (p, m) in answers]
        if len(models) < 2:
            continue
        rates = [
            sum(sum(s) / len(s) for s in met[prompt, m].values()) / len(met[prompt, m])
            for m in models
        ]
        found.append(Prompt(text, [answers[prompt, m] for m in models], rates))
    return found
