"""Axolotl: a plugin and a trainer class for `rl: dpo`.

    plugins: [sppo_kernels.integrations.axolotl.SPPOPlugin]
    sppo_kernels: {eta: 1000}

trains with our trainer; `sppo_kernels: {loss: trl}` keeps TRL's loss and replaces its fused head.
`trainer_cls: sppo_kernels.integrations.axolotl.AxolotlSPPOTrainer` alone is the former with η =
1/rl_beta.

Follows axolotl 0.19.0: axolotl/integrations/base.py, core/builders/rl.py, cli/config.py. Its RL
builder passes no model to a class from `get_trainer_cls`, so the plugin sets `trainer_cls`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from sppo_kernels.integrations._swap import (
    Hook,
    Installed,
    IntegrationError,
    resolve,
    version_of,
)

TESTED = "axolotl 0.19.0"
TRAINER = "sppo_kernels.integrations.axolotl.AxolotlSPPOTrainer"

_PLUGIN = "axolotl.integrations.base:BasePlugin"
_HOOKS = (
    Hook(_PLUGIN, "register", "self, cfg"),
    Hook(_PLUGIN, "get_input_args", "self"),
    Hook(_PLUGIN, "pre_model_load", "self, cfg"),
    Hook(_PLUGIN, "post_trainer_create", "self, cfg, trainer"),
    Hook(_PLUGIN, "post_train_unload", "self, cfg"),
)
_axolotl = Installed("axolotl", TESTED)  # for the check: nothing of axolotl is replaced
for _hook in _HOOKS:
    _axolotl.find(_hook)
_base = resolve("axolotl.integrations.base", TESTED)

from pydantic import BaseModel, ConfigDict, Field  # noqa: E402

__all__ = ["SPPOArgs", "SPPOOptions", "SPPOPlugin"]


class SPPOOptions(BaseModel):
    """What `sppo_kernels:` may hold in the YAML; names and meaning are those of `SPPOConfig`."""

    model_config = ConfigDict(extra="forbid")

    loss: Literal["sppo", "trl"] = "sppo"
    eta: float | None = Field(default=None, gt=0)
    loss_units: Literal["win_rate", "log_ratio"] | None = None
    pairs: Literal["all", "best_worst"] | None = None
    packing: Literal["auto", "shared", "padded"] | None = None
    head: Literal["auto", "fused", "logits"] | None = None
    overlong: Literal["refuse", "drop", "truncate"] | None = None
    memory_budget: int | None = Field(default=None, gt=0)
    reference_cache: str | None = None
    impl: str | None = None


class SPPOArgs(BaseModel):
    """The plugin's part of axolotl's configuration schema."""

    sppo_kernels: SPPOOptions | None = None


def options_of(cfg: Any) -> SPPOOptions:
    """The options in an axolotl configuration (raw or validated), checked."""
    raw = (cfg.get("sppo_kernels") if cfg is not None else None) or {}
    if isinstance(raw, SPPOOptions):
        return raw
    if isinstance(raw, BaseModel):
        raw = raw.model_dump(exclude_none=True)
    return SPPOOptions(**{k: v for k, v in dict(raw).items() if v is not None})


class SPPOPlugin(_base.BasePlugin):
    """Axolotl plugin: SPPO in the place of the DPO trainer, or our head under TRL's."""

    def __init__(self) -> None:
        super().__init__()
        self.set_trainer = False
        self.patched_trl = False

    def get_input_args(self) -> str:
        """Where axolotl finds the pydantic class of our options."""
        return "sppo_kernels.integrations.axolotl.SPPOArgs"

    def register(self, cfg: Any) -> None:
        """Check the options and name our trainer in `trainer_cls`.

        Raises:
            ValueError: an option is unknown or wrong (pydantic names it), `rl` is not dpo, or
                `trainer_cls` names another class.
        """
        options = options_of(cfg)
        rl = getattr(cfg.get("rl"), "value", cfg.get("rl"))
        if options.loss == "trl":
            return
        if rl != "dpo":
            raise ValueError(f"rl: expected dpo with sppo_kernels' plugin, got {rl!r}")
        given = cfg.get("trainer_cls")
        if given not in (None, TRAINER):
            raise ValueError(f"trainer_cls: expected none or {TRAINER}, got {given!r}")
        self.set_trainer = given is None
        cfg["trainer_cls"] = TRAINER

    def on_config_validation_error(self, cfg: Any) -> None:
        """Take back what `register` set."""
        if self.set_trainer:
            cfg["trainer_cls"] = None
            self.set_trainer = False

    def pre_model_load(self, cfg: Any) -> None:
        """With `loss: trl`, replace TRL's fused head.

        Raises:
            IntegrationError: the installed TRL has no fused head in the trainer of this `rl`
                (before 1.13 only AsyncGRPO has one), so that nothing would be replaced.
        """
        if options_of(cfg).loss != "trl" or self.patched_trl:
            return
        from sppo_kernels.integrations import trl

        rl = str(getattr(cfg.get("rl"), "value", cfg.get("rl")))
        trainer = {"ipo": "DPO"}.get(rl, rl.upper())
        layout = trl.patch()
        if trainer not in re.findall(r"\w+", layout.trainers):
            trl.unpatch()
            raise IntegrationError(
                f"trl {version_of('trl')}: expected a fused head in its {trainer} trainer (rl: "
                f"{rl}), found it in {layout.trainers} only; use loss: sppo, or a later TRL"
            )
        self.patched_trl = True

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make sure that axolotl built the trainer that was asked for.

        Raises:
            IntegrationError: it built another.
        """
        if options_of(cfg).loss == "sppo" and not isinstance(
            trainer, __getattr__("AxolotlSPPOTrainer")
        ):
            raise IntegrationError(
                f"trainer: expected AxolotlSPPOTrainer, axolotl built {type(trainer).__name__}"
            )

    def post_train_unload(self, cfg: Any) -> None:
        """Give TRL its own head back."""
        if self.patched_trl:
            from sppo_kernels.integrations import trl

            trl.unpatch()
            self.patched_trl = False


def __getattr__(name: str) -> Any:
    if name == "AxolotlSPPOTrainer":  # brings transformers' Trainer, which the plugin does without
        from sppo_kernels.integrations._axolotl_trainer import AxolotlSPPOTrainer

        return AxolotlSPPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
