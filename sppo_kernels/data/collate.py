"""Examples to batches. All index work happens here, on the host, so the device is never waited for.

Packed batches hold each prompt once, followed by its responses: [p | y_1 | ... | y_K | p' | ...].
The last prompt token's row predicts the first token of every response. The last token of a response
predicts nothing and is left out of the input. Padded batches hold a row for each response, after
its prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.data.layout import PackedLayout
from sppo_kernels.data.rows import best_and_worst
from sppo_kernels.data.tokenize import CUTS, cut

# Columns that a batch is made of; TRL's pairs have chosen_ids and rejected_ids.
COLUMNS = ("prompt_ids", "response_ids", "chosen_ids", "rejected_ids", "win_rate", "pair")


class HostBatch:
    """What the loss needs beside the model's input; stays on the CPU.

    Not a dataclass: wrappers such as FSDP look into dataclasses, move their tensors to the device
    and cast them to the policy's dtype, which would round win rates and log-probabilities.

    Attributes:
        labels: [L] response tokens.
        rows: [L] rows of the flattened hidden states that predict them.
        cu_seqlens: [S+1] bounds of the responses in labels.
        win_rate: [S]; ref_logps: [S] or None.
        groups: number of responses of each prompt, in order.
        pairs: for each prompt, which of the S responses is chosen and which rejected.
        layout: of the packed tokens, None when padded.
        width: tokens of a row of the input.
        tokens, padding: tokens given to the model, and those beside them that are padding.
    """

    def __init__(
        self,
        labels: Tensor,
        rows: Tensor,
        cu_seqlens: Tensor,
        win_rate: Tensor,
        ref_logps: Tensor | None,
        groups: list[int],
        pairs: list[tuple[int, int]],
        layout: PackedLayout | None = None,
        width: int = 0,
        tokens: int = 0,
        padding: int = 0,
    ) -> None:
        self.labels, self.rows, self.cu_seqlens = labels, rows, cu_seqlens
        self.win_rate, self.ref_logps = win_rate, ref_logps
        self.groups, self.pairs = groups, pairs
        self.layout, self.width = layout, width
        self.tokens, self.padding = tokens, padding

    def replaced(self, ref_logps: Tensor | None) -> HostBatch:
        """The same batch with other reference log-probabilities."""
        other = copy.copy(self)
        other.ref_logps = ref_logps
        return other


def pad(
    lines: Sequence[Sequence[int]], value: int, *, left: bool = False, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """Lines of token ids as `ids` and `mask` [B, T], int64; the mask is 1 where a token is.

    Args:
        value: fills the rest of each line.
        left: fill before the tokens instead of after them, as generation needs.
        multiple: T is a multiple of it.
    """
    width = max(map(len, lines))
    width += -width % (multiple or 1)
    ids = torch.full((len(lines), width), value)
    mask = torch.zeros_like(ids)
    for b, line in enumerate(lines):
        at = slice(width - len(line), width) if left else slice(len(line))
        ids[b, at] = torch.tensor(line, dtype=ids.dtype)
        mask[b, at] = 1
    return ids, mask


def responses_of(example: Mapping[str, Any]) -> list[list[int]]:
    """`response_ids` [K][n_k], or TRL's chosen_ids and rejected_ids."""
    found = example.get("response_ids")
    return [example["chosen_ids"], example["rejected_ids"]] if found is None else found


class SPPOCollator:
    """Batches of examples with `prompt_ids, response_ids, win_rate, pair, ref_logps`.

    `pair`, the positions of the chosen and the rejected response, is the best and the worst by win
    rate where it is not there; K may differ between examples.

    Args:
        packed: prompts once and no padding (True), or a padded row for each response.
        pad_token_id: fills padded rows on the right; masked, so any id of the vocabulary will do.
        max_length: most tokens of a prompt and one response; the rest is cut, see `cut`.
        truncation_mode: "keep_start" or, for padded rows, "keep_end".
        pad_to_multiple_of: padded rows are as long as a multiple of it.

    Returns (of a call): `input_ids` and `attention_mask` [S, T], S the sum of all K, or packed
    `input_ids` and `position_ids` [1, N]; and `sppo`, a HostBatch.

    Raises:
        ValueError: unknown truncation_mode, or one that packed batches cannot have.
    """

    # whether padded rows hold a response's last token, which predicts nothing
    keep_last = False

    def __init__(
        self,
        packed: bool = False,
        pad_token_id: int = 0,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if truncation_mode not in CUTS:
            raise ValueError(
                f"truncation_mode: expected 'keep_start' or 'keep_end', got {truncation_mode!r}"
            )
        self.packed = packed
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lines: list[tuple[list[int], list[int]]] = []
        groups, pairs = [], []
        for example in examples:
            prompt, responses = list(example["prompt_ids"]), responses_of(example)
            pair = example.get("pair") or best_and_worst(example["win_rate"])
            pairs.append((len(lines) + pair[0], len(lines) + pair[1]))
            groups.append(len(responses))
            limit, mode = self.max_length, self.truncation_mode
            lines += [cut(prompt, list(response), limit, mode) for response in responses]
        # nothing predicts the first token of a row
        scored = [response if prompt else response[1:] for prompt, response in lines]
        refs = [example.get("ref_logps") for example in examples]
        known = all(r is not None for r in refs)
        inputs, where = self._packed(lines, groups) if self.packed else self._padded(lines)
        host = HostBatch(
            labels=torch.tensor([t for ids in scored for t in ids], dtype=torch.long),
            cu_seqlens=torch.tensor([0, *map(len, scored)]).cumsum(0),
            win_rate=_floats([w for e in examples for w in e["win_rate"]]),
            ref_logps=_floats([x for r in refs for x in r]) if known else None,
            groups=groups,
            pairs=pairs,
            **where,
        )
        return {**inputs, "sppo": host}

    def _packed(
        self, lines: list[tuple[list[int], list[int]]], sizes: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.max_length is not None and self.truncation_mode != "keep_start":
            raise ValueError(
                "truncation_mode: expected 'keep_start' where responses share their prompt, got "
                f"{self.truncation_mode!r} with packed=True"
            )
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        layout = []
        rest = iter(lines)
        for size in sizes:
            responses = []
            for k in range(size):
                prompt, response = next(rest)
                if k == 0:
                    ids += prompt
                    positions += range(len(prompt))
                    last = len(ids) - 1
                body = response[:-1]
                rows += [last, *range(len(ids), len(ids) + len(body))][: len(response)]
                ids += body
                positions += range(len(prompt), len(prompt) + len(body))
                responses.append(len(body))
            layout.append((len(prompt), responses))
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        return inputs, {
            "rows": torch.tensor(rows),
            "layout": PackedLayout(layout),
            "width": len(ids),
            "tokens": len(ids),
        }

    def _padded(
        self, lines: list[tuple[list[int], list[int]]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = [p + (y if self.keep_last else y[:-1]) for p, y in lines]
        ids, mask = pad(whole, self.pad_token_id, multiple=self.pad_to_multiple_of)
        width, tokens = ids.shape[1], sum(map(len, whole))
        rows: list[int] = []
        for b, (prompt, response) in enumerate(lines):
            first, stop = max(1, len(prompt)), len(prompt) + len(response)
            rows += range(b * width + first - 1, b * width + stop - 1)
        return {"input_ids": ids, "attention_mask": mask}, {
            "rows": torch.tensor(rows, dtype=torch.long),
            "width": width,
            "tokens": tokens,
            "padding": ids.numel() - tokens,
        }


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
