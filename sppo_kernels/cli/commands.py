"""The commands: from options to a call of the library, and what is printed of its result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_kernels import data, selfplay
from sppo_kernels.cli import env, tune
from sppo_kernels.cli.parsing import Command
from sppo_kernels.cli.report import write_report
from sppo_kernels.judges.load import load_judge
from sppo_kernels.selfplay.options import (
    GenerateOptions,
    JudgeOptions,
    LoopOptions,
    ModelOptions,
    TrainOptions,
    one_of,
    setting,
)

if TYPE_CHECKING:
    from sppo_kernels.trainer import SPPOConfig


@dataclass
class GenerateFiles:
    """Files."""

    prompts: str = setting("", "Parquet or JSON lines with a column prompt, or text lines.")
    output: str = setting("", "Parquet file to write.")
    seed: int = setting(0, "Of sampling.")


@dataclass
class Files:
    """Files."""

    input: str = setting("", "Parquet file; to convert, JSON lines too.")
    output: str = setting("", "Parquet file to write.")


@dataclass
class ConvertOptions(Files):
    """Files and direction."""

    to: str = setting("sppo", "'uclaml' (the released columns) or 'sppo' (this package's rows).")

    def __post_init__(self) -> None:
        one_of("to", self.to, ("uclaml", "sppo"))


def generate(files: GenerateFiles, model: ModelOptions, options: GenerateOptions) -> None:
    """sample K responses to each prompt from a model, with the token ids they were sampled as"""
    prompts = selfplay.load_prompts(files.prompts)
    rows = selfplay.generate(model, prompts, files.output, options, files.seed)
    finished = [done for row in rows for done in row["finished"]]
    counts = f"{len(rows)} prompts, {len(finished)} responses, {finished.count(False)} stopped"
    print(f"{files.output}: {counts} at max_new_tokens")


def judge(files: Files, options: JudgeOptions) -> None:
    """compare the responses of each prompt and write win matrices and win rates"""
    rows, by = data.read_parquet(files.input), load_judge(options.judge)
    rows = selfplay.judge_rows(rows, by, files.output, options)
    spread = sum(max(r["win_rate"]) - min(r["win_rate"]) for r in rows) / len(rows)
    print(f"{files.output}: {len(rows)} prompts, best minus worst win rate {spread:.3f} on average")


def train(options: TrainOptions, model: ModelOptions, args: SPPOConfig) -> None:
    """train on judged responses; the model given is the policy and its reference"""
    network, tokenizer = selfplay.load_model(model)
    lora, eval_data = selfplay.lora_config(options), options.eval_data or None
    trainer = selfplay.train(network, tokenizer, options.train_data, args, lora, eval_data)
    if trainer.eval_dataset is not None:
        print(trainer.evaluate())
    selfplay.save(trainer, tokenizer, args.output_dir)
    print(f"{args.output_dir}: trained for {trainer.state.global_step} steps")


def iterate(
    loop: LoopOptions,
    model: ModelOptions,
    generate: GenerateOptions,
    options: JudgeOptions,
    extra: TrainOptions,
    args: SPPOConfig,
) -> None:
    """rounds of generate, judge and train (self-play); resumable

    In round t the policy π_{t-1} answers fresh prompts, the judge compares its answers, and the
    next policy is trained with π_{t-1} as the reference. A run killed at any point goes on when
    started again with the same settings, and ends with the same weights.
    """
    prompts, lora = selfplay.load_prompts(loop.prompts), selfplay.lora_config(extra)
    run = selfplay.Run(loop, model, generate, options, args, lora)
    write_report(run.folder, selfplay.iterate(run, prompts))


def convert(options: ConvertOptions) -> None:
    """to and from the five columns of the released SPPO data"""
    rows = list(data.load_rows(options.input))
    if options.to == "uclaml":
        found = data.to_uclaml(data.canonical_row(row, i) for i, row in enumerate(rows))
    else:
        found = data.from_uclaml(rows)
    data.write_parquet(found, options.output)
    columns = ", ".join(found[0]) if found else "none"
    print(f"{options.output}: {len(found)} rows, columns {columns}")


def demo(options: selfplay.DemoOptions) -> None:
    """three rounds of self-play of a small model, on CPU in minutes, with iterative DPO beside it

    The model first learns the sentences of this package's own documentation. Then it plays against
    itself, for a judge whose preferences no ranking of answers explains.
    """
    began = time.perf_counter()
    write_report(Path(options.run_dir), selfplay.demo(options))
    print(f"{time.perf_counter() - began:.0f} s")


# The first line of a function's docstring is its line in the list, its parameters are its options.
COMMANDS = {
    "generate": Command(generate, required=("model", "prompts", "output")),
    "judge": Command(judge, required=("input", "output", "judge")),
    "train": Command(train, required=("model", "train_data")),
    "iterate": Command(
        iterate,
        required=("model", "prompts", "run_dir", "judge"),
        defaults={"save_strategy": "no", "report_to": "none"},
    ),
    "convert": Command(convert, required=("input", "output")),
    "demo": Command(demo),
    "tune": Command(tune.run),
    "env": Command(env.run),
}
