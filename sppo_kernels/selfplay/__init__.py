"""Self-play as a library: answer, judge, train, measure, and rounds of all four.

    from sppo_kernels.selfplay import GenerateOptions, JudgeOptions, ModelOptions
    from sppo_kernels.selfplay import generate, judge_rows, load_prompts

    rows = generate(ModelOptions(model="M"), load_prompts("p.txt"), "a.parquet", GenerateOptions())
    rows = judge_rows(rows, judge, "j.parquet", JudgeOptions(targets="nash"))

The command `sppo` is these functions behind flags.
"""

from sppo_kernels.selfplay.demo import DemoOptions, demo
from sppo_kernels.selfplay.evaluate import mean_with_interval, win_rate_against_start
from sppo_kernels.selfplay.generate import TransformersEngine, VLLMEngine, generate
from sppo_kernels.selfplay.iterate import Run, iterate, split_prompts
from sppo_kernels.selfplay.judge import judge_rows
from sppo_kernels.selfplay.load import load_model, load_prompts
from sppo_kernels.selfplay.options import (
    GenerateOptions,
    JudgeOptions,
    LoopOptions,
    ModelOptions,
    OptionError,
    TrainOptions,
)
from sppo_kernels.selfplay.train import lora_config, save, train

__all__ = [
    "DemoOptions",
    "GenerateOptions",
    "JudgeOptions",
    "LoopOptions",
    "ModelOptions",
    "OptionError",
    "Run",
    "TrainOptions",
    "TransformersEngine",
    "VLLMEngine",
    "demo",
    "generate",
    "iterate",
    "judge_rows",
    "load_model",
    "load_prompts",
    "lora_config",
    "mean_with_interval",
    "save",
    "split_prompts",
    "train",
    "win_rate_against_start",
]
