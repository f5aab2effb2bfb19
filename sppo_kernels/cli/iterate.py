"""`sppo iterate`: rounds of self-play. In round t the policy π_{t-1} answers fresh prompts, the
judge compares its answers, and the next policy is trained with π_{t-1} as the reference.

Every stage writes its output whole; one that is complete is skipped. A run killed at any point goes
on when started again with the same settings, and ends with the same weights.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sppo_kernels.cli import generate as generation
from sppo_kernels.cli.judge import judge_rows
from sppo_kernels.cli.options import (
    GenerateOptions,
    JudgeOptions,
    ModelOptions,
    OptionError,
    _help,
    load_model,
    load_prompts,
    needed,
    parse,
)
from sppo_kernels.cli.report import write_report
from sppo_kernels.cli.stages import derive_seed, same_settings
from sppo_kernels.cli.train import TrainOptions, lora_config, save, train
from sppo_kernels.files import read_json, whole_folder, write_json
from sppo_kernels.judges import Judge, load_judge, win_matrices
from sppo_kernels.trainer import SPPOConfig


@dataclass
class LoopOptions:
    """Self-play."""

    prompts: str = _help("Parquet or JSON lines with a column prompt, or text lines.", "")
    run_dir: str = _help("Folder of the run.", "")
    rounds: int = _help("Rounds of self-play, T.", 3)
    eval_prompts: int = _help("Prompts held out to measure the win rate against the start.", 64)
    eval_samples: int = _help("Answers of each model to a held-out prompt.", 4)
    baseline: str = _help("'dpo' runs the same loop with iterative DPO beside it.", "")
    loop_seed: int = _help("Of the split of the prompts and of sampling.", 0)


@dataclass
class Run:
    """All settings of a run, and its judge."""

    loop: LoopOptions
    model: ModelOptions
    generate: GenerateOptions
    judge_options: JudgeOptions
    judge: Judge
    args: SPPOConfig
    lora: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.loop.run_dir)

    @property
    def quiet(self) -> bool:
        return self.args.disable_tqdm


def split_prompts(prompts: list[dict], loop: LoopOptions) -> tuple[list[dict], list[list[dict]]]:
    """Held-out prompts, and fresh ones for each round; a shuffle that depends on the seed only.

    Raises:
        OptionError: too few prompts for all of that.
    """
    prompts = list(prompts)
    random.Random(derive_seed(loop.loop_seed, "split")).shuffle(prompts)
    held, rest = prompts[: loop.eval_prompts], prompts[loop.eval_prompts :]
    if len(rest) < loop.rounds:
        raise OptionError(
            f"--prompts: expected at least {loop.eval_prompts + loop.rounds} ({loop.eval_prompts} "
            f"held out and one a round), got {len(prompts)}"
        )
    return held, [rest[t :: loop.rounds] for t in range(loop.rounds)]


def iterate(run: Run, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Run all rounds of SPPO, and of the baseline when there is one.

    Returns:
        {method: [{round, win_rate, low, high, times, ...}, ...]}; also written with the report.
    """
    loop = run.loop
    if loop.baseline not in ("", "dpo"):
        raise OptionError(f"--baseline: expected 'dpo' or nothing, got {loop.baseline!r}")
    held, splits = split_prompts(prompts, loop)
    settings = asdict(loop) | asdict(run.model) | asdict(run.generate) | asdict(run.judge_options)
    settings |= {"prompts_hash": derive_seed([p["prompt"] for p in prompts])}
    volatile = ("output_dir", "logging_dir", "disable_tqdm", "run_dir", "prompts", "run_name")
    arguments = {f"args.{k}": v for k, v in run.args.to_dict().items() if k not in volatile}
    settings = {k: v for k, v in (settings | arguments).items() if k not in volatile}
    same_settings(run.folder / "settings.json", settings)

    methods = ["sppo"] + ([loop.baseline] if loop.baseline else [])
    results: dict[str, Any] = {method: [] for method in methods}
    for method in methods:
        path = run.model.model
        for t in range(1, loop.rounds + 1):
            path, result = one_round(run, method, t, path, splits[t - 1], held)
            results[method].append(result)
    write_json(results, run.folder / "results.json")
    write_report(run.folder, results)
    return results


