"""Options of the commands as dataclasses, from flags and YAML or JSON files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo_kernels.data.rows import DataError
from sppo_kernels.optional import require


class OptionError(DataError):
    """A setting is missing, unknown, or cannot be combined with another."""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    """The model."""

    model: str = _help("Folder or hub name of the causal language model.", "")
    dtype: str = _help("'auto', 'float32', 'bfloat16' or 'float16'.", "auto")
    device: str = _help("'auto', 'cpu', 'cuda', ...", "auto")
    trust_remote_code: bool = _help("Run code that comes with the model.", False)


@dataclass
class GenerateOptions:
    """Sampling."""

    num_responses: int = _help("Responses to a prompt, K.", 5)
    max_new_tokens: int = _help("Most tokens of a response.", 1024)
    temperature: float = _help("Of sampling; 1 samples from the policy itself.", 1.0)
    top_p: float = _help("Nucleus sampling.", 1.0)
    generate_batch_size: int = _help("Prompts sampled at once; also the unit of resuming.", 8)
    engine: str = _help(
        "'auto' (vllm when installed and on CUDA), 'transformers' or 'vllm'.", "auto"
    )


@dataclass
class JudgeOptions:
    """Judging."""

    judge: str = _help("pairrm:PATH, reward:PATH, recorded:FILE or MODULE:FUNCTION.", "")
    debias: bool = _help("Average over both orders, so that a position's advantage cancels.", True)
    judge_temperature: float = _help("Divides the judge's logits.", 1.0)
    judge_batch_size: int = _help("Prompts judged at once; also the unit of resuming.", 16)


def parse(
    classes: Sequence[type], argv: Sequence[str], prog: str, about: str, **defaults: Any
) -> tuple[Any, ...]:
    """Instances of dataclasses from `--config FILE` and flags, flags first.

    Raises:
        OptionError: the file cannot be read, or holds an unknown setting.
    """
    parser = require("transformers").HfArgumentParser(classes, prog=prog, description=about)
    argv, given = list(argv), dict(defaults)
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise OptionError("--config: expected a file")
        given |= read_config(argv[at + 1])
        del argv[at : at + 2]
    known = {f.name for c in classes for f in dataclasses.fields(c) if f.init}
    unknown = sorted(set(given) - known)
    if unknown:
        raise OptionError(f"--config: unknown settings {unknown}")
    parser.set_defaults(**given)
    return parser.parse_args_into_dataclasses(argv)


def read_config(path: str) -> dict[str, Any]:
    """Settings of a YAML or JSON file."""
    try:
        text = Path(path).read_text()
        found = json.loads(text) if path.endswith(".json") else require("yaml").safe_load(text)
    except (OSError, ValueError) as error:
        raise OptionError(f"--config: {path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise OptionError(f"--config: {path}: expected settings, got {type(found).__name__}")
    return found


def needed(options: Any, *names: str) -> None:
    """Raise unless these settings are given."""
    absent = [f"--{name}" for name in names if not getattr(options, name)]
    if absent:
        raise OptionError(f"expected {', '.join(absent)}")


def pick_device(device: str) -> str:
    """'auto' is CUDA when there is one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(options: ModelOptions, path: str | None = None) -> tuple[Any, Any]:
    """The causal language model and its tokenizer."""
    import torch

    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()  # of loading shards; ours show the stages
    path = path or options.model
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype is None:
        raise OptionError(f"--dtype: expected 'auto' or a torch dtype, got {options.dtype!r}")
    extra = {"trust_remote_code": options.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **extra)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **extra)
    return model.to(pick_device(options.device)), tokenizer


def load_prompts(path: str) -> list[dict[str, Any]]:
    """Prompts of a Parquet, JSON-lines or text file (one a line), each with an `id`."""
    from sppo_kernels.data.rows import load_rows

    if path.endswith(".txt"):
        rows = [{"prompt": line} for line in Path(path).read_text().splitlines() if line.strip()]
    else:
        rows = [dict(row) for row in load_rows(path)]
    if not rows:
        raise DataError(f"{path}: expected at least one prompt, got none")
    for index, row in enumerate(rows):
        if row.get("prompt") is None:
            raise DataError(f"{path}: row {index}: expected a column prompt, got {sorted(row)}")
        row["id"] = row.get("id", index)
    return [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
