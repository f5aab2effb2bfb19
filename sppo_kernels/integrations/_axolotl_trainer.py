"""SPPOTrainer with the constructor that axolotl's RL builder calls, and axolotl's own mixins."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from sppo_kernels.integrations._swap import IntegrationError, require_module
from sppo_kernels.integrations.axolotl import TESTED, options_of
from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

_mixins = require_module("axolotl.core.trainers.mixins", TESTED)
_optimizer = require_module("axolotl.core.trainers.mixins.optimizer", TESTED)
_arguments = require_module("axolotl.core.training_args_base", TESTED)

__all__ = ["AxolotlSPPOConfig", "AxolotlSPPOTrainer"]


@dataclasses.dataclass
class AxolotlSPPOConfig(_arguments.AxolotlTrainingMixins, SPPOConfig):
    """Axolotl's training arguments and the settings of SPPO."""


def converted(args: Any, cfg: Any) -> AxolotlSPPOConfig:
    """The builder's DPO arguments as ours; what both know by the same name is kept.

    η is `sppo_kernels: {eta: ...}`, else 1/beta, as in TRL's sppo_hard.

    Raises:
        IntegrationError: `dpo_loss_type` or `dpo_label_smoothing` was set.
    """
    if isinstance(args, SPPOConfig):
        return args
    for name, allowed in (("loss_type", (["sigmoid"], "sigmoid")), ("label_smoothing", (0, None))):
        given = getattr(args, name, allowed[0])
        if given not in allowed:
            raise IntegrationError(
                f"dpo_{name}: expected unset where SPPO takes the loss's place, got {given!r}"
            )
    names = {f.name for c in (TrainingArguments, _arguments.AxolotlTrainingMixins)
             for f in dataclasses.fields(c) if f.init}  # fmt: skip
    known = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in names}
    if getattr(args, "max_length", None) is not None:
        known["max_length"] = args.max_length
    known["eta"] = 1.0 / args.beta
    known |= {k: v for k, v in options_of(cfg) if k != "loss" and v is not None}
    return AxolotlSPPOConfig(**known)


class AxolotlSPPOTrainer(
    _mixins.RngLoaderMixin,
    _mixins.SchedulerMixin,
    _mixins.OptimizerMixin,
    _optimizer.OptimizerInitMixin,
    SPPOTrainer,
):
    """`SPPOTrainer` as axolotl's `HFRLTrainerBuilder` makes it.

    Args:
        model, ref_model: positional, as the builder passes them for `rl: dpo`.
        args: axolotl's DPO arguments; see `converted`.
        train_dataset, eval_dataset: rows with prompt, chosen, rejected (and chosen_probs_win,
            chosen_probs_lose), or K responses; as in `SPPOTrainer`.

    Raises:
        IntegrationError: a collator was given (`pad_to_multiple_of`), which SPPO's batches replace.
    """

    tag_names = ("axolotl", "sppo")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is not None:
            raise IntegrationError(
                "pad_to_multiple_of: expected unset, since SPPO has batches of its own, got a "
                f"{type(data_collator).__name__}"
            )
        base = require_module("axolotl.integrations.base", TESTED)
        settings = converted(args, base.PluginManager.get_instance().cfg)
        super().__init__(
            model,
            settings,
            train_dataset,
            eval_dataset,
            processing_class,
            ref_model=ref_model,
            peft_config=peft_config,
            **kwargs,
        )