def one_round(
    run: Run, method: str, t: int, start: str, prompts: list[dict], held: list[dict]
) -> tuple[str, dict[str, Any]]:
    """Generate, judge, train and measure; returns the new model's folder and the result."""
    folder = run.folder / method / f"round-{t}"
    # All methods start from the same policy, so round 1's answers are shared.
    answers = (run.folder / "sppo" / "round-1") if t == 1 else folder
    done = folder / "result.json"
    if done.exists():
        return str(folder / "model"), read_json(done)
    label, times, quiet = f"{method} round {t}", {}, run.quiet

    began = time.perf_counter()
    path = answers / "responses.parquet"
    seed = [run.loop.loop_seed, "answers", method if t > 1 else "start", t]
    rows = answer(run, start, prompts, path, run.generate, seed, f"{label}: generate")
    times["generate"], began = time.perf_counter() - began, time.perf_counter()

    rows = judge_rows(
        *(rows, run.judge, answers / "judged.parquet", run.judge_options, run.judge_options.judge),
        title=f"{label}: judge",
        quiet=quiet,
    )
    times["judge"], began = time.perf_counter() - began, time.perf_counter()

    def work(target: Path) -> None:
        model, tokenizer = load_model(run.model, start)
        args = copy.copy(run.args)
        args.output_dir = str(folder / "trainer")
        args.objective = method
        args.seed = args.data_seed = derive_seed(run.args.seed, method, t)
        if method == "dpo":
            args.pairs = "best_worst"
        trainer = train(model, tokenizer, rows, args, run.lora)
        save(trainer, tokenizer, target)
        write_json(trainer.state.log_history, target / "training.json")

    model = whole_folder(folder / "model", work)
    times["train"], began = time.perf_counter() - began, time.perf_counter()
    result = {"round": t, **win_rate_against_start(run, method, t, str(model), held)}
    times["evaluate"] = time.perf_counter() - began
    result["times"] = times
    write_json(result, done)
    return str(model), result


def answer(
    run: Run,
    model_path: str,
    prompts: list[dict],
    path: Path,
    options: GenerateOptions,
    seed: Any,
    title: str,
) -> list[dict[str, Any]]:
    """Answers of the model in a folder, read back when they are there."""
    if path.exists():
        return generation.read_rows(path)
    if generation.uses_vllm(options, run.model.device):
        return generation.generate_vllm(model_path, prompts, path, options, seed)
    model, tokenizer = load_model(run.model, model_path)
    return generation.generate(
        model, tokenizer, prompts, path, options, seed, title, quiet=run.quiet
    )


def win_rate_against_start(
    run: Run, method: str, t: int, model_path: str, held: list[dict]
) -> dict[str, float]:
    """Win rate of a policy against π_0 on held-out prompts, with a 95 % interval over prompts."""
    options = copy.copy(run.generate)
    options.num_responses = max(2, run.loop.eval_samples)
    options.generate_batch_size = max(64, options.generate_batch_size)
    seed = [run.loop.loop_seed, "held out"]
    start = answer(
        *(run, run.model.model, held, run.folder / "start" / "held-out.parquet", options),
        *([*seed, "start"], "start: held-out prompts"),
    )
    now = answer(
        *(run, model_path, held, run.folder / method / f"round-{t}" / "held-out.parquet", options),
        *([*seed, method, t], f"{method} round {t}: held-out prompts"),
    )
    both = [a["responses"] + b["responses"] for a, b in zip(now, start, strict=True)]
    values = []
    size = run.judge_options.judge_batch_size
    count = options.num_responses
    for begin in range(0, len(held), size):
        part = slice(begin, begin + size)
        logits = run.judge.logits([row["prompt"] for row in now[part]], both[part])
        wins = win_matrices(
            logits,
            debias=run.judge_options.debias,
            temperature=run.judge_options.judge_temperature,
        )
        values.append(wins[:, :count, count:].mean((1, 2)))
    return mean_with_interval(torch.cat(values).double())


def mean_with_interval(values: torch.Tensor) -> dict[str, float]:
    """Mean of values [n] and its 95 % interval by the normal approximation."""
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"win_rate": mean, "low": mean - half, "high": mean + half, "prompts": len(values)}


def run(argv: Sequence[str]) -> None:
    loop, model, generate, judge, extra, args = parse(
        (LoopOptions, ModelOptions, GenerateOptions, JudgeOptions, TrainOptions, SPPOConfig),
        *(argv, "sppo iterate", __doc__),
        save_strategy="no",
        report_to="none",
    )
    needed(loop, "prompts", "run_dir")
    needed(model, "model")
    needed(judge, "judge")
    prompts = load_prompts(loop.prompts)
    settings = Run(loop, model, generate, judge, load_judge(judge.judge), args, lora_config(extra))
    iterate(settings, prompts)
