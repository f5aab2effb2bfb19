"""Log-probs of labels and their sums over sequences, as PyTorch says them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """log softmax(logits [..., V])[labels [...]] -> [...]; 0 where labels == ignore_index."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = labels == ignore_index
    # Filled before the softmax, so that NaN in an ignored row reaches no gradient.
    logps = F.log_softmax(logits.masked_fill(ignored[..., None], 0.0), dim=-1)
    index = labels.masked_fill(ignored, 0).long()
    return logps.gather(-1, index[..., None]).squeeze(-1).masked_fill(ignored, 0.0)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of values [N] between consecutive cu_seqlens [S+1] -> [S]; 0 for an empty segment."""
    if cu_seqlens.shape[0] == 1:
        return values.new_zeros(0)
    ids = torch.arange(values.shape[0], device=values.device)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), ids, right=True)
    return values.new_zeros(cu_seqlens.shape[0] - 1).index_add(0, ids, values)


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """softcap(logit_scale * (hidden[rows] weightᵀ + bias)): [L, V]; ignored labels have row 0."""
    ignored = labels == ignore_index
    x = hidden if rows is None else hidden.index_select(0, rows)
    logits = F.linear(x.masked_fill(ignored[:, None], 0.0), weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """token_logps of linear_logits: [L]."""
    logits = linear_logits(hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index)
    return token_logps(logits, labels, ignore_index)
