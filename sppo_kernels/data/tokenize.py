"""Canonical rows to token ids, once, before training."""

from __future__ import annotations

import logging
from typing import Any

from sppo_kernels.data.rows import (
    DataError,
    OverLengthError,
    best_and_worst,
    canonical_row,
    load_rows,
)
from sppo_kernels.optional import require

logger = logging.getLogger("sppo_kernels")


def prompt_token_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """Ids of a prompt: chat messages through the template, text as the tokenizer reads it."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(
        [dict(m) for m in prompt], tokenize=False, add_generation_prompt=True
    )
    # The template wrote the special tokens; adding them again would double BOS.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def response_token_ids(text: str, tokenizer: Any, append_eos: bool) -> list[int]:
    """Ids of a response given as text, with the end token once."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return ids


def _example(row: dict[str, Any], index: int, tokenizer: Any, args: Any) -> dict[str, Any]:
    if row.get("prompt_ids") is None or row.get("response_ids") is None:
        if tokenizer is None:
            raise DataError(
                f"row {index}: processing_class: a tokenizer is needed for text; rows without one "
                "must hold prompt_ids and response_ids"
            )
        if row["prompt"] is None or row["responses"] is None:
            raise DataError(f"row {index}: expected prompt and responses, or the ids of both")
    prompt = row.get("prompt_ids")
    if prompt is None:
        prompt = prompt_token_ids(row["prompt"], tokenizer)
    responses = row.get("response_ids")
    if responses is None:
        responses = [response_token_ids(t, tokenizer, args.append_eos) for t in row["responses"]]
    if len(prompt) == 0:
        raise DataError(
            f"row {index}: the prompt has no tokens; the first response token needs one"
        )
    for k, ids in enumerate(responses):
        if len(ids) == 0:
            raise DataError(f"row {index}: response {k} has no tokens")
    win, ref = row["win_rate"], row.get("ref_logps")
    if args.pairs == "best_worst":
        keep = best_and_worst(win)
        responses, win = [responses[k] for k in keep], [win[k] for k in keep]
        ref = None if ref is None else [ref[k] for k in keep]
    return {
        "prompt_ids": list(prompt),
        "response_ids": [list(ids) for ids in responses],
        "win_rate": win,
        "ref_logps": ref,
        "length": len(prompt) + max(map(len, responses)),
    }


def prepare_dataset(source: Any, tokenizer: Any, args: Any, name: str = "train_dataset") -> Any:
    """Token ids and win rates of every row, as a datasets.Dataset.

    Columns: prompt_ids [P], response_ids [K][n_k], win_rate [K], ref_logps [K] or None, length.

    Raises:
        DataError: a row cannot be used.
        OverLengthError: responses exceed `max_length` and `overlong` is "refuse".
    """
    datasets = require("datasets")
    from tqdm import tqdm

    rows = list(load_rows(source))
    if not rows:
        raise DataError(f"{name}: expected at least one row, got none")
    examples, over, longest = [], 0, 0
    bar = tqdm(rows, desc=f"tokenize {name}", disable=args.disable_tqdm or len(rows) < 1000)
    for index, row in enumerate(bar):
        example = _example(canonical_row(row, index), index, tokenizer, args)
        longest = max(longest, example["length"])
        room = args.max_length - len(example["prompt_ids"])
        long = sum(len(ids) > room for ids in example["response_ids"])
        over += long
        if long and args.overlong == "drop":
            continue
        if long and args.overlong == "truncate":
            if room < 1:
                raise OverLengthError(
                    f"row {index}: the prompt alone has {len(example['prompt_ids'])} tokens and "
                    f"max_length is {args.max_length}; nothing of a response would be left"
                )
            example["response_ids"] = [ids[:room] for ids in example["response_ids"]]
            example["ref_logps"] = None  # of the whole responses, no longer valid
            example["length"] = args.max_length
        examples.append(example)
    if over:
        total = sum(len(canonical_row(row, i)["win_rate"]) for i, row in enumerate(rows))
        report = (
            f"{name}: {over} of {total} responses exceed max_length={args.max_length} with their "
            f"prompt (longest: {longest} tokens)"
        )
        if args.overlong == "refuse":
            raise OverLengthError(
                f"{report}; raise max_length, or choose overlong='drop' or 'truncate'"
            )
        done = "prompts dropped" if args.overlong == "drop" else "responses truncated"
        logger.warning("%s: %s, as overlong=%r asks", report, done, args.overlong)
    if not examples:
        raise OverLengthError(f"{name}: no prompt is left after overlong='drop'")
    return datasets.Dataset.from_list(examples)
