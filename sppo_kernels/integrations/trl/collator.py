"""Batches of prompts with K responses each, padded and truncated as TRL pads and truncates."""

from __future__ import annotations

from typing import Any

from sppo_kernels.data.collate import HostBatch, SPPOCollator

SoftBatch = HostBatch


class DataCollatorForSoftSPPO(SPPOCollator):
    """Rows of token ids to batches; each response is a padded row after its prompt.

    Rows hold `prompt_ids`, `response_ids` [K][n] (or TRL's `chosen_ids` and `rejected_ids`),
    `win_rate` [K], `pair` (positions of the chosen and the rejected response) and, when the
    reference was computed before, `ref_logps` [K]. Arguments and batches are those of a padded
    `SPPOCollator`.

    Raises:
        ValueError: unknown truncation_mode, or rows without win rates.
    """

    keep_last = True  # as TRL's rows

    def __init__(
        self,
        pad_token_id: int,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        super().__init__(
            pad_token_id=pad_token_id,
            max_length=max_length,
            truncation_mode=truncation_mode,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            if example.get("win_rate") is None or example.get("pair") is None:
                raise ValueError(
                    "expected rows prepared by SoftSPPOTrainer, with win_rate and pair; got "
                    f"{sorted(example)}"
                )
        return super().__call__(examples)
