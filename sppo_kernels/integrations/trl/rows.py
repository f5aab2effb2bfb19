"""Rows of a TRL preference dataset, or of K responses a prompt, to token ids and win rates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sppo_kernels.data.rows import DataError, best_and_worst, canonical_row

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
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise DataError(f"row {index}: {name}: expected a number, got {row[name]!r}") from None
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise DataError(f"row {index}: {name}: expected a number in [0, 1], got {value}")
    return value


def group_example(
    row: Mapping[str, Any], index: int, tokenizer: Any, max_length: int | None
) -> dict[str, Any]:
    """`prompt_ids`, `response_ids` [K][n], `win_rate` [K], `pair` and, if given, `ref_logps` [K].

    Texts become ids as in TRL: prompt and response are tokenized together, the end token is added
    to plain texts that lack it, chats go through the template, and the prompt is what all K have
    in common with it. Ids that a row brings are taken as they are. The pair is the best and the
    worst response by win rate.

    Raises:
        DataError: the row cannot be used; the message names its number and the column.
    """
    checked = canonical_row(row, index)
    prompt, responses = checked.get("prompt_ids"), checked.get("response_ids")
    if prompt is None or responses is None:
        prompt, responses = _tokenize(row, checked, index, tokenizer)
    for k, ids in enumerate(responses):
        if len(ids) == 0:
            raise DataError(f"row {index}: response {k} has no tokens")
    result = {
        "prompt_ids": list(prompt),
        "response_ids": [list(ids) for ids in responses],
        "win_rate": checked["win_rate"],
        "pair": list(best_and_worst(checked["win_rate"])),
    }
    if "ref_logps" in checked:
        longest = len(prompt) + max(map(len, responses))
        if max_length is not None and longest > max_length:
            raise DataError(
                f"row {index}: ref_logps: is that of whole responses, but {longest} tokens are cut "
                f"to max_length={max_length}; raise max_length or leave the column out"
            )
        result["ref_logps"] = [float(x) for x in checked["ref_logps"]]
    return result


def _tokenize(
    row: Mapping[str, Any], checked: Mapping[str, Any], index: int, tokenizer: Any
) -> tuple[list[int], list[list[int]]]:
    prompt, responses = checked["prompt"], checked["responses"]
    if prompt is None or responses is None:
        raise DataError(
            f"row {index}: expected texts (prompt and responses) or ids (prompt_ids and "
            f"response_ids), got {sorted(k for k, v in row.items() if v is not None)}"
        )
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        whole = []
        for k, text in enumerate(responses):
            if not isinstance(text, str):
                raise DataError(
                    f"row {index}: responses[{k}]: expected text, as the prompt is text, got "
                    f"{type(text).__name__}"
                )
            whole.append(prompt + (text if text.endswith(end) else text + end))
        start = tokenizer(text=prompt)["input_ids"]
        full = [tokenizer(text=text)["input_ids"] for text in whole]
    else:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        settings = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        messages = [
            [{"role": "assistant", "content": y}] if isinstance(y, str) else list(y)
            for y in responses
        ]

        def ids(chat: list, **more: Any) -> list[int]:
            out = tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=True, **settings, **more
            )
            return out["input_ids"]

        start = ids(list(prompt), add_generation_prompt=True)
        full = [ids(list(prompt) + chat) for chat in messages]
    shared = min(_common(start, other) for other in full)
    return start[:shared], [other[shared:] for other in full]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
