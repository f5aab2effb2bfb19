"""Canonical rows to token ids, once, before training."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any

from sppo_kernels.data.files import DataError, load_rows
from sppo_kernels.data.rows import TEMPLATE, OverLengthError, best_and_worst, canonical_row
from sppo_kernels.optional import require

logger = logging.getLogger("sppo_kernels")

CUTS = ("keep_start", "keep_end")


def prompt_token_ids(
    prompt: Any, tokenizer: Any, settings: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids of a prompt: chat messages through the template, text as the tokenizer reads it.

    Args:
        settings: further arguments of the chat template, such as `tools`.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        bos = getattr(tokenizer, "bos_token_id", None)
        # A text that a template made may begin with the BOS that the tokenizer adds.
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
    text = tokenizer.apply_chat_template(
        [dict(m) for m in prompt], tokenize=False, add_generation_prompt=True, **(settings or {})
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


def row_token_ids(
    row: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    *,
    together: bool = False,
    append_eos: bool = True,
) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt [P] and of the responses [K][n_k] of a canonical row.

    Ids that the row brings are taken as they are.

    Args:
        index: its position, for messages.
        together: False: prompt and responses are tokenized apart, as they are when a model
            generates. True, as in TRL: each response with the prompt before it, where the prompt is
            what all K have in common with it; the end token is added to plain texts that lack it,
            and responses to a chat may be messages.
        append_eos: whether responses tokenized apart end in the end token.

    Raises:
        DataError: a text that is needed is missing or no text, or a response has no tokens.
    """
    prompt, responses = row.get("prompt_ids"), row.get("response_ids")
    if prompt is None or responses is None:
        if tokenizer is None:
            raise DataError(
                f"row {index}: processing_class: a tokenizer is needed for text; rows without one "
                "must hold prompt_ids and response_ids"
            )
        _check_texts(row, index, together)
        settings = _template_settings(row)
        if together:
            prompt, responses = _together(row, tokenizer, settings)
        if prompt is None:
            prompt = prompt_token_ids(row["prompt"], tokenizer, settings)
        if responses is None:
            responses = [response_token_ids(y, tokenizer, append_eos) for y in row["responses"]]
    for k, ids in enumerate(responses):
        if len(ids) == 0:
            raise DataError(f"row {index}: response {k} has no tokens")
    return list(prompt), [list(ids) for ids in responses]


def _template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template that a row brings; `tools` may be JSON, as in TRL."""
    tools, more = (row.get(name) for name in TEMPLATE)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({} if tools is None else {"tools": tools}) | dict(more or {})


def _check_texts(row: Mapping[str, Any], index: int, together: bool) -> None:
    if row["prompt"] is None or row["responses"] is None:
        raise DataError(
            f"row {index}: expected texts (prompt and responses) or ids (prompt_ids and "
            f"response_ids), got {sorted(k for k, v in row.items() if v is not None)}"
        )
    if together and not isinstance(row["prompt"], str):
        return
    why = "as the prompt is text" if together else "since it is tokenized apart from the prompt"
    for k, text in enumerate(row["responses"]):
        if not isinstance(text, str):
            raise DataError(
                f"row {index}: responses[{k}]: expected text, {why}, got {type(text).__name__}"
            )


def _together(
    row: Mapping[str, Any], tokenizer: Any, settings: Mapping[str, Any]
) -> tuple[list[int], list[list[int]]]:
    prompt, responses = row["prompt"], row["responses"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        texts = [prompt + (y if y.endswith(end) else y + end) for y in responses]
        start, *whole = (tokenizer(text=text)["input_ids"] for text in (prompt, *texts))
    else:
        chats = [[{"role": "assistant", "content": y}] if isinstance(y, str) else list(y)
                 for y in responses]  # fmt: skip

        def ids(chat: list, **more: Any) -> list[int]:
            return tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=True, **settings, **more
            )["input_ids"]

        start = ids(list(prompt), add_generation_prompt=True)
        whole = [ids([*prompt, *chat]) for chat in chats]
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(start, *whole, strict=False))
    shared = sum(1 for _ in same)
    return start[:shared], [ids[shared:] for ids in whole]


def longest(prompt: list[int], responses: list[list[int]]) -> int:
    """Tokens of a prompt and the longest of its responses."""
    return len(prompt) + max(map(len, responses))


def cut(
    prompt: list[int], response: list[int], max_length: int | None, mode: str = "keep_start"
) -> tuple[list[int], list[int]]:
    """Prompt and response of at most `max_length` tokens together, cut on the right ("keep_start")
    or on the left ("keep_end")."""
    excess = 0 if max_length is None else len(prompt) + len(response) - max_length
    if excess <= 0:
        return prompt, response
    if mode == "keep_start":
        return prompt[:max_length], response[: max(0, len(response) - excess)]
    return prompt[excess:], response[max(0, excess - len(prompt)) :]


def _example(row: dict[str, Any], index: int, tokenizer: Any, args: Any) -> dict[str, Any]:
    prompt, responses = row_token_ids(row, index, tokenizer, append_eos=args.append_eos)
    if not prompt:
        raise DataError(
            f"row {index}: the prompt has no tokens; the first response token needs one"
        )
    win, ref = row["win_rate"], row.get("ref_logps")
    if args.pairs == "best_worst":
        keep = best_and_worst(win)
        responses, win = [responses[k] for k in keep], [win[k] for k in keep]
        ref = None if ref is None else [ref[k] for k in keep]
    return {
        "prompt_ids": prompt,
        "response_ids": responses,
        "win_rate": win,
        "ref_logps": ref,
        "length": longest(prompt, responses),
    }


def prepare_dataset(source: Any, tokenizer: Any, args: Any, name: str = "train_dataset") -> Any:
    """Token ids and win rates of every row, as a datasets.Dataset.

    Columns: prompt_ids [P], response_ids [K][n_k], win_rate [K], ref_logps [K] or None, length.

    Args:
        source: rows, as `load_rows` takes them.
        args: an SPPOConfig; of it append_eos, pairs, max_length, overlong and disable_tqdm.

    Raises:
        DataError: a row cannot be used.
        OverLengthError: responses exceed `max_length` and `overlong` is "refuse".
    """
    datasets = require("datasets")
    from tqdm import tqdm

    rows = list(load_rows(source))
    if not rows:
        raise DataError(f"{name}: expected at least one row, got none")
    examples, over, total, most = [], 0, 0, 0
    bar = tqdm(rows, desc=f"tokenize {name}", disable=args.disable_tqdm or len(rows) < 1000)
    for index, row in enumerate(bar):
        row = canonical_row(row, index)
        example = _example(row, index, tokenizer, args)
        prompt, responses = example["prompt_ids"], example["response_ids"]
        long = sum(len(prompt) + len(ids) > args.max_length for ids in responses)
        most, over = max(most, example["length"]), over + long
        total += len(row["win_rate"])
        if long and args.overlong == "drop":
            continue
        if long and args.overlong == "truncate":
            if len(prompt) >= args.max_length:
                raise OverLengthError(
                    f"row {index}: the prompt alone has {len(prompt)} tokens and max_length is "
                    f"{args.max_length}; nothing of a response would be left"
                )
            example["response_ids"] = [cut(prompt, ids, args.max_length)[1] for ids in responses]
            example["ref_logps"] = None  # of the whole responses, no longer valid
            example["length"] = args.max_length
        examples.append(example)
    if over:
        report = (
            f"{name}: {over} of {total} responses exceed max_length={args.max_length} with their "
            f"prompt (longest: {most} tokens)"
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
