"""Statistics of the distribution over tokens, as PyTorch says them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_stats(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    entropy: bool,
    squares: bool,
    mean: bool,
    top1: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Entropy, log Σ p², mean of logits [..., V] and whether the label is the first maximum.

    Only the entropy has a gradient. None for what is not asked for; 0 or False for ignored labels.
    """
    ignored = labels == ignore_index
    logits = logits.masked_fill(ignored[..., None], 0.0)
    logp = F.log_softmax(logits, dim=-1)
    found: list[Tensor | None] = [None] * 4
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
    return tuple(None if t is None else t.masked_fill(ignored, 0) for t in found)
