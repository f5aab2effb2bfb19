"""Scalar reward models as judges: Bradley–Terry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.judges.base import JudgeError, check_batch
from sppo_kernels.judges.batching import ModelJudge
from sppo_kernels.optional import require


class RewardModelJudge(ModelJudge):
    """A sequence classifier with one output s(x, y); c_ij = s_i − s_j.

    Args:
        model: a folder or hub name, or a loaded model (then give `tokenizer`).
        batch_size: responses scored at once. max_length: most tokens of prompt and response.
        overlong, device, progress: see `ModelJudge`; what is cut is the beginning.

    Raises:
        JudgeError: the model has not exactly one output. OverLengthError: see `overlong`.
    """

    name = "reward model"
    items = "responses"

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
        super().__init__(batch_size, max_length, overlong, device, progress)
        if isinstance(model, str):
            transformers = require("transformers")
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        if model.config.num_labels != 1:
            raise JudgeError(
                f"model: expected one output, a scalar reward, got {model.config.num_labels}"
            )
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer

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
        return self.fit(ids, self.max_length, keep_end=True)

    def scores(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """s(x, y) as [n, K] float32."""
        count = check_batch(prompts, responses)
        items = (self._ids(p, y) for p, ys in zip(prompts, responses, strict=True) for y in ys)
        fill = self.tokenizer.pad_token_id
        # Decoder classifiers find a text's end by the pad token; without one, texts go singly.
        singly = fill is None and self.model.config.pad_token_id is None

        def first_output(ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0]

        found = self.score(items, first_output, fill or 0, 1 if singly else None)
        return found.view(len(prompts), count)

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        scores = self.scores(prompts, responses)
        return scores[:, :, None] - scores[:, None, :]


JUDGE = (RewardModelJudge, "PATH")  # `--judge reward:PATH`
