"""TRL: `SoftSPPOTrainer` and its config; TRL is imported when one of them is first used."""

from __future__ import annotations

from typing import Any

_LAZY = {
    "DataCollatorForSoftSPPO": "sppo_kernels.integrations.trl.collator",
    "SoftSPPOConfig": "sppo_kernels.integrations.trl.config",
    "SoftSPPOTrainer": "sppo_kernels.integrations.trl.trainer",
}

__all__ = ["DataCollatorForSoftSPPO", "SoftSPPOConfig", "SoftSPPOTrainer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
