"""Fused kernels, preference games and a thin trainer for Self-Play Preference Optimization."""

from sppo_kernels.linear_logps import linear_sequence_logps, linear_token_logps
from sppo_kernels.logps import sequence_logps, token_logps
from sppo_kernels.loss import fused_linear_sppo_loss, fused_sppo_loss, sppo_loss
from sppo_kernels.nn import FusedLinearSPPOLoss, FusedSPPOLoss, SPPOLoss
from sppo_kernels.types import SPPOOutput

__version__ = "0.1.0"

__all__ = [
    "FusedLinearSPPOLoss",
    "FusedSPPOLoss",
    "SPPOLoss",
    "SPPOOutput",
    "fused_linear_sppo_loss",
    "fused_sppo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "sppo_loss",
    "token_logps",
]
