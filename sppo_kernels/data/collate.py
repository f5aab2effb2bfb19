"""Examples to batches. All index work happens here, on the host, so the device is never waited for.

Packed batches hold each prompt once, followed by its responses: [p | y_1 | ... | y_K | p' | ...].
The last prompt token's row predicts the first token of every response. The last token of a response
predicts nothing and is left out of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_kernels.data.layout import PackedLayout


class HostBatch:
    """What the loss needs beside the model's input; stays on the CPU.

    Not a dataclass: wrappers such as FSDP look into dataclasses, move their tensors to the device
    and cast them to the policy's dtype, which would round win rates and log-probabilities.

    Attributes:
        labels: [L] response tokens.
        rows: [L] rows of the flattened hidden states that predict them.
        cu_seqlens: [S+1] bounds of the responses in labels.
        win_rate: [S]; ref_logps: [S] or None.
        groups: number of responses of each prompt.
        layout: of the packed tokens, None when padded.
        tokens, padding: tokens given to the model, and those of them that are padding.
    """

    def __init__(
        self,
        labels: Tensor,
        rows: Tensor,
        cu_seqlens: Tensor,
        win_rate: Tensor,
        ref_logps: Tensor | None,
        groups: list[int],
    ) -> None:
        self.labels = labels
        self.rows = rows
        self.cu_seqlens = cu_seqlens
        self.win_rate = win_rate
        self.ref_logps = ref_logps
        self.groups = groups
        self.layout: PackedLayout | None = None
        self.tokens = 0
        self.padding = 0


class SPPOCollator:
    """Batches of examples with `prompt_ids, response_ids, win_rate, ref_logps`.

    Args:
        packed: prompts once and no padding (True), or a padded row for each response.
        pad_token_id: fills padded rows; masked, so any id of the vocabulary will do.
    """

    def __init__(self, packed: bool, pad_token_id: int = 0) -> None:
        self.packed = packed
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        responses = [ids for e in examples for ids in e["response_ids"]]
        lengths = torch.tensor([0] + [len(ids) for ids in responses])
        refs = [e.get("ref_logps") for e in examples]
        known = all(r is not None for r in refs)
        host = HostBatch(
            labels=torch.tensor([t for ids in responses for t in ids]),
            rows=torch.empty(0),
            cu_seqlens=lengths.cumsum(0),
            win_rate=torch.tensor([w for e in examples for w in e["win_rate"]]),
            ref_logps=torch.tensor([x for r in refs for x in r]) if known else None,
            groups=[len(e["response_ids"]) for e in examples],
        )
        build = self._pack if self.packed else self._pad
        return {**build(examples, host), "sppo": host}

    def _pack(self, examples: list[dict[str, Any]], host: HostBatch) -> dict[str, Any]:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        groups = []
        for example in examples:
            prompt = example["prompt_ids"]
            last = len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            inner = []
            for response in example["response_ids"]:
                start, count = len(ids), len(response) - 1
                rows.append(last)
                rows += range(start, start + count)
                ids += response[:-1]
                positions += range(len(prompt), len(prompt) + count)
                inner.append(count)
            groups.append((len(prompt), inner))
        host.rows = torch.tensor(rows)
        host.layout = PackedLayout(groups)
        host.tokens = len(ids)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
        }

    def _pad(self, examples: list[dict[str, Any]], host: HostBatch) -> dict[str, Any]:
        lines = [
            (len(e["prompt_ids"]), e["prompt_ids"] + response[:-1])
            for e in examples
            for response in e["response_ids"]
        ]
        width = max(len(ids) for _, ids in lines)
        input_ids = torch.full((len(lines), width), self.pad_token_id)
        mask = torch.zeros(len(lines), width, dtype=torch.long)
        rows: list[int] = []
        for b, (prompt, ids) in enumerate(lines):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            mask[b, : len(ids)] = 1
            rows += range(b * width + prompt - 1, b * width + len(ids))
        host.rows = torch.tensor(rows)
        host.tokens = sum(len(ids) for _, ids in lines)
        host.padding = len(lines) * width - host.tokens
        return {"input_ids": input_ids, "attention_mask": mask}
