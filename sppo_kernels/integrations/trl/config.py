"""Settings of SoftSPPOTrainer: those of TRL's DPOConfig, and what soft win rates add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sppo_kernels.integrations.trl import hooks
from sppo_kernels.trainer.config import LossConfig

DPOConfig: Any = hooks.load()["DPOConfig"]

SOFT = ("sppo", "sppo_single", "sppo_hard")
# Settings of DPOConfig that change another loss and mean nothing for these: value when unused.
UNUSED = {
    "ld_alpha": None,
    "use_weighting": False,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
}


@dataclass
class SoftSPPOConfig(LossConfig, DPOConfig):
    """`trl.DPOConfig` with the loss types `sppo` and `sppo_single`, and `sppo_hard` fused.

    With r = log π_θ(y|x) − log π_ref(y|x) and η = 1/beta, per response (docs/trl_trainer.md):

    - `sppo`: (r − η(w − ½))², w the response's own win rate; mean over responses.
    - `sppo_single`: as `sppo` with w = p for chosen and 1 − p for rejected, p = `chosen_probs`.
    - `sppo_hard`: as TRL defines it, w = 1 and 0, summed over the pair: twice the mean.
    - any other loss type of TRL: TRL's own, unchanged.

    Defaults that differ from DPOConfig's: `loss_type` is `sppo`; `beta` is 0.001 (η = 1000, the
    paper's) for `sppo` and `sppo_single`, and TRL's own default for every other loss type.

    Raises:
        ValueError: a loss type of SPPO together with another, or with a setting that it has no
            meaning for (`ld_alpha`, `use_weighting`, `label_smoothing`, `f_divergence_type`).
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["sppo"],
        metadata={"help": "'sppo', 'sppo_single', 'sppo_hard', or any loss type of DPOConfig."},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "1/eta of SPPO. Default: 0.001 for sppo and sppo_single, else TRL's."},
    )
    loss_units: str = field(
        default="log_ratio", metadata=LossConfig.__dataclass_fields__["loss_units"].metadata
    )

    @property
    def eta(self) -> float:
        """η = 1/beta."""
        return 1.0 / self.beta

    @property
    def soft(self) -> str | None:
        """The SPPO loss type in use, None for TRL's own."""
        return self.loss_type[0] if self.loss_type[0] in SOFT else None

    def __post_init__(self) -> None:
        super().__post_init__()
        ours = [name for name in self.loss_type if name in SOFT]
        if self.beta is None:
            own = DPOConfig.__dataclass_fields__["beta"].default
            self.beta = 0.001 if set(ours) & {"sppo", "sppo_single"} else own
        if not ours:
            return
        if len(self.loss_type) > 1:
            raise ValueError(
                f"loss_type: {ours[0]!r} is fused with the head and cannot be combined with other "
                f"losses, got {self.loss_type}"
            )
        self.check_loss("beta")
        for name, neutral in UNUSED.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(
                    f"{name}: has no meaning for loss_type {ours[0]!r}; expected {neutral!r}, got "
                    f"{value!r}"
                )
