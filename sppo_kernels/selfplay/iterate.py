"""Rounds of self-play. In round t the policy π_{t-1} answers fresh prompts, the judge compares its
answers, and the next policy is trained with π_{t-1} as the reference.

Every stage writes its output whole; one that is complete is skipped. A run killed at any point goes
on when started again with the same settings, and ends with the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo_kernels.files import read_json, whole_folder, write_json
from sppo_kernels.judges.base import Judge
from sppo_kernels.judges.load import load_judge
from sppo_kernels.selfplay.evaluate import held_out_answers, win_rate_against_start
from sppo_kernels.selfplay.generate import generate
from sppo_kernels.selfplay.judge import judge_rows
from sppo_kernels.selfplay.load import load_model
from sppo_kernels.selfplay.options import (
    GenerateOptions,
    JudgeOptions,
    LoopOptions,
    ModelOptions,
    OptionError,
)
from sppo_kernels.selfplay.stages import derive_seed, same_settings
from sppo_kernels.selfplay.train import save, train

if TYPE_CHECKING:
    from sppo_kernels.trainer import SPPOConfig

# Settings that may change between the parts of a run.
VOLATILE = ("output_dir", "logging_dir", "disable_tqdm", "run_dir", "prompts", "run_name")


@dataclass
class Run:
    """All settings of a run; its judge is the one they name, unless another is given."""

    loop: LoopOptions
    model: ModelOptions
    generate: GenerateOptions
    judge_options: JudgeOptions
    args: SPPOConfig
    lora: Any = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        self.judge = self.judge or load_judge(self.judge_options.judge)

    @property
    def folder(self) -> Path:
        return Path(self.loop.run_dir)

    @property
    def quiet(self) -> bool:
        return self.args.disable_tqdm

    def settings(self) -> dict[str, Any]:
        """What decides the outcome."""
        options = (self.loop, self.model, self.generate, self.judge_options)
        found = {name: value for part in options for name, value in asdict(part).items()}
        found = {name: value for name, value in found.items() if name not in VOLATILE}
        args = self.args.to_dict().items()
        return found | {f"args.{name}": value for name, value in args if name not in VOLATILE}


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


def iterate(run: Run, prompts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Run all rounds of SPPO, and of the baseline when there is one.

    Returns:
        {method: [{round, win_rate, low, high, times, ...}, ...]}, also written as `results.json`.

    Raises:
        OptionError: too few prompts. DataError: the folder belongs to a run with other settings.
    """
    loop = run.loop
    held, splits = split_prompts(prompts, loop)
    settings = run.settings() | {"prompts_hash": derive_seed([p["prompt"] for p in prompts])}
    same_settings(run.folder / "settings.json", settings, asdict(JudgeOptions()))
    results: dict[str, list[dict[str, Any]]] = {}
    for method in ["sppo"] + ([loop.baseline] if loop.baseline else []):
        path, results[method] = run.model.model, []
        for t, fresh in enumerate(splits, 1):
            path, result = one_round(run, method, t, path, fresh, held)
            results[method].append(result)
    write_json(results, run.folder / "results.json")
    return results


@contextlib.contextmanager
def timed(times: dict[str, float], stage: str) -> Iterator[None]:
    """Seconds of the block, into `times`."""
    began = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - began


def one_round(
    run: Run, method: str, t: int, start: str, prompts: list[dict], held: list[dict]
) -> tuple[str, dict[str, Any]]:
    """Generate, judge, train and measure; returns the new model's folder and the result."""
    folder = run.folder / method / f"round-{t}"
    # All methods start from the same policy, so round 1's answers are shared.
    answers = (run.folder / "sppo" / "round-1") if t == 1 else folder
    model, done = folder / "model", folder / "result.json"
    if done.exists():
        return str(model), read_json(done)
    label, times = f"{method} round {t}", {}
    policy = dataclasses.replace(run.model, model=start)

    with timed(times, "generate"):
        path = answers / "responses.parquet"
        seed = [run.loop.loop_seed, "answers", method if t > 1 else "start", t]
        rows = generate(policy, prompts, path, run.generate, seed, f"{label}: generate", run.quiet)
    with timed(times, "judge"):
        path, title = answers / "judged.parquet", f"{label}: judge"
        rows = judge_rows(rows, run.judge, path, run.judge_options, title, run.quiet)

    def work(target: Path) -> None:
        args = copy.copy(run.args)
        args.output_dir = str(folder / "trainer")
        args.objective = method
        args.seed = args.data_seed = derive_seed(run.args.seed, method, t)
        if method == "dpo":
            args.pairs = "best_worst"
        network, tokenizer = load_model(policy)
        trainer = train(network, tokenizer, rows, args, run.lora)
        save(trainer, tokenizer, target)
        write_json(trainer.state.log_history, target / "training.json")

    with timed(times, "train"):
        whole_folder(model, work)
    with timed(times, "evaluate"):
        first = held_out_answers(run, held, run.model.model, run.folder / "start", "start", "start")
        now = held_out_answers(run, held, str(model), folder, label, method, t)
        result = {"round": t, **win_rate_against_start(now, first, run.judge, run.judge_options)}
    result["times"] = times
    write_json(result, done)
    return str(model), result
