"""PairRM: a DeBERTa-v2 that reads a prompt and two responses together (arXiv 2306.02561).

Both published layouts load: that of a transformers model, whose config.json describes the DeBERTa,
and that of LLM-Blender, whose config.json names the checkpoint it was made from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.judges.base import JudgeError, ordered_pairs, prompt_text
from sppo_kernels.judges.batching import ModelJudge
from sppo_kernels.optional import require

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


class PairRMJudge(ModelJudge):
    """PairRM over all ordered pairs of responses.

    Args:
        path: a folder with config.json, the weights and the tokenizer.
        batch_size: pairs scored at once.
        max_length: most tokens of prompt and both responses together (default: the checkpoint's,
            else 2048).
        source_max_length: most tokens of the prompt (default: the checkpoint's, else 1224).
        overlong, device, progress: see `ModelJudge`; what is cut is the end of a text.
        dtype: of the model.

    Raises:
        JudgeError: the folder is no PairRM checkpoint. OverLengthError: see `overlong`.
    """

    name = "PairRM"
    items = "comparisons"

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
        path = Path(path)
        settings, config = read_config(path)
        self.source_max = source_max_length or settings.get("source_maxlength") or 1224
        candidate = settings.get("candidate_maxlength") or 412
        max_length = max_length or self.source_max + 2 * candidate
        super().__init__(batch_size, max_length, overlong, device, progress)
        self.tokenizer = require("transformers").AutoTokenizer.from_pretrained(path)
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

    def _body(self, text: str) -> list[int]:
        """Ids of a text, which must not forge marks."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [t for t in ids if t not in self.model.marks.values()]

    def _part(self, mark: str, body: list[int], room: int) -> list[int]:
        """[CLS] mark text [SEP], as the checkpoints were trained; at most `room` tokens."""
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return [start, self.model.marks[mark], *self.fit(body, room - 3), end]

    def pair_ids(self, source: list[int], first: list[int], second: list[int]) -> list[int]:
        """Ids of a comparison from those of the prompt and two responses, in the order shown."""
        ids = self._part("source", source, self.source_max)
        room = (self.max_length - len(ids)) // 2
        return ids + self._part("cand1", first, room) + self._part("cand2", second, room)

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`; every pair is scored in both orders."""
        pairs, count = ordered_pairs(prompts, responses), len(responses[0])
        body = functools.cache(self._body)  # a text is read once, not once a comparison
        items = (
            self.pair_ids(
                body(prompt_text(prompts[n])), body(responses[n][i]), body(responses[n][j])
            )
            for n, i, j in pairs
        )
        result = torch.zeros(len(prompts), count, count)
        scores = self.score(items, self.model, self.tokenizer.pad_token_id or 0)
        result[tuple(torch.tensor(pairs).T)] = scores
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
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise JudgeError(f"{path}: expected model.safetensors or pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= require("safetensors.torch").load_file(file)
        else:
            state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


JUDGE = (PairRMJudge, "PATH")  # `--judge pairrm:PATH`
