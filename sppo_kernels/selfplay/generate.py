"""K responses to each prompt, with the token ids they were sampled as."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sppo_kernels.data.collate import pad
from sppo_kernels.data.rows import read_parquet
from sppo_kernels.data.tokenize import prompt_token_ids
from sppo_kernels.optional import require
from sppo_kernels.selfplay.load import load_model, pick_device
from sppo_kernels.selfplay.options import GenerateOptions, ModelOptions
from sppo_kernels.selfplay.stages import derive_seed, in_parts


class TransformersEngine:
    """Samples by `model.generate`.

    `least` is the fewest prompts worth a part, `ends` the ids that end a response.
    """

    least = 1

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}

    @torch.no_grad()
    def sample(
        self, prompts: list[list[int]], options: GenerateOptions, seed: int
    ) -> list[list[list[int]]]:
        """K continuations of each prompt, end token included."""
        fill = self.tokenizer.pad_token_id
        fill = min(self.ends, default=0) if fill is None else fill
        batch, mask = pad(prompts, fill, left=True)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=batch.to(device),
                attention_mask=mask.to(device),
                do_sample=True,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=0,
                num_return_sequences=options.num_responses,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=fill,
            )
        answers = []
        for line in out[:, batch.shape[1] :].tolist():
            stop = next((k for k, t in enumerate(line) if t in self.ends), len(line) - 1)
            answers.append(line[: stop + 1])
        size = options.num_responses
        return [answers[n : n + size] for n in range(0, len(answers), size)]


class VLLMEngine:
    """Samples by vLLM; ids go in and come out, texts are never tokenized twice.

    Args:
        model: a folder or hub name. settings: of `vllm.LLM`.
    """

    least = 256

    def __init__(self, model: str, **settings: Any) -> None:
        self.vllm = require("vllm", "vllm")
        self.tokenizer = require("transformers").AutoTokenizer.from_pretrained(model)
        self.model = self.vllm.LLM(model=model, **settings)
        self.ends = {self.tokenizer.eos_token_id}

    def sample(
        self, prompts: list[list[int]], options: GenerateOptions, seed: int
    ) -> list[list[list[int]]]:
        """K continuations of each prompt, end token included."""
        params = self.vllm.SamplingParams(
            n=options.num_responses,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_new_tokens,
            seed=seed,
            skip_special_tokens=False,
        )
        found = self.model.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return [[list(answer.token_ids) for answer in output.outputs] for output in found]


def load_engine(model: ModelOptions, options: GenerateOptions) -> TransformersEngine | VLLMEngine:
    """vLLM when asked for, or with 'auto' when it is installed and the device is CUDA."""
    automatic = options.engine == "auto" and pick_device(model.device).startswith("cuda")
    if options.engine == "vllm" or (automatic and importlib.util.find_spec("vllm") is not None):
        return VLLMEngine(model.model)
    return TransformersEngine(*load_model(model))


def generate(
    model: ModelOptions | TransformersEngine | VLLMEngine,
    prompts: Sequence[dict[str, Any]],
    path: str | Path,
    options: GenerateOptions,
    seed: Any = 0,
    title: str = "generate",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Sample K responses to each prompt into a Parquet file.

    Args:
        model: an engine, or what to load one by, which happens only when `path` is not there yet.
        prompts: dicts with `id` and `prompt`, text or chat messages.
        path: of the file; parts of an unfinished one are gone on with.
        seed: anything JSON can say. Each part's seed follows from it and the part's number, so a
            resumed run samples the same.
        title, quiet: of the progress bar.

    Returns:
        Rows `id, prompt, prompt_ids, responses [K], response_ids [K][n_k], finished [K]`;
        `finished` tells whether a response ended by itself or was stopped at max_new_tokens.
    """
    if Path(path).exists():
        return read_parquet(path)
    engine = load_engine(model, options) if isinstance(model, ModelOptions) else model

    def work(chunk: list[dict[str, Any]], part: int) -> list[dict[str, Any]]:
        ids = [prompt_token_ids(row["prompt"], engine.tokenizer) for row in chunk]
        found = engine.sample(ids, options, derive_seed(seed, part))
        return [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "prompt_ids": prompt,
                "responses": engine.tokenizer.batch_decode(answers, skip_special_tokens=True),
                "response_ids": answers,
                "finished": [a[-1] in engine.ends for a in answers],
            }
            for row, prompt, answers in zip(chunk, ids, found, strict=True)
        ]

    size = max(engine.least, options.generate_batch_size)
    return in_parts(prompts, size, path, work, title, quiet)
