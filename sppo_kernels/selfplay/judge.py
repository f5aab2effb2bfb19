"""Win matrices and targets of the responses to each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sppo_kernels.data.rows import DataError
from sppo_kernels.games.targets import win_rates
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
        The rows with `win_matrix` [K][K], `win_rate` [K] and the judge's name as `judge`.

    Raises:
        DataError: a row without prompt, or with fewer than two responses.
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
            _, matrices = compare([chunk[n] for n in at], judge, options)
            targets = win_rates(matrices)
            for n, matrix, target in zip(at, matrices.tolist(), targets.tolist(), strict=True):
                added = {"win_matrix": matrix, "win_rate": target, "judge": options.judge}
                done[n] = chunk[n] | added
        return [done[n] for n in range(len(chunk))]

    return in_parts(rows, options.judge_batch_size, path, work, title, quiet)
