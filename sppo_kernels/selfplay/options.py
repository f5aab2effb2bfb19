"""Settings of the loop's stages: plain dataclasses with the help texts in the fields' metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sppo_kernels.data.rows import DataError
from sppo_kernels.games import TARGETS
from sppo_kernels.judges.load import names
from sppo_kernels.options import setting


class OptionError(DataError):
    """A setting is missing, unknown, or cannot be combined with another."""


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise OptionError unless a setting has one of its values."""
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise OptionError(f"--{name}: expected {', '.join(others)} or {last}, got {value!r}")


@dataclass
class ModelOptions:
    """The model."""

    model: str = setting("", "Folder or hub name of the causal language model.")
    dtype: str = setting("auto", "'auto', 'float32', 'bfloat16' or 'float16'.")
    device: str = setting("auto", "'auto', 'cpu', 'cuda', ...")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")


@dataclass
class GenerateOptions:
    """Sampling."""

    num_responses: int = setting(5, "Responses to a prompt, K.")
    max_new_tokens: int = setting(1024, "Most tokens of a response.")
    temperature: float = setting(1.0, "Of sampling; 1 samples from the policy itself.")
    top_p: float = setting(1.0, "Nucleus sampling.")
    generate_batch_size: int = setting(8, "Prompts sampled at once; also the unit of resuming.")
    engine: str = setting(
        "auto", "'auto' (vllm when installed and on CUDA), 'transformers' or 'vllm'."
    )

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ("auto", "transformers", "vllm"))
        if self.num_responses < 2:
            raise OptionError(f"--num_responses: expected at least 2, got {self.num_responses}")


@dataclass
class JudgeOptions:
    """Judging."""

    judge: str = setting("", f"{names()}.")
    debias: bool = setting(
        True, "Average over both orders, so that a position's advantage cancels."
    )
    judge_temperature: float = setting(1.0, "Divides the judge's logits.")
    judge_batch_size: int = setting(16, "Prompts judged at once; also the unit of resuming.")
    targets: str = setting(
        "win_rate",
        "Whom a response is measured against: 'win_rate' (the other responses), 'nash' (the "
        f"equilibrium), ... (docs/games.md); one of {', '.join(TARGETS)}.",
    )
    targets_tau: float = setting(0.1, "Of targets 'regularized_nash', in win rate.")

    def __post_init__(self) -> None:
        one_of("targets", self.targets, TARGETS)
        if self.targets == "uclaml" and not self.debias:
            raise OptionError("--targets: 'uclaml' averages over both orders, got --debias False")
        if not self.targets_tau > 0:
            raise OptionError(f"--targets_tau: expected a number above 0, got {self.targets_tau}")


@dataclass
class TrainOptions:
    """Data and adapters."""

    train_data: str = setting("", "Parquet or JSON lines of judged responses.")
    eval_data: str = setting("", "The same for evaluation.")
    lora_r: int = setting(0, "Rank of LoRA adapters on all linear layers; 0 trains all weights.")
    lora_alpha: int = setting(16, "Scale of the adapters is alpha / r.")


@dataclass
class LoopOptions:
    """Self-play."""

    prompts: str = setting("", "Parquet or JSON lines with a column prompt, or text lines.")
    run_dir: str = setting("", "Folder of the run.")
    rounds: int = setting(3, "Rounds of self-play, T.")
    eval_prompts: int = setting(64, "Prompts held out to measure the win rate against the start.")
    eval_samples: int = setting(4, "Answers of each model to a held-out prompt.")
    baseline: str = setting("", "'dpo' runs the same loop with iterative DPO beside it.")
    loop_seed: int = setting(0, "Of the split of the prompts and of sampling.")

    def __post_init__(self) -> None:
        one_of("baseline", self.baseline, ("dpo", ""))
