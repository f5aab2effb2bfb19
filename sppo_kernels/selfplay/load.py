"""The model that options name, and the prompts of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sppo_kernels.data.rows import DataError, load_rows
from sppo_kernels.optional import require
from sppo_kernels.selfplay.options import ModelOptions, OptionError


def pick_device(device: str) -> str:
    """'auto' is CUDA when there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(options: ModelOptions) -> tuple[Any, Any]:
    """The causal language model and its tokenizer."""
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()  # of loading shards; ours show the stages
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype is None:
        raise OptionError(f"--dtype: expected 'auto' or a torch dtype, got {options.dtype!r}")
    extra = {"trust_remote_code": options.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **extra)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **extra)
    return model.to(pick_device(options.device)), tokenizer


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Prompts of a Parquet, JSON-lines or text file (one a line), each with an `id`.

    Raises:
        DataError: no prompt, or a row without one.
    """
    if Path(path).suffix == ".txt":
        rows = [{"prompt": line} for line in Path(path).read_text().splitlines() if line.strip()]
    else:
        rows = list(load_rows(path))
    if not rows:
        raise DataError(f"{path}: expected at least one prompt, got none")
    for index, row in enumerate(rows):
        if row.get("prompt") is None:
            raise DataError(f"{path}: row {index}: expected a column prompt, got {sorted(row)}")
    return [{"id": row.get("id", n), "prompt": row["prompt"]} for n, row in enumerate(rows)]
