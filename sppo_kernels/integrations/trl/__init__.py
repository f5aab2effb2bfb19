"""sppo-kernels inside TRL: `patch()` for every trainer with its fused head, and SoftSPPOTrainer.

Importing this imports neither TRL nor transformers; using a name of it does.
"""

import importlib

_HOMES = {
    "DataCollatorForSoftSPPO": "collator",
    "HeadProbeError": "heads",
    "SoftSPPOConfig": "config",
    "SoftSPPOTrainer": "trainer",
    "UnsupportedTRLError": "versions",
    "patch": "patching",
    "patched": "patching",
    "unpatch": "patching",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
