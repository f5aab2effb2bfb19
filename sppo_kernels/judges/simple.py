"""Judges that run no model: a Python function, and a table of comparisons."""

from __future__ import annotations

import csv
import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.judges.base import JudgeError, check_batch, prompt_text

logger = logging.getLogger("sppo_kernels")


class CallableJudge:
    """A function `(prompt, first, second) -> log-odds that first is preferred`.

    Args:
        function: the function, or "module:function". A function with the attribute `batched = True`
            gets all prompts and responses at once and returns [n, K, K].

    Raises:
        JudgeError: the name does not lead to a callable, or its result has a wrong shape or type.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        if isinstance(function, str):
            module, _, name = function.partition(":")
            try:
                function = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise JudgeError(f"judge: cannot find {module}:{name} ({error})") from error
        if not callable(function):
            raise JudgeError(f"judge: expected a callable, got {type(function).__name__}")
        self.function = function

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        count = check_batch(prompts, responses)
        if getattr(self.function, "batched", False):
            result = torch.as_tensor(self.function(prompts, responses), dtype=torch.float32)
        else:
            result = torch.zeros(len(prompts), count, count)
            for n, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
                for i in range(count):
                    for j in range(count):
                        if i != j:
                            result[n, i, j] = float(self.function(prompt, answers[i], answers[j]))
        if result.shape != (len(prompts), count, count):
            raise JudgeError(
                f"judge: expected [{len(prompts)}, {count}, {count}], got {tuple(result.shape)}"
            )
        return result


class RecordedJudge:
    """Comparisons made before, by people or models, as counts of wins.

    c_ij = log((wins of i over j + s) / (wins of j over i + s)), a tie being half a win to each and
    s the pseudo-count; pairs never compared get 0, a coin toss, and are counted in `unseen`.

    Args:
        table: a CSV path or a list of dicts with one comparison a row.
        prompt, left, right, winner: names of its columns; texts are matched exactly;
            `winner` is "left", "right" or "tie".
        smoothing: the pseudo-count s, above 0.
        missing: "coin" as above, or "refuse": a pair never compared is an error.

    Raises:
        JudgeError: a missing column or an unknown winner, with its row.
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
        if isinstance(table, (str, os.PathLike)):
            with open(table, newline="", encoding="utf-8") as file:
                table = list(csv.DictReader(file))
        self.smoothing, self.missing, self.unseen = smoothing, missing, 0
        self.wins: dict[tuple[str, str, str], float] = {}
        shares = {"left": 1.0, "right": 0.0, "tie": 0.5}
        for number, row in enumerate(table):
            absent = [c for c in (prompt, left, right, winner) if c not in row]
            if absent:
                raise JudgeError(f"row {number}: expected the columns {absent}, got {sorted(row)}")
            if row[winner] not in shares:
                raise JudgeError(
                    f"row {number}: {winner}: expected left, right or tie, got {row[winner]!r}"
                )
            share = shares[row[winner]]
            question = prompt_text(row[prompt])
            for first, second, won in (
                (row[left], row[right], share),
                (row[right], row[left], 1.0 - share),
            ):
                key = (question, first, second)
                self.wins[key] = self.wins.get(key, 0.0) + won

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        count = check_batch(prompts, responses)
        result = torch.zeros(len(prompts), count, count)
        unseen = 0
        for n, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
            question = prompt_text(prompt)
            for i in range(count):
                for j in range(count):
                    if answers[i] == answers[j]:
                        continue
                    won = self.wins.get((question, answers[i], answers[j]))
                    if won is None:
                        unseen += 1
                        if self.missing == "refuse":
                            raise JudgeError(
                                f"prompt {n}: responses {i} and {j} were never compared"
                            )
                        continue
                    lost = self.wins[(question, answers[j], answers[i])]
                    result[n, i, j] = math.log((won + self.smoothing) / (lost + self.smoothing))
        self.unseen += unseen
        if unseen:
            logger.warning("recorded judge: %d ordered pairs were never compared", unseen)
        return result
