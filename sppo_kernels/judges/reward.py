"""Scalar reward models as judges: Bradley–Terry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.data.rows import OverLengthError
from sppo_kernels.judges.base import JudgeError, check_batch
from sppo_kernels.optional import require


class RewardModelJudge:
    """A sequence classifier with one output s(x, y); c_ij = s_i − s_j.

    Args:
        model: a folder or hub name, or a loaded model (then give `tokenizer`).
        batch_size: responses scored at once. max_length: most tokens of prompt and response.
        overlong: "refuse" or "truncate" (from the left, keeping the response's end).
        device: of the model. progress: whether to show a bar.

    Raises:
        JudgeError: the model has not exactly one output. OverLengthError: see `overlong`.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        batch_size: int = 16,
        max_length: int = 4096,
        overlong: str = "refuse",
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        if overlong not in ("refuse", "truncate"):
            raise JudgeError(f"overlong: expected 'refuse' or 'truncate', got {overlong!r}")
        transformers = require("transformers")
        if isinstance(model, str):
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        if model.config.num_labels != 1:
            raise JudgeError(
                f"model: expected one output, a scalar reward, got {model.config.num_labels}"
            )
        self.model = model.eval().to(device)
        self.tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self.overlong, self.device, self.progress = overlong, torch.device(device), progress
        self.truncated = 0

    def _ids(self, prompt: Any, response: str) -> list[int]:
        template = getattr(self.tokenizer, "chat_template", None)
        if template is not None:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.tokenizer.apply_chat_template(
                [*chat, {"role": "assistant", "content": response}], tokenize=False
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt, response)["input_ids"]
        else:
            raise JudgeError("prompts are chat messages, but the tokenizer has no chat template")
        if len(ids) > self.max_length:
            self.truncated += 1
            if self.overlong == "refuse":
                raise OverLengthError(
                    f"a prompt and response have {len(ids)} tokens, max_length is "
                    f"{self.max_length}; raise it or choose overlong='truncate'"
                )
            ids = ids[-self.max_length :]
        return ids

    @torch.no_grad()
    def scores(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """s(x, y) as [n, K] float32."""
        count = check_batch(prompts, responses)
        ids = [self._ids(p, y) for p, ys in zip(prompts, responses, strict=True) for y in ys]
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
        found = torch.zeros(len(ids))
        pad = self.tokenizer.pad_token_id
        # Decoder classifiers find a text's end by the pad token; without one, texts go singly.
        size = 1 if pad is None and self.model.config.pad_token_id is None else self.batch_size
        starts = range(0, len(order), size)
        if self.progress:
            from tqdm import tqdm

            starts = tqdm(starts, desc="judge (reward model)")
        for start in starts:
            chosen = order[start : start + size]
            width = max(len(ids[k]) for k in chosen)
            batch = torch.full((len(chosen), width), pad or 0)
            mask = torch.zeros_like(batch)
            for line, k in enumerate(chosen):
                batch[line, : len(ids[k])] = torch.tensor(ids[k])
                mask[line, : len(ids[k])] = 1
            out = self.model(input_ids=batch.to(self.device), attention_mask=mask.to(self.device))
            found[chosen] = out.logits[:, 0].float().cpu()
        return found.view(len(prompts), count)

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        scores = self.scores(prompts, responses)
        return scores[:, :, None] - scores[:, None, :]
