"""`sppo judge`: win matrices and win rates for the responses of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_kernels.cli.options import JudgeOptions, _help, needed, parse
from sppo_kernels.cli.stages import in_parts
from sppo_kernels.data.rows import DataError, read_parquet
from sppo_kernels.games.targets import win_rates
from sppo_kernels.judges import Judge, load_judge, win_matrices


@dataclass
class FileOptions:
    """Files."""

    input: str = _help("Parquet file with prompt and responses.", "")
    output: str = _help("Parquet file to write.", "")


def judge_rows(
    rows: list[dict[str, Any]],
    judge: Judge,
    path: Path,
    options: JudgeOptions,
    name: str = "",
    title: str = "judge",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """The rows with `logits, win_matrix` [K][K], `win_rate` [K] and the judge's name added."""
    for index, row in enumerate(rows):
        count = len(row.get("responses") or [])
        if row.get("prompt") is None or count < 2:
            raise DataError(
                f"row {index}: expected a prompt and at least 2 responses, got {count} responses"
            )

    def work(chunk: list[dict[str, Any]], _part: int) -> list[dict[str, Any]]:
        done: dict[int, dict[str, Any]] = {}
        counts = sorted({len(row["responses"]) for row in chunk})
        for count in counts:  # a call takes prompts with the same K
            at = [n for n, row in enumerate(chunk) if len(row["responses"]) == count]
            logits = judge.logits(
                [chunk[n]["prompt"] for n in at], [chunk[n]["responses"] for n in at]
            )
            matrices = win_matrices(
                logits, debias=options.debias, temperature=options.judge_temperature
            )
            rates = win_rates(matrices)
            for k, n in enumerate(at):
                done[n] = chunk[n] | {
                    "logits": logits[k].tolist(),
                    "win_matrix": matrices[k].tolist(),
                    "win_rate": rates[k].tolist(),
                    "judge": name,
                }
        return [done[n] for n in range(len(chunk))]

    return in_parts(rows, options.judge_batch_size, path, work, title, quiet)


def run(argv: Sequence[str]) -> None:
    files, options = parse((FileOptions, JudgeOptions), argv, "sppo judge", __doc__)
    needed(files, "input", "output")
    needed(options, "judge")
    rows = judge_rows(
        read_parquet(files.input),
        load_judge(options.judge),
        Path(files.output),
        options,
        options.judge,
    )
    spread = sum(max(r["win_rate"]) - min(r["win_rate"]) for r in rows) / len(rows)
    print(f"{files.output}: {len(rows)} prompts, best minus worst win rate {spread:.3f} on average")
