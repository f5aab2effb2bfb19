"""Eager PyTorch: the specification. Differentiable (twice, too), any device, float64-able.

log p(y) = log_softmax(u)[y], u = softcap·tanh(v / softcap), v = scale·(hidden weightᵀ + bias),
in at least float32. It holds all logits: N·V elements a step, and several of them for a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sppo_kernels.logps.call import LinearCall


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


def linear_logits(call: LinearCall) -> Tensor:
    """The logits u of every label's row: [L, V]; ignored labels have the logits of hidden = 0."""
    ignored = call.labels == call.ignore_index
    x = call.hidden if call.rows is None else call.hidden.index_select(0, call.rows)
    logits = F.linear(x.masked_fill(ignored[:, None], 0.0), call.weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if call.bias is not None:
        logits = logits + call.bias
    logits = logits * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    return logits


def linear_token_logps(call: LinearCall, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """log p [L], and the four statistics [L] that are wanted; None for the others."""
    call = call._replace(labels=call.labels.to(call.hidden.device))
    logits, labels = linear_logits(call), (call.labels, call.ignore_index)
    return [token_logps(logits, *labels), *logits_stats(logits, *labels, *wanted)]


def logits_stats(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    entropy: bool,
    squares: bool,
    mean: bool,
    top1: bool,
) -> list[Tensor | None]:
    """Entropy, log Σ p², mean of logits [..., V] and whether the label is the first maximum.

    Only the entropy has a gradient. None for what is not asked for; 0 or False for ignored labels.
    """
    ignored = labels == ignore_index
    found: list[Tensor | None] = [None] * 4
    if not (entropy or squares or mean or top1):
        return found
    logits = logits.masked_fill(ignored[..., None], 0.0)
    logp = F.log_softmax(logits, dim=-1)
    if entropy:
        # p log p is 0 where p is 0; filled before the product, so that no gradient is NaN.
        terms = logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)
        found[0] = -terms.sum(-1)
    if squares:
        found[1] = torch.logsumexp(2 * logp.detach(), dim=-1)
    if mean:
        found[2] = logits.detach().mean(-1)
    if top1:
        found[3] = logits.detach().argmax(-1) == labels
    return [None if t is None else t.masked_fill(ignored, 0) for t in found]
