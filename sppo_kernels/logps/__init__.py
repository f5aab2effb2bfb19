"""Labels and logits, or hidden states and a head, to log-probabilities."""

from sppo_kernels.logps.linear import (
    linear_sequence_logps,
    linear_token_logps,
    linear_token_stats,
)
from sppo_kernels.logps.token import sequence_logps, token_logps

__all__ = [
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
    "sequence_logps",
    "token_logps",
]
