"""Attention over packed prompts and responses: each prompt once, K responses that all see it.

Registered with transformers as the attention implementation "sppo_packed". Called with a
`PackedLayout` it attends within each response and to its prompt; called without one (generation,
padded batches) it is transformers' own sdpa. Exact: no mask approximates another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

NAME = "sppo_packed"


class Layout(Protocol):
    """What is needed of `sppo_kernels.data.layout.PackedLayout`."""

    total: int

    def units(self) -> list[Any]: ...

    def mask(self, unit: Any, window: int | None, device: torch.device) -> Tensor: ...

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]: ...


def _softcapped(q, k, v, mask, scale, softcap, dropout) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v


@cache
def flash_varlen() -> Callable | None:
    """flash-attn's variable-length attention when the package is installed and loads."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _varlen(q, k, v, layout: Layout, scale, window) -> Tensor:
    """One variable-length call: flash-attn's when installed, PyTorch's otherwise.

    Queries are the last of their keys, so causal masking is aligned to the end of both.
    """
    rows, queries, keys, most_q, most_k = layout.varlen(q.device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    left = -1 if window is None else window - 1
    tokens = (q.contiguous(), k.index_select(0, rows), v.index_select(0, rows))
    flash = flash_varlen()
    if flash is not None:
        out = flash(
            *tokens,
            *(queries, keys, most_q, most_k),
            softmax_scale=scale,
            causal=True,
            window_size=(left, -1 if window is None else 0),
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            *tokens,
            *(queries, keys, most_q, most_k),
            scale=scale,
            window_size=(left, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out.unsqueeze(0)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sppo_layout: Layout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of query [1, H, N, d] over key, value [1, Hk, N, d] by `sppo_layout`.

    Returns ([1, N, H, d], None), as transformers' attention functions do.
    """
    if sppo_layout is None:
        return _unpacked(
            module, query, key, value, attention_mask, scaling, dropout, softcap, kwargs
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not packed")
    if query.shape[2] != sppo_layout.total:
        raise ValueError(f"expected {sppo_layout.total} packed tokens, got {query.shape[2]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and softcap is None and not dropout:
        return _varlen(query, key, value, sppo_layout, scale, sliding_window), None
    units = sppo_layout.units()
    sizes = [u.stop - u.start for u in units]
    queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
    at = {u.start: i for i, u in enumerate(units)}
    out = []
    for i, unit in enumerate(units):
        k, v = keys[i], values[i]
        if len(unit.key_ranges) == 2:  # a long group: the prompt is a unit of its own
            p = at[unit.key_ranges[0][0]]
            k, v = torch.cat([keys[p], k], 2), torch.cat([values[p], v], 2)
        mask = sppo_layout.mask(unit, sliding_window, query.device)
        if softcap is not None:
            out.append(_softcapped(queries[i], k, v, mask, scale, softcap, dropout))
            continue
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                *(queries[i], k, v, mask),
                dropout_p=dropout,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _unpacked(module, query, key, value, mask, scaling, dropout, softcap, kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if mask is None:
        count, total = query.shape[2], key.shape[2]
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device)
        mask = mask.tril(total - count)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _softcapped(query, key, value, mask, scale, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "sppo_packed" known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def inputs_for(layout: Layout, device: torch.device) -> dict:
    """Model arguments of a packed batch beside its ids; a 4-D mask is passed on unread."""
    return {
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "sppo_layout": layout,
    }
