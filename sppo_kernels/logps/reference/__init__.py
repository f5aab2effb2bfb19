"""Eager PyTorch: the specification. Differentiable (twice, too), any device, float64-able."""

from sppo_kernels.logps.reference.logps import (
    linear_logits,
    linear_token_logps,
    segment_sum,
    token_logps,
)
from sppo_kernels.logps.reference.stats import logits_stats

__all__ = ["linear_logits", "linear_token_logps", "logits_stats", "segment_sum", "token_logps"]
