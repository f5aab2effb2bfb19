"""PairRM: a DeBERTa-v2 that reads a prompt and two responses together (arXiv 2306.02561).

Both published layouts load: that of a transformers model, whose config.json describes the DeBERTa,
and that of LLM-Blender, whose config.json names the checkpoint it was made from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.data.rows import OverLengthError
from sppo_kernels.judges.base import JudgeError, check_batch, prompt_text
from sppo_kernels.optional import require

logger = logging.getLogger("sppo_kernels")

PREFIXES = {"source": "<|source|>", "cand1": "<|candidate1|>", "cand2": "<|candidate2|>"}


class PairRMModel(nn.Module):
    """Scores of both candidates from the states at their marks, by one head.

    Parameter names are those of the published checkpoints.
    """

    def __init__(self, config: Any, marks: dict[str, int], n_tasks: int = 1) -> None:
        super().__init__()
        transformers = require("transformers")
        self.marks = marks
        self.pretrained_model = transformers.DebertaV2Model(config)
        size = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(0.0),
            nn.Linear(size, n_tasks),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] -> [B]: log-odds that candidate 1 is preferred."""
        states = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        line = torch.arange(input_ids.shape[0], device=input_ids.device)
        at = {
            name: states[line, (input_ids == mark).int().argmax(1)]  # the first of each mark
            for name, mark in self.marks.items()
        }
        first = self.head_layer(torch.cat([at["source"], at["cand1"]], -1))
        second = self.head_layer(torch.cat([at["source"], at["cand2"]], -1))
        return (first - second).float().mean(-1)


