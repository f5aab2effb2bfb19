"""Win matrices and targets of the responses to each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sppo_kernels.data.rows import DataError
from sppo_kernels.games import preference_targets
from sppo_kernels.judges.base import Judge, win_matrices
from sppo_kernels.selfplay.options import JudgeOptions
from sppo_kernels.selfplay.stages import in_parts


def compare(
    rows: list[dict[str, Any]], judge: Judge, options: JudgeOptions
) -> tuple[Tensor, Tensor]:
    """Logits and win matrices, both [n, K, K], of n rows with K responses each."""
    logits = judge.logits([row["prompt"] for row in rows], [row["responses"] for row in rows])
    return logits, win_matrices(
        logits, debias=options.debias, temperature=options.judge_temperature
    )


def train_on(logits: Tensor, matrices: Tensor, options: JudgeOptions) -> Tensor:
    """The targets [n, K] of games given as `compare` returns them."""
    raw = options.targets == "uclaml"  # has its own way from logits to probabilities
    x = logits / options.judge_temperature if raw else matrices
    try:
        found = preference_targets(x, options.targets, logits=raw, tau=options.targets_tau)
        if bool(found.isnan().any()):  # wins that are all but certain
            raise ValueError("no finite strengths exist")
        return found
    except ValueError as error:
        raise DataError(f"--targets: {options.targets}: {error}") from error


def judge_rows(
    rows: list[dict[str, Any]],
    judge: Judge,
    path: str | Path,
    options: JudgeOptions,
    title: str = "judge",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Judge the responses of each row into a Parquet file.

    Returns:
        The rows with `win_matrix` [K][K], the judge's name as `judge`, and as `win_rate` [K] what
        is trained on: the targets that the options ask for (see `games.preference_targets`).

    Raises:
        DataError: a row without prompt or with fewer than two responses; games that have no such
            targets.
    """
    for index, row in enumerate(rows):
        count = len(row.get("responses") or [])
        if row.get("prompt") is None or count < 2:
            raise DataError(
                f"row {index}: expected a prompt and at least 2 responses, got {count} responses"
            )

    def work(chunk: list[dict[str, Any]], _part: int) -> list[dict[str, Any]]:
        done: dict[int, dict[str, Any]] = {}
        for count in sorted({len(row["responses"]) for row in chunk}):  # a call takes one K
            at = [n for n, row in enumerate(chunk) if len(row["responses"]) == count]
            logits, matrices = compare([chunk[n] for n in at], judge, options)
            targets = train_on(logits, matrices, options)
            for n, matrix, target in zip(at, matrices.tolist(), targets.tolist(), strict=True):
                added = {"win_matrix": matrix, "win_rate": target, "judge": options.judge}
                done[n] = chunk[n] | added
        return [done[n] for n in range(len(chunk))]

    return in_parts(rows, options.judge_batch_size, path, work, title, quiet)
