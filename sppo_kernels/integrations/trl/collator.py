"""Batches of prompts with K responses each, padded and truncated as TRL pads and truncates."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class SoftBatch:
    """What the loss needs beside the model's input; stays on the CPU.

    Not a dataclass: FSDP casts the tensors of dataclasses among a model's inputs to its own dtype,
    and win rates in bfloat16 would move the targets by nats.

    Attributes:
        labels: [L] response tokens; rows: [L] rows of the flattened [S * width] hidden states that
            predict them; cu_seqlens: [S+1] bounds of the responses in labels.
        win_rate: [S]; ref_logps: [S] or None.
        groups: number of responses of each prompt, in order.
        pairs: for each prompt, which of the S responses is chosen and which rejected.
        width: tokens of a padded row; tokens: those that are not padding.
        router: whether the load-balancing loss of a mixture of experts is wanted.
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
        width: int,
        tokens: int,
    ) -> None:
        self.labels, self.rows, self.cu_seqlens = labels, rows, cu_seqlens
        self.win_rate, self.ref_logps = win_rate, ref_logps
        self.groups, self.pairs = groups, pairs
        self.width, self.tokens = width, tokens
        self.router = False

    def replaced(self, ref_logps: Tensor | None, router: bool = False) -> SoftBatch:
        """The same batch with other reference log-probabilities."""
        other = copy.copy(self)
        other.ref_logps, other.router = ref_logps, router
        return other


@dataclass
class DataCollatorForSoftSPPO:
    """Rows of token ids to batches; each response is a padded row after its prompt.

    Rows hold `prompt_ids`, `response_ids` [K][n] (or TRL's `chosen_ids` and `rejected_ids`),
    `win_rate` [K], `pair` (positions of the chosen and the rejected response) and, when the
    reference was computed before, `ref_logps` [K]. K may differ between rows.

    Args:
        pad_token_id: fills rows on the right; masked.
        max_length: most tokens of a prompt and one response; the rest is cut, as TRL does:
            from the right ("keep_start") or from the left ("keep_end").
        truncation_mode: "keep_start" or "keep_end".
        pad_to_multiple_of: rows are as long as a multiple of it.

    Returns (of a call): `input_ids` and `attention_mask` [S, T], S the sum of all K, the responses
    of a prompt one after another; and `sppo`, a SoftBatch.

    Raises:
        ValueError: unknown truncation_mode, or rows without win rates.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                "truncation_mode: expected 'keep_start' or 'keep_end', got "
                f"{self.truncation_mode!r}"
            )

    def _cut(self, prompt: list[int], response: list[int]) -> tuple[int, list[int]]:
        """Tokens of the prompt that are left, and the ids of prompt and response, cut."""
        ids = prompt + response
        excess = 0 if self.max_length is None else len(ids) - self.max_length
        if excess <= 0:
            return len(prompt), ids
        if self.truncation_mode == "keep_start":
            return min(len(prompt), self.max_length), ids[: self.max_length]
        return max(0, len(prompt) - excess), ids[excess:]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lines, groups, pairs, wins, refs = [], [], [], [], []
        for example in examples:
            if example.get("win_rate") is None or example.get("pair") is None:
                raise ValueError(
                    "expected rows prepared by SoftSPPOTrainer, with win_rate and pair; got "
                    f"{sorted(example)}"
                )
            responses = example.get("response_ids")
            if responses is None:
                responses = [example["chosen_ids"], example["rejected_ids"]]
            chosen, rejected = example["pair"]
            pairs.append((len(lines) + chosen, len(lines) + rejected))
            lines += [self._cut(list(example["prompt_ids"]), list(ids)) for ids in responses]
            groups.append(len(responses))
            wins += example["win_rate"]
            refs += [] if example.get("ref_logps") is None else example["ref_logps"]
        width = max(len(ids) for _, ids in lines)
        if self.pad_to_multiple_of is not None:
            width += -width % self.pad_to_multiple_of
        input_ids = torch.full((len(lines), width), self.pad_token_id)
        mask = torch.zeros(len(lines), width, dtype=torch.long)
        labels: list[int] = []
        rows: list[int] = []
        bounds = [0]
        for b, (prompt, ids) in enumerate(lines):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            mask[b, : len(ids)] = 1
            first = max(1, prompt)  # nothing predicts the first token of a row
            labels += ids[first:]
            rows += range(b * width + first - 1, b * width + len(ids) - 1)
            bounds.append(len(labels))
        batch = SoftBatch(
            labels=torch.tensor(labels, dtype=torch.long),
            rows=torch.tensor(rows, dtype=torch.long),
            cu_seqlens=torch.tensor(bounds),
            win_rate=torch.tensor(wins, dtype=torch.float32),
            ref_logps=torch.tensor(refs, dtype=torch.float32) if refs else None,
            groups=groups,
            pairs=pairs,
            width=width,
            tokens=sum(len(ids) for _, ids in lines),
        )
        return {"input_ids": input_ids, "attention_mask": mask, "sppo": batch}
