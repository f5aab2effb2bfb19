"""Comparisons made before as a judge."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.games.comparisons import load_comparisons
from sppo_kernels.judges.base import JudgeError, ordered_pairs, prompt_text

logger = logging.getLogger("sppo_kernels")


class RecordedJudge:
    """Comparisons made before, by people or models, as counts of wins.

    c_ij = log((wins of i over j + s) / (wins of j over i + s)), a tie being half a win to each and
    s the pseudo-count; pairs never compared get 0, a coin toss, and are counted in `unseen`.

    Args:
        table: a CSV path or a list of dicts with one comparison a row.
        prompt, left, right, winner: names of its columns; texts are matched exactly, winners are
            what `load_comparisons` understands: "left", "right", "tie" or a share of the win.
        smoothing: the pseudo-count s, above 0.
        missing: "coin" as above, or "refuse": a pair never compared is an error.

    Raises:
        JudgeError: a missing column, or an unknown winner with its row.
    """

    def __init__(
        self,
        table: str | os.PathLike | Sequence[Mapping[str, Any]],
        *,
        prompt: str = "prompt",
        left: str = "response_x",
        right: str = "response_y",
        winner: str = "winner",
        smoothing: float = 0.5,
        missing: str = "coin",
    ) -> None:
        if not smoothing > 0:
            raise JudgeError(f"smoothing: expected a number above 0, got {smoothing}")
        if missing not in ("coin", "refuse"):
            raise JudgeError(f"missing: expected 'coin' or 'refuse', got {missing!r}")
        self.smoothing, self.missing, self.unseen = smoothing, missing, 0
        if not isinstance(table, (str, os.PathLike)):
            names = (prompt, left, right, winner)
            present = [name for name in names if all(name in row for row in table)]
            table = {name: [row[name] for row in table] for name in present}
            if prompt in table:
                table[prompt] = [prompt_text(x) for x in table[prompt]]
        try:
            found = load_comparisons(table, game=prompt, left=left, right=right, winner=winner)
        except ValueError as error:
            raise JudgeError(str(error)) from error
        self.wins: dict[tuple[str, str, str], float] = defaultdict(float)
        columns = (found.game.tolist(), found.i.tolist(), found.j.tolist(), found.outcome.tolist())
        for row, (game, i, j, share) in enumerate(zip(*columns, strict=True)):
            if not 0 <= share <= 1:
                raise JudgeError(f"{winner}: expected a share in [0, 1], got {share} in row {row}")
            question, texts = found.games[game], found.responses[game]
            self.wins[question, texts[i], texts[j]] += share
            self.wins[question, texts[j], texts[i]] += 1.0 - share

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        pairs, count = ordered_pairs(prompts, responses), len(responses[0])
        result, unseen = torch.zeros(len(prompts), count, count), 0
        for n, i, j in pairs:
            question, first, second = prompt_text(prompts[n]), responses[n][i], responses[n][j]
            if first == second:
                continue
            if (question, first, second) in self.wins:
                won = self.wins[question, first, second] + self.smoothing
                lost = self.wins[question, second, first] + self.smoothing
                result[n, i, j] = math.log(won / lost)
            elif self.missing == "refuse":
                raise JudgeError(f"prompt {n}: responses {i} and {j} were never compared")
            else:
                unseen += 1
        self.unseen += unseen
        if unseen:
            logger.warning("recorded judge: %d ordered pairs were never compared", unseen)
        return result


JUDGE = (RecordedJudge, "FILE")  # `--judge recorded:FILE`
