"""Training on judged responses; the model given is the policy and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo_kernels.optional import require
from sppo_kernels.selfplay.options import TrainOptions

if TYPE_CHECKING:
    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; a kill may leave a later one in pieces."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in reversed(found):
        names = {p.name for p in path.iterdir()}
        if {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= names:
            return str(path)
    return None


def lora_config(options: TrainOptions) -> Any:
    """The peft configuration of the options, None when all weights train."""
    if not options.lora_r:
        return None
    return require("peft").LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def train(
    model: Any,
    tokenizer: Any,
    rows: Any,
    args: SPPOConfig,
    peft_config: Any = None,
    eval_rows: Any = None,
) -> SPPOTrainer:
    """Train, going on from the last complete checkpoint in args.output_dir; returns the trainer."""
    from transformers import PrinterCallback

    from sppo_kernels.trainer import SPPOTrainer

    trainer = SPPOTrainer(
        model, args, rows, eval_rows, processing_class=tokenizer, peft_config=peft_config
    )
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # quiet; the log is in trainer.state.log_history
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    return trainer


def save(trainer: SPPOTrainer, tokenizer: Any, folder: str | Path) -> None:
    """The trained model (adapters merged into it) and its tokenizer."""
    trainer.release()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