class PairRMJudge:
    """PairRM over all ordered pairs of responses.

    Args:
        path: a folder with config.json, the weights and the tokenizer.
        batch_size: pairs scored at once.
        max_length: most tokens of prompt and both responses together (default: the checkpoint's,
            else 2048).
        source_max_length: most tokens of the prompt (default: the checkpoint's, else 1224).
        overlong: "refuse": a text that does not fit is an error; "truncate": it is cut, counted in
            `truncated`, and reported once a call.
        device, dtype: of the model.
        progress: whether to show a bar.

    Raises:
        JudgeError: the folder is no PairRM checkpoint. OverLengthError: see `overlong`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        source_max_length: int | None = None,
        overlong: str = "refuse",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ) -> None:
        transformers = require("transformers")
        if overlong not in ("refuse", "truncate"):
            raise JudgeError(f"overlong: expected 'refuse' or 'truncate', got {overlong!r}")
        path = Path(path)
        self.batch_size, self.overlong, self.progress = batch_size, overlong, progress
        self.device = torch.device(device)
        self.truncated = 0
        settings, config = read_config(path)
        self.source_max = source_max_length or settings.get("source_maxlength") or 1224
        candidate = settings.get("candidate_maxlength") or 412
        self.max_length = max_length or self.source_max + 2 * candidate
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        marks = self._marks(settings)
        state = read_weights(path)
        words = state.get("pretrained_model.embeddings.word_embeddings.weight")
        if words is None:
            raise JudgeError(
                f"{path}: expected parameters pretrained_model.* and head_layer.*, got "
                f"{sorted(state)[:3]}..."
            )
        config.vocab_size = words.shape[0]  # the marks were added to the vocabulary
        self.model = PairRMModel(config, marks, state["head_layer.4.weight"].shape[0])
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        unexpected = [k for k in unexpected if not k.endswith("position_ids")]
        if missing or unexpected:
            raise JudgeError(f"{path}: missing parameters {missing}, unexpected {unexpected}")
        self.model.eval().to(self.device, dtype)

    def _marks(self, settings: dict[str, Any]) -> dict[str, int]:
        marks = {}
        for name, text in PREFIXES.items():
            mark = settings.get(f"{name}_prefix_id")
            if mark is None:
                mark = self.tokenizer.convert_tokens_to_ids(settings.get(f"{name}_prefix", text))
            if mark is None or mark == self.tokenizer.unk_token_id:
                raise JudgeError(f"the tokenizer does not know the mark {text!r}")
            marks[name] = mark
        return marks

    def _encode(self, mark: str, text: str, room: int) -> list[int]:
        """[CLS] mark text [SEP], as the checkpoints were trained; at most `room` tokens."""
        tokenizer = self.tokenizer
        start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = [
            t for t in body if t not in self.model.marks.values()
        ]  # a text must not forge marks
        if len(body) + 3 > room:
            self.truncated += 1
            self._over.append(len(body) + 3)
            body = body[: max(0, room - 3)]
        return [start, self.model.marks[mark], *body, end]

    def pair_ids(self, prompt: Any, first: str, second: str) -> list[int]:
        """Token ids of a prompt and two responses, in the order shown."""
        source = self._encode("source", prompt_text(prompt), self.source_max)
        room = (self.max_length - len(source)) // 2
        return source + self._encode("cand1", first, room) + self._encode("cand2", second, room)

    @torch.no_grad()
    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`; every pair is scored in both orders."""
        count = check_batch(prompts, responses)
        self._over: list[int] = []
        pairs = [
            (n, i, j)
            for n in range(len(prompts))
            for i in range(count)
            for j in range(count)
            if i != j
        ]
        ids = [self.pair_ids(prompts[n], responses[n][i], responses[n][j]) for n, i, j in pairs]
        if self._over:
            report = (
                f"PairRM: {len(self._over)} texts in {len(pairs)} comparisons do not fit "
                f"max_length={self.max_length} (longest: {max(self._over)} tokens)"
            )
            if self.overlong == "refuse":
                raise OverLengthError(f"{report}; raise max_length or choose overlong='truncate'")
            logger.warning("%s and were cut for judging", report)
        result = torch.zeros(len(prompts), count, count)
        # Neighbours in length together; pads are masked and do not change scores.
        order = sorted(range(len(ids)), key=lambda p: len(ids[p]))
        starts = range(0, len(order), self.batch_size)
        if self.progress:
            from tqdm import tqdm

            starts = tqdm(starts, desc="judge (PairRM)")
        for start in starts:
            chosen = order[start : start + self.batch_size]
            width = max(len(ids[p]) for p in chosen)
            batch = torch.full((len(chosen), width), self.tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(batch)
            for line, p in enumerate(chosen):
                batch[line, : len(ids[p])] = torch.tensor(ids[p])
                mask[line, : len(ids[p])] = 1
            scores = self.model(batch.to(self.device), mask.to(self.device)).cpu()
            for p, score in zip(chosen, scores, strict=True):
                result[pairs[p]] = score
        return result


def read_config(path: Path) -> tuple[dict[str, Any], Any]:
    """Settings of a checkpoint folder, and its DeBERTa's config."""
    transformers = require("transformers")
    file = path / "config.json"
    if not file.exists():
        raise JudgeError(f"{path}: expected a PairRM checkpoint, but there is no config.json")
    settings = json.loads(file.read_text())
    if settings.get("model_type") == "deberta-v2":
        return settings, transformers.DebertaV2Config.from_pretrained(path)
    name = settings.get("model_name")
    if name is None or "ranker_type" not in settings:
        raise JudgeError(
            f"{file}: expected model_type 'deberta-v2', or ranker_type and model_name, got "
            f"{sorted(settings)}"
        )
    base = path / name if (path / name).exists() else name
    return settings, transformers.DebertaV2Config.from_pretrained(base)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameters of a checkpoint folder, from safetensors or PyTorch files."""
    files = sorted(path.glob("*.safetensors"))
    if files:
        from safetensors.torch import load_file

        return {k: v for file in files for k, v in load_file(file).items()}
    files = sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise JudgeError(f"{path}: expected model.safetensors or pytorch_model.bin")
    return {
        k: v
        for file in files
        for k, v in torch.load(file, map_location="cpu", weights_only=True).items()
    }
