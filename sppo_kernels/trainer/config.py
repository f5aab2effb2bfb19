"""Settings of the trainer: those of transformers, and what SPPO adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sppo_kernels.optional import require
from sppo_kernels.options import setting

require("transformers")
from transformers import TrainingArguments  # noqa: E402

from sppo_kernels.trainer.objective import PAIRWISE, pairwise_settings  # noqa: E402

UNITS = ("win_rate", "log_ratio")
OBJECTIVES = tuple(dict.fromkeys(("sppo", *PAIRWISE)))
CHOICES = {
    "pairs": ("all", "best_worst"),
    "overlong": ("refuse", "drop", "truncate"),
    "packing": ("auto", "shared", "padded"),
    "head": ("auto", "fused", "logits"),
    "objective": OBJECTIVES,
}


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


@dataclass
class LossConfig:
    """How the fused loss runs, in the configuration of any trainer that has `eta`."""

    loss_units: str = setting(
        "win_rate",
        "'win_rate': the residual divided by eta, of order 1, so that gradient "
        "clipping of other losses fits; 'log_ratio': in nats, the paper's.",
    )
    memory_budget: int | None = setting(None, "Bytes the fused loss may hold for logits.")
    impl: str = setting("auto", "Backend: 'auto', 'reference', 'triton' or 'native'.")

    def loss_settings(self) -> dict[str, Any]:
        """Arguments of the fused loss."""
        settings = {"eta": self.eta, "units": self.loss_units}
        return settings | {"memory_budget": self.memory_budget, "impl": self.impl}

    def check_loss(self, step: str) -> None:
        """Raise ValueError unless `step`, which is or gives eta, is above 0 and units are known."""
        value = getattr(self, step)
        if not value > 0:
            why = "" if step == "eta" else " (eta = 1/beta)"
            raise ValueError(f"{step}: expected a number above 0{why}, got {value}")
        check_choice("loss_units", self.loss_units, UNITS)


@dataclass
class SPPOConfig(LossConfig, TrainingArguments):
    """`transformers.TrainingArguments` and the settings of SPPO.

    A batch is `per_device_train_batch_size` prompts with all their responses.
    """

    learning_rate: float = setting(5e-7, "Initial learning rate.")
    eta: float = setting(1000.0, "Step size of self-play, 1/beta of the paper.")
    objective: str = setting(
        "sppo",
        "'sppo', or a kind of pairwise_loss on the best and worst response: 'dpo', "
        "'ipo', 'simpo', ... (docs/objectives.md).",
    )
    beta: float | None = setting(
        None,
        "Beta of a pairwise objective (default: 1/eta for 'sppo_hard' and "
        "'sppo_single', dpo_beta for the others).",
    )
    dpo_beta: float = setting(0.1, "Beta of pairwise objectives when beta is not given.")
    label_smoothing: float = setting(0.0, "Of the pairwise objectives that take it.")
    objective_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": "Other numbers of a pairwise objective, as a dict or JSON: '{\"margin\": 0.5}'."
        },
    )
    pairs: str = setting(
        "all", "'all' K responses, or the 'best_worst' pair of the released recipe."
    )
    max_length: int = setting(2048, "Most tokens of a prompt and one response together.")
    overlong: str = setting(
        "refuse", "Responses over max_length: 'refuse' (an error), 'drop' the prompt, 'truncate'."
    )
    packing: str = setting(
        "auto",
        "'shared': no padding and each prompt computed once for its K responses; "
        "'padded'; 'auto': shared where the model allows.",
    )
    head: str = setting(
        "auto",
        "'fused': from hidden states, an error when the head is not understood; "
        "'logits': from logits; 'auto': fused, or logits with the reason logged.",
    )
    length_bucketing: bool = setting(True, "Batches of similar lengths when batches are padded.")
    append_eos: bool = setting(True, "End responses given as text with the tokenizer's end token.")
    reference_batch_size: int | None = setting(
        None, "Prompts a batch for reference log-probs (default: the eval one)."
    )
    reference_cache: str | None = setting(
        None, "Folder of the reference log-probs (default: in output_dir)."
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        super().__post_init__()
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        self.check_loss("eta")
        if self.objective != "sppo":
            self.pairs = "best_worst"  # the loss is that of a pair
            pairwise_settings(self)
        else:
            given = {"beta": self.beta, "label_smoothing": self.label_smoothing or None}
            for name, value in {**given, "objective_settings": self.objective_settings}.items():
                if value is not None:
                    raise ValueError(f"{name}: objective='sppo' does not take it (it takes eta)")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {self.max_length}")
