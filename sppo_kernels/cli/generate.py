"""`sppo generate`: K responses to each prompt, with the token ids they were sampled as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sppo_kernels.cli.options import (
    GenerateOptions,
    ModelOptions,
    OptionError,
    _help,
    load_model,
    load_prompts,
    needed,
    parse,
    pick_device,
)
from sppo_kernels.cli.stages import derive_seed, in_parts
from sppo_kernels.data.rows import read_parquet
from sppo_kernels.data.tokenize import prompt_token_ids
from sppo_kernels.optional import require


@dataclass
class FileOptions:
    """Files."""

    prompts: str = _help("Parquet or JSON lines with a column prompt, or text lines.", "")
    output: str = _help("Parquet file to write.", "")
    seed: int = _help("Of sampling.", 0)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[dict[str, Any]],
    path: Path,
    options: GenerateOptions,
    seed: Any = 0,
    title: str = "generate",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Rows `id, prompt, prompt_ids, responses [K], response_ids [K][n_k], finished [K]`.

    Each part's seed follows from `seed` and its number, so a resumed run samples the same.
    `finished` tells whether a response ended by itself or was stopped at max_new_tokens.
    """
    if options.num_responses < 2:
        raise OptionError(f"--num_responses: expected at least 2, got {options.num_responses}")
    model.eval()

    def work(chunk: list[dict[str, Any]], part: int) -> list[dict[str, Any]]:
        ids = [prompt_token_ids(row["prompt"], tokenizer) for row in chunk]
        found = sample(model, tokenizer, ids, options, derive_seed(seed, part))
        return finish(chunk, ids, found, tokenizer)

    return in_parts(prompts, options.generate_batch_size, path, work, title, quiet)


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: list[list[int]], options: GenerateOptions, seed: int
) -> list[list[list[int]]]:
    """K sampled continuations of each prompt, end token included."""
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    width = max(map(len, prompts))
    batch = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(batch)
    for line, ids in enumerate(prompts):
        batch[line, width - len(ids) :] = torch.tensor(ids)
        mask[line, width - len(ids) :] = 1
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=batch.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=0,
            num_return_sequences=options.num_responses,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
        )
    answers = []
    for line in out[:, width:].tolist():
        stop = next((k for k, t in enumerate(line) if t in ends), len(line) - 1)
        answers.append(line[: stop + 1])
    size = options.num_responses
    return [answers[n * size : (n + 1) * size] for n in range(len(prompts))]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a response."""
    found = model.generation_config.eos_token_id if hasattr(model, "generation_config") else None
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        return set()
    return set(found) if isinstance(found, (list, tuple)) else {found}


def finish(
    chunk: list[dict], prompts: list[list[int]], found: list[list[list[int]]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Rows from sampled ids."""
    end = tokenizer.eos_token_id
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "prompt_ids": ids,
            "responses": [tokenizer.decode(a, skip_special_tokens=True) for a in answers],
            "response_ids": answers,
            "finished": [a[-1] == end for a in answers],
        }
        for row, ids, answers in zip(chunk, prompts, found, strict=True)
    ]


def generate_vllm(
    path_or_name: str,
    prompts: list[dict[str, Any]],
    path: Path,
    options: GenerateOptions,
    seed: Any = 0,
    **engine: Any,
) -> list[dict[str, Any]]:
    """`generate` by vLLM; ids go in and come out, texts are never tokenized twice."""
    vllm = require("vllm", "vllm")
    transformers = require("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_name)
    model = vllm.LLM(model=path_or_name, **engine)

    def work(chunk: list[dict[str, Any]], part: int) -> list[dict[str, Any]]:
        ids = [prompt_token_ids(row["prompt"], tokenizer) for row in chunk]
        params = vllm.SamplingParams(
            n=options.num_responses,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_new_tokens,
            seed=derive_seed(seed, part),
            skip_special_tokens=False,
        )
        outputs = model.generate([{"prompt_token_ids": i} for i in ids], params)
        found = [[list(answer.token_ids) for answer in output.outputs] for output in outputs]
        return finish(chunk, ids, found, tokenizer)

    return in_parts(prompts, max(256, options.generate_batch_size), path, work, "generate (vLLM)")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows written by `generate`."""
    return read_parquet(path)


def uses_vllm(options: GenerateOptions, device: str) -> bool:
    """Whether vLLM generates: when asked for, or when installed and on CUDA."""
    import importlib.util

    if options.engine not in ("auto", "transformers", "vllm"):
        raise OptionError(
            f"--engine: expected 'auto', 'transformers' or 'vllm', got {options.engine!r}"
        )
    installed = importlib.util.find_spec("vllm") is not None
    if options.engine == "vllm":
        return True
    return options.engine == "auto" and installed and pick_device(device).startswith("cuda")


def run(argv: Sequence[str]) -> None:
    files, model, options = parse(
        (FileOptions, ModelOptions, GenerateOptions), argv, "sppo generate", __doc__
    )
    needed(model, "model")
    needed(files, "prompts", "output")
    prompts, path = load_prompts(files.prompts), Path(files.output)
    if uses_vllm(options, model.device):
        rows = generate_vllm(model.model, prompts, path, options, files.seed)
    else:
        rows = generate(*load_model(model), prompts, path, options, files.seed)
    stopped = sum(not done for row in rows for done in row["finished"])
    total = sum(len(row["finished"]) for row in rows)
    print(f"{path}: {len(rows)} prompts, {total} responses, {stopped} stopped at max_new_tokens")
