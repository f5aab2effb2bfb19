"""Settings of the trainer: those of transformers, and what SPPO adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from sppo_kernels.optional import require

require("transformers")
from transformers import TrainingArguments  # noqa: E402

from sppo_kernels.trainer.objective import PAIRWISE, pairwise_settings  # noqa: E402

PAIRS = ("all", "best_worst")
OVERLONG = ("refuse", "drop", "truncate")
PACKING = ("auto", "shared", "padded")
HEADS = ("auto", "fused", "logits")
UNITS = ("win_rate", "log_ratio")
OBJECTIVES = tuple(dict.fromkeys(("sppo", *PAIRWISE)))


@dataclass
class SPPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the settings of SPPO.

    A batch is `per_device_train_batch_size` prompts with all their responses.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate."})
    eta: float = field(
        default=1000.0, metadata={"help": "Step size of self-play, 1/beta of the paper."}
    )
    objective: str = field(
        default="sppo",
        metadata={
            "help": "'sppo', or a kind of pairwise_loss on the best and worst response: 'dpo', "
            "'ipo', 'simpo', ... (docs/objectives.md)."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Beta of a pairwise objective (default: 1/eta for 'sppo_hard' and "
            "'sppo_single', dpo_beta for the others)."
        },
    )
    dpo_beta: float = field(
        default=0.1, metadata={"help": "Beta of pairwise objectives when beta is not given."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Of the pairwise objectives that take it."}
    )
    objective_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": "Other numbers of a pairwise objective, as a dict or JSON: '{\"margin\": 0.5}'."
        },
    )
    loss_units: str = field(
        default="win_rate",
        metadata={
            "help": "'win_rate': the residual divided by eta, of order 1; 'log_ratio': the paper's."
        },
    )
    pairs: str = field(
        default="all",
        metadata={"help": "'all' K responses, or the 'best_worst' pair of the released recipe."},
    )
    max_length: int = field(
        default=2048, metadata={"help": "Most tokens of a prompt and one response together."}
    )
    overlong: str = field(
        default="refuse",
        metadata={
            "help": "Responses over max_length: 'refuse' (an error), 'drop' the prompt, 'truncate'."
        },
    )
    packing: str = field(
        default="auto",
        metadata={
            "help": "'shared': no padding and each prompt computed once for its K responses; "
            "'padded'; 'auto': shared where the model allows."
        },
    )
    head: str = field(
        default="auto",
        metadata={
            "help": "'fused': from hidden states, an error when the head is not understood; "
            "'logits': from logits; 'auto': fused, or logits with the reason logged."
        },
    )
    length_bucketing: bool = field(
        default=True, metadata={"help": "Batches of similar lengths when batches are padded."}
    )
    memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes the fused loss may hold for logits."}
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End responses given as text with the tokenizer's end token."},
    )
    reference_batch_size: int | None = field(
        default=None,
        metadata={"help": "Prompts a batch for reference log-probs (default: the eval one)."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the reference log-probs (default: in output_dir)."},
    )
    impl: str = field(
        default="auto", metadata={"help": "Backend: 'auto', 'reference', 'triton' or 'native'."}
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        super().__post_init__()
        choices = {
            "pairs": PAIRS,
            "overlong": OVERLONG,
            "packing": PACKING,
            "head": HEADS,
            "loss_units": UNITS,
            "objective": OBJECTIVES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if not self.eta > 0:
            raise ValueError(f"eta: expected a number above 0, got {self.eta}")
        if self.objective != "sppo":
            self.pairs = "best_worst"  # the loss is that of a pair
            pairwise_settings(self)
        else:
            given = (self.beta, self.label_smoothing or None, self.objective_settings)
            names = ("beta", "label_smoothing", "objective_settings")
            for name, value in zip(names, given, strict=True):
                if value is not None:
                    raise ValueError(f"{name}: objective='sppo' does not take it (it takes eta)")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {self.max_length}")
