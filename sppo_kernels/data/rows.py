"""Rows of preference data: one a prompt, with K responses and how they fare against each other.

A canonical row is a dict with `prompt` (text or chat messages), `responses` (K texts), `win_rate`
(K numbers in [0, 1]) and, when known, `win_matrix` [K][K], `prompt_ids`, `response_ids`,
`ref_logps`, `judge`, and `tools` and `chat_template_kwargs` of the chat template. Other layouts are
turned into it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sppo_kernels.data.files import DataError, load_rows, read_parquet, write_parquet

__all__ = [
    "DataError",
    "OverLengthError",
    "canonical_row",
    "from_uclaml",
    "load_rows",
    "read_parquet",
    "to_uclaml",
    "write_parquet",
]

TEMPLATE = ("tools", "chat_template_kwargs")
OPTIONAL = (
    *("win_matrix", "prompt_ids", "response_ids", "ref_logps", "judge", "finished", "id"),
    *TEMPLATE,
)


class OverLengthError(DataError):
    """Responses exceed `max_length`; nothing is cut unless asked for."""


def canonical_row(row: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
    """A row in the canonical layout, checked.

    Args:
        row: `prompt, responses, win_matrix | win_rate`; or the released SPPO columns `chosen,
            rejected, chosen_probs_win, chosen_probs_lose`; or plain `[prompt,] chosen, rejected`,
            which means hard labels (win rates 1 and 0).
        index: its position, for messages.

    Raises:
        DataError: a missing column, fewer than two responses, lengths that disagree, NaN, or a
            probability outside [0, 1].
    """
    if "responses" in row or "response_ids" in row:
        return _from_group(row, index)
    if "chosen" in row and "rejected" in row:
        return _from_pair(row, index)
    raise DataError(
        f"row {index}: expected the columns prompt, responses and win_matrix or win_rate; or "
        f"chosen and rejected; got {sorted(row)}"
    )


def _from_group(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    if row.get("prompt") is None and row.get("prompt_ids") is None:
        raise DataError(f"row {index}: expected a column prompt, got {sorted(row)}")
    column = "responses" if row.get("responses") is not None else "response_ids"
    count = len(row.get(column) or [])
    if count < 2:
        raise DataError(
            f"row {index}: expected K >= 2 {column} to compare, got {count}; a single response has "
            "no win rate"
        )
    result = {"prompt": row.get("prompt"), "responses": row.get("responses")}
    matrix, rate = row.get("win_matrix"), row.get("win_rate")
    if matrix is not None:
        checked_matrix(matrix, count, index)
    if rate is not None:
        rate = _probabilities(rate, count, f"row {index}: win_rate")
    elif matrix is not None:
        from sppo_kernels.games.targets import win_rates

        rate = win_rates(matrix).tolist()
    else:
        raise DataError(f"row {index}: expected a column win_matrix or win_rate, got {sorted(row)}")
    result["win_rate"] = rate
    result |= {name: row[name] for name in OPTIONAL if row.get(name) is not None}
    for name in ("response_ids", "ref_logps"):
        if name in result and len(result[name]) != count:
            raise DataError(
                f"row {index}: {name}: expected {count} entries, one a response, got "
                f"{len(result[name])}"
            )
    if any(not math.isfinite(x) for x in result.get("ref_logps", ())):
        raise DataError(f"row {index}: ref_logps: expected finite numbers")
    return result


def _from_pair(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if prompt is None:
        if isinstance(chosen, str) or len(chosen) < 2:
            raise DataError(
                f"row {index}: expected a column prompt, or chosen as chat messages that hold it"
            )
        prompt = [dict(m) for m in chosen[:-1]]
        if [dict(m) for m in rejected[:-1]] != prompt:
            raise DataError(f"row {index}: chosen and rejected answer different prompts")
    win, lose = row.get("chosen_probs_win"), row.get("chosen_probs_lose")
    if (win is None) != (lose is None):
        raise DataError(f"row {index}: expected both chosen_probs_win and chosen_probs_lose")
    rate = [1.0, 0.0] if win is None else [win, lose]
    names = ("chosen", "rejected")
    return {
        "prompt": prompt,
        "responses": [_last_text(row[name], name, index) for name in names],
        "win_rate": _probabilities(rate, 2, f"row {index}: chosen_probs_win, chosen_probs_lose"),
        **{name: row[name] for name in TEMPLATE if row.get(name) is not None},
    }


def _last_text(side: Any, name: str, index: int) -> str:
    if isinstance(side, str):
        return side
    if side and isinstance(side[-1], Mapping) and "content" in side[-1]:
        return side[-1]["content"]
    raise DataError(f"row {index}: {name}: expected text or a list of chat messages, got {side!r}")


def checked_matrix(matrix: Any, count: int, index: int) -> None:
    """Raise DataError unless `matrix` is [K][K] numbers in [0, 1]."""
    if len(matrix) != count or any(len(line) != count for line in matrix):
        shape = [len(line) for line in matrix]
        raise DataError(
            f"row {index}: win_matrix: expected {count} x {count}, got {len(matrix)} lines of "
            f"lengths {shape}"
        )
    for i, line in enumerate(matrix):
        _probabilities(line, count, f"row {index}: win_matrix[{i}]")


def _probabilities(values: Any, count: int, name: str) -> list[float]:
    if len(values) != count:
        raise DataError(f"{name}: expected {count} numbers, one a response, got {len(values)}")
    return [probability(x, name, f" at position {k}") for k, x in enumerate(values)]


def probability(value: Any, name: str, where: str = "") -> float:
    """`value` as a number in [0, 1].

    Raises:
        DataError: it is none; the message begins with `name` and ends in `where`.
    """
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name}: expected a number, got {value!r}{where}") from None
    if not 0.0 <= number <= 1.0:  # false for NaN too
        raise DataError(f"{name}: expected a number in [0, 1], got {number}{where}")
    return number


def from_uclaml(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the released SPPO data as canonical rows with K = 2."""
    return [canonical_row(row, i) for i, row in enumerate(rows)]


def to_uclaml(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Canonical rows as the five columns of the released SPPO data: best and worst of each prompt.

    `chosen_probs` is the probability that the best beats the worst: the win matrix's entry, or,
    without a matrix, NaN, because win rates do not determine it.
    """
    return [_released(canonical_row(row, index), index) for index, row in enumerate(rows)]


def _released(row: dict[str, Any], index: int) -> dict[str, Any]:
    if row["responses"] is None or row["prompt"] is None:
        raise DataError(f"row {index}: the released layout needs texts, got token ids only")
    best, worst = best_and_worst(row["win_rate"])
    prompt, matrix = row["prompt"], row.get("win_matrix")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen, rejected = (
        [*prompt, {"role": "assistant", "content": row["responses"][k]}] for k in (best, worst)
    )
    return {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_probs": float(matrix[best][worst]) if matrix is not None else math.nan,
        "chosen_probs_win": row["win_rate"][best],
        "chosen_probs_lose": row["win_rate"][worst],
    }


def best_and_worst(win_rate: list[float]) -> tuple[int, int]:
    """First maximum and last minimum: distinct for K >= 2 even when all are equal."""
    ranked = sorted(range(len(win_rate)), key=lambda k: (-win_rate[k], k))
    return ranked[0], ranked[-1]
