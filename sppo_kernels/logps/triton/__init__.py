"""Triton kernels: plain functions on tensors, without autograd or argument checks.

They run on CUDA devices, and on CPU tensors when TRITON_INTERPRET=1. The registered operators on
top of them check their arguments and give them gradients.
"""

from sppo_kernels.logps.triton.row_logps import row_logps
from sppo_kernels.logps.triton.row_stats import row_stats
from sppo_kernels.logps.triton.row_stats_backward import row_stats_backward
from sppo_kernels.logps.triton.segments import segment_expand, segment_sum
from sppo_kernels.logps.triton.token_logps import token_logps
from sppo_kernels.logps.triton.token_logps_backward import token_logps_backward

__all__ = [
    "row_logps",
    "row_stats",
    "row_stats_backward",
    "segment_expand",
    "segment_sum",
    "token_logps",
    "token_logps_backward",
]
