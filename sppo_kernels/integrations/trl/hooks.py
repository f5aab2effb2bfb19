"""Which TRL this is, and whether it has what SoftSPPOTrainer hooks into."""

from __future__ import annotations

from typing import Any

from sppo_kernels.integrations._swap import IntegrationError, parameters_of, resolve, version_of
from sppo_kernels.integrations.trl.versions import UnsupportedTRLError
from sppo_kernels.optional import require

__all__ = ["UnsupportedTRLError", "check_version", "load", "missing_hooks"]

TESTED = ("1.16",)  # minor versions whose every patch release is taken as tested

# method -> its parameters in order, of those that are overridden or called
METHODS = {
    "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("self", "dataset", "name", "batch_size"),
    "_set_signature_columns_if_needed": ("self",),
    "compute_ref_log_probs": ("self", "model", "inputs"),
    "_compute_loss": ("self", "model", "inputs", "return_outputs"),
    "log": ("self", "logs", "start_time"),
}
# attributes that its __init__ sets and the overriding methods read
ATTRIBUTES = (
    "aux_loss_enabled", "loss_weights", "precompute_ref_logps", "ref_model", "router_aux_loss_coef",
    "_metrics", "_precompute_model_hash", "_total_train_tokens",
)  # fmt: skip
FIELDS = (
    "beta", "f_divergence_type", "label_smoothing", "ld_alpha", "loss_type", "loss_weights",
    "max_length", "pad_to_multiple_of", "precompute_ref_log_probs", "truncation_mode",
    "use_weighting",
)  # fmt: skip
COLLATOR = ("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of")
WANTED = (
    "trl.trainer.dpo_trainer:DPOTrainer",
    "trl.trainer.dpo_config:DPOConfig",
    "trl.trainer.dpo_trainer:DataCollatorForPreference",
    "trl.trainer.utils:use_adapter",
    "trl.models.utils:disable_gradient_checkpointing",
)


def missing_hooks(trainer: type, config: type, collator: type) -> list[str]:
    """What DPOTrainer, DPOConfig and DataCollatorForPreference lack, in words."""
    found = []
    for name, expected in METHODS.items():
        got = parameters_of(trainer, name)
        if got is None:
            found.append(f"DPOTrainer.{name} is not there")
        elif got != expected:
            found.append(f"DPOTrainer.{name}{got} (expected {expected})")
    names = trainer.__init__.__code__.co_names
    found += [f"DPOTrainer sets no {name}" for name in ATTRIBUTES if name not in names]
    for cls, wanted, fields in (
        ("DPOConfig", FIELDS, config.__dataclass_fields__),
        ("DataCollatorForPreference", COLLATOR, getattr(collator, "__dataclass_fields__", {})),
    ):
        found += [f"{cls} has no {name}" for name in wanted if name not in fields]
    return found


def check_version(version: str, trainer: type, config: type, collator: type) -> None:
    """Pass tested versions, and others whose hooks are all there.

    Raises:
        UnsupportedTRLError: names the version and each hook it lacks.
    """
    if ".".join(version.split(".")[:2]) in TESTED:
        return
    lacking = missing_hooks(trainer, config, collator)
    if lacking:
        raise UnsupportedTRLError(
            f"SoftSPPOTrainer is tested with TRL {', '.join(TESTED)}; TRL {version} lacks what it "
            f"hooks into: {'; '.join(lacking)}"
        )


def load() -> dict[str, Any]:
    """TRL's classes and helpers by name, checked.

    Raises:
        ImportError: TRL, or a package that it needs, is not installed.
        UnsupportedTRLError: it is a version without the hooks.
    """
    require("trl", "trl")
    try:
        found = {p.partition(":")[2]: resolve(p, f"TRL {', '.join(TESTED)}") for p in WANTED}
    except IntegrationError as error:
        raise UnsupportedTRLError(f"SoftSPPOTrainer: {error}") from error
    names = ("DPOTrainer", "DPOConfig", "DataCollatorForPreference")
    check_version(version_of("trl"), *(found[name] for name in names))
    return found
