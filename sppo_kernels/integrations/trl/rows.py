"""Rows of a TRL preference dataset, or of K responses a prompt, to token ids and win rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sppo_kernels.data.rows import DataError, best_and_worst, canonical_row, probability
from sppo_kernels.data.tokenize import longest, row_token_ids

# loss type -> the columns its win rates are read from
COLUMNS = {
    "sppo": ("chosen_probs_win", "chosen_probs_lose"),
    "sppo_single": ("chosen_probs",),
    "sppo_hard": (),
}


def is_group(row: Mapping[str, Any]) -> bool:
    """Whether the row holds K responses, rather than chosen and rejected."""
    return row.get("responses") is not None or row.get("response_ids") is not None


def pair_targets(row: Mapping[str, Any], index: int, kind: str) -> dict[str, Any]:
    """`win_rate` [2] of the chosen and the rejected response, and `pair`, which are they.

    Raises:
        DataError: a column is missing or not a probability; the message names it and the row.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise DataError(f"row {index}: expected a column {name}, got {sorted(row)}")
    values = [_probability(row, name, index, kind) for name in COLUMNS[kind]]
    if kind == "sppo_single":
        values = [values[0], 1.0 - values[0]]
    elif kind == "sppo_hard":
        values = [1.0, 0.0]
    return {"win_rate": values, "pair": [0, 1]}


def _probability(row: Mapping[str, Any], name: str, index: int, kind: str) -> float:
    if name not in row or row[name] is None:
        what = "is empty" if name in row else f"is not there, got {sorted(row)}"
        raise DataError(f"row {index}: loss_type {kind!r} needs the column {name}, which {what}")
    return probability(row[name], f"row {index}: {name}")


def group_example(
    row: Mapping[str, Any], index: int, tokenizer: Any, max_length: int | None
) -> dict[str, Any]:
    """`prompt_ids`, `response_ids` [K][n], `win_rate` [K], `pair` and, if given, `ref_logps` [K].

    Texts become ids as in TRL, prompt and response together; see `row_token_ids`. The pair is the
    best and the worst response by win rate.

    Raises:
        DataError: the row cannot be used; the message names its number and the column.
    """
    row = canonical_row(row, index)
    prompt, responses = row_token_ids(row, index, tokenizer, together=True)
    result = {
        "prompt_ids": prompt,
        "response_ids": responses,
        "win_rate": row["win_rate"],
        "pair": list(best_and_worst(row["win_rate"])),
    }
    if "ref_logps" in row:
        most = longest(prompt, responses)
        if max_length is not None and most > max_length:
            raise DataError(
                f"row {index}: ref_logps: is that of whole responses, but {most} tokens are cut "
                f"to max_length={max_length}; raise max_length or leave the column out"
            )
        result["ref_logps"] = [float(x) for x in row["ref_logps"]]
    return result
