"""How often a policy's answers beat those of the policy that self-play started from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sppo_kernels.judges.base import Judge
from sppo_kernels.selfplay.generate import generate
from sppo_kernels.selfplay.judge import compare
from sppo_kernels.selfplay.options import JudgeOptions

if TYPE_CHECKING:
    from sppo_kernels.selfplay.iterate import Run


def held_out_answers(
    run: Run, prompts: list[dict], model: str, folder: Path, title: str, *seed: Any
) -> list[dict[str, Any]]:
    """Rows of `generate` for held-out prompts, by the model of a run's folder."""
    options = dataclasses.replace(
        run.generate,
        num_responses=max(2, run.loop.eval_samples),
        generate_batch_size=max(64, run.generate.generate_batch_size),
    )
    policy, path = dataclasses.replace(run.model, model=model), folder / "held-out.parquet"
    seed = [run.loop.loop_seed, "held out", *seed]
    return generate(policy, prompts, path, options, seed, f"{title}: held-out prompts", run.quiet)


def win_rate_against_start(
    now: list[dict[str, Any]], start: list[dict[str, Any]], judge: Judge, options: JudgeOptions
) -> dict[str, float]:
    """Win rate of one policy's answers against another's, with a 95 % interval over prompts.

    Args:
        now, start: rows of `generate` of both policies for the same prompts.
    """
    both = [
        a | {"responses": a["responses"] + b["responses"]} for a, b in zip(now, start, strict=True)
    ]
    count, size, values = len(now[0]["responses"]), options.judge_batch_size, []
    for begin in range(0, len(both), size):
        _, wins = compare(both[begin : begin + size], judge, options)
        values.append(wins[:, :count, count:].mean((1, 2)))
    return mean_with_interval(torch.cat(values).double())


def mean_with_interval(values: Tensor) -> dict[str, float]:
    """Mean of values [n] and its 95 % interval by the normal approximation."""
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"win_rate": mean, "low": mean - half, "high": mean + half, "prompts": len(values)}
