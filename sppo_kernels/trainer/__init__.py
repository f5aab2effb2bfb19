"""A thin trainer for SPPO on top of transformers.Trainer."""

from sppo_kernels.models.head import HeadProbeError
from sppo_kernels.trainer.config import SPPOConfig
from sppo_kernels.trainer.reference import ReferenceCacheError
from sppo_kernels.trainer.trainer import SPPOTrainer

__all__ = ["HeadProbeError", "ReferenceCacheError", "SPPOConfig", "SPPOTrainer"]
