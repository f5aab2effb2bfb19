"""`sppo train`: train on judged responses; the model given is the policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_kernels.cli.options import ModelOptions, _help, load_model, needed, parse
from sppo_kernels.optional import require

require("transformers")
from transformers import PrinterCallback  # noqa: E402

from sppo_kernels.trainer import SPPOConfig, SPPOTrainer  # noqa: E402


@dataclass
class TrainOptions:
    """Data and adapters."""

    train_data: str = _help("Parquet or JSON lines of judged responses.", "")
    eval_data: str = _help("The same for evaluation.", "")
    lora_r: int = _help("Rank of LoRA adapters on all linear layers; 0 trains all weights.", 0)
    lora_alpha: int = _help("Scale of the adapters is alpha / r.", 16)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; a kill may leave a later one in pieces."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in reversed(found):
        names = {p.name for p in path.iterdir()}
        if {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= names:
            return str(path)
    return None


def lora_config(options: TrainOptions) -> Any:
    if not options.lora_r:
        return None
    return require("peft").LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def train(
    model: Any, tokenizer: Any, rows: Any, args: SPPOConfig, peft_config: Any = None, eval_rows=None
) -> SPPOTrainer:
    """Train, going on from the last complete checkpoint in args.output_dir; returns the trainer."""
    trainer = SPPOTrainer(
        model, args, rows, eval_rows, processing_class=tokenizer, peft_config=peft_config
    )
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # quiet; the log is in trainer.state.log_history
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    return trainer


def save(trainer: SPPOTrainer, tokenizer: Any, folder: Path) -> None:
    """The trained model (adapters merged into it) and its tokenizer."""
    trainer.release()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(argv: Sequence[str]) -> None:
    options, model_options, args = parse(
        (TrainOptions, ModelOptions, SPPOConfig), argv, "sppo train", __doc__
    )
    needed(model_options, "model")
    needed(options, "train_data")
    model, tokenizer = load_model(model_options)
    trainer = train(
        model,
        tokenizer,
        options.train_data,
        args,
        lora_config(options),
        options.eval_data or None,
    )
    if trainer.eval_dataset is not None:
        print(trainer.evaluate())
    save(trainer, tokenizer, Path(args.output_dir))
    print(f"{args.output_dir}: trained for {trainer.state.global_step} steps")
