"""Settings of the loop's stages: plain dataclasses with the help texts in the fields' metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sppo_kernels.data.rows import DataError
from sppo_kernels.judges.load import NAMES


class OptionError(DataError):
    """A setting is missing, unknown, or cannot be combined with another."""


def setting(help: str, default: Any) -> Any:
    """A field of options, with what it is."""
    return field(default=default, metadata={"help": help})


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise OptionError unless a setting has one of its values."""
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise OptionError(f"--{name}: expected {', '.join(others)} or {last}, got {value!r}")


@dataclass
class ModelOptions:
    """The model."""

    model: str = setting("Folder or hub name of the causal language model.", "")
    dtype: str = setting("'auto', 'float32', 'bfloat16' or 'float16'.", "auto")
    device: str = setting("'auto', 'cpu', 'cuda', ...", "auto")
    trust_remote_code: bool = setting("Run code that comes with the model.", False)


@dataclass
class GenerateOptions:
    """Sampling."""

    num_responses: int = setting("Responses to a prompt, K.", 5)
    max_new_tokens: int = setting("Most tokens of a response.", 1024)
    temperature: float = setting("Of sampling; 1 samples from the policy itself.", 1.0)
    top_p: float = setting("Nucleus sampling.", 1.0)
    generate_batch_size: int = setting("Prompts sampled at once; also the unit of resuming.", 8)
    engine: str = setting(
        "'auto' (vllm when installed and on CUDA), 'transformers' or 'vllm'.", "auto"
    )

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ("auto", "transformers", "vllm"))
        if self.num_responses < 2:
            raise OptionError(f"--num_responses: expected at least 2, got {self.num_responses}")


@dataclass
class JudgeOptions:
    """Judging."""

    judge: str = setting(f"{NAMES}.", "")
    debias: bool = setting(
        "Average over both orders, so that a position's advantage cancels.", True
    )
    judge_temperature: float = setting("Divides the judge's logits.", 1.0)
    judge_batch_size: int = setting("Prompts judged at once; also the unit of resuming.", 16)


@dataclass
class TrainOptions:
    """Data and adapters."""

    train_data: str = setting("Parquet or JSON lines of judged responses.", "")
    eval_data: str = setting("The same for evaluation.", "")
    lora_r: int = setting("Rank of LoRA adapters on all linear layers; 0 trains all weights.", 0)
    lora_alpha: int = setting("Scale of the adapters is alpha / r.", 16)


@dataclass
class LoopOptions:
    """Self-play."""

    prompts: str = setting("Parquet or JSON lines with a column prompt, or text lines.", "")
    run_dir: str = setting("Folder of the run.", "")
    rounds: int = setting("Rounds of self-play, T.", 3)
    eval_prompts: int = setting("Prompts held out to measure the win rate against the start.", 64)
    eval_samples: int = setting("Answers of each model to a held-out prompt.", 4)
    baseline: str = setting("'dpo' runs the same loop with iterative DPO beside it.", "")
    loop_seed: int = setting("Of the split of the prompts and of sampling.", 0)

    def __post_init__(self) -> None:
        one_of("baseline", self.baseline, ("dpo", ""))
