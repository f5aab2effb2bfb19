"""Log-probabilities to losses: SPPO's, and the objectives of pairs."""

from sppo_kernels.loss.modules import (
    FusedLinearSPPOLoss,
    FusedSPPOLoss,
    PairwiseLoss,
    SPPOLoss,
)
from sppo_kernels.loss.pairwise import pairwise_loss
from sppo_kernels.loss.sppo import fused_linear_sppo_loss, fused_sppo_loss, sppo_loss

__all__ = [
    "FusedLinearSPPOLoss",
    "FusedSPPOLoss",
    "PairwiseLoss",
    "SPPOLoss",
    "fused_linear_sppo_loss",
    "fused_sppo_loss",
    "pairwise_loss",
    "sppo_loss",
]
