"""Eager PyTorch: the specification. Differentiable (twice, too), any device, float64-able."""

from sppo_kernels.impl.reference.logps import linear_token_logps, segment_sum, token_logps

__all__ = ["linear_token_logps", "segment_sum", "token_logps"]
