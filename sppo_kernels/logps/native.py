"""The compiled CPU kernels, under the names that every fused backend has."""

from __future__ import annotations

from torch import Tensor

import sppo_kernels._C  # noqa: F401  (registers the operators; fails where it is not built)
from sppo_kernels.logps import _stats_ops  # noqa: F401  (schemas of the statistics)
from sppo_kernels.registry import op

__all__ = [
    "row_logps",
    "row_stats",
    "row_stats_backward",
    "segment_expand",
    "segment_sum",
    "sppo_from_logits",
    "token_logps",
    "token_logps_backward",
]

token_logps = op("native_token_logps")
token_logps_backward = op("native_token_logps_backward")
row_logps = op("native_row_logps")
row_stats = op("native_row_stats")
row_stats_backward = op("native_row_stats_backward")
segment_sum = op("native_segment_sum")
segment_expand = op("native_segment_expand")


def sppo_from_logits(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    scale: Tensor,
    eta: float,
    win_units: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scaled loss [S], logps [S], [B, T] coefficient and log p of each row, and [2, B, T] norm."""
    logp, norm = token_logps(logits, labels, ignore_index)
    logps = segment_sum(logp.view(-1), cu_seqlens)
    unit = 1.0 / eta if win_units else 1.0
    target = (win_rate - 0.5) * (eta * unit)
    residual = (logps - ref_logps) * unit - target
    coef = segment_expand(2.0 * unit * scale * residual, cu_seqlens, logp.numel())
    coef = coef.view_as(labels).masked_fill_(labels == ignore_index, 0.0)
    return scale * residual.square(), logps, coef, logp, norm
