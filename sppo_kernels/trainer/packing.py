"""Attention over packed prompts and responses: each prompt once, K responses that all see it.

Registered with transformers as the attention implementation "sppo_packed". Called with a
`PackedLayout` it attends within each response and to its prompt; called without one (generation,
padded batches) it is transformers' own sdpa. Exact: no mask approximates another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

NAME = "sppo_packed"
# Small neighbours are attended to in one masked call: fewer launches beat fewer flops there.
UNIT_TOKENS = 512


@dataclass
class Unit:
    """A stretch of queries start:stop over keys, which are `key_ranges` put together."""

    start: int
    stop: int
    key_ranges: list[tuple[int, int]]
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)


class PackedLayout:
    """Where prompts and responses lie in a packed row of tokens.

    Args:
        groups: for each prompt its length and the lengths of its responses, in order of tokens.
    """

    def __init__(self, groups: list[tuple[int, list[int]]]) -> None:
        self.groups = groups
        self.total = sum(p + sum(r) for p, r in groups)
        self._masks: dict = {}
        self._units: list[Unit] | None = None
        self._varlen: dict = {}

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(start, length, prompt start, prompt length) of every segment; prompts have length 0."""
        found, at = [], 0
        for prompt, responses in self.groups:
            begin = at
            found.append((at, prompt, at, 0))
            at += prompt
            for length in responses:
                if length:
                    found.append((at, length, begin, prompt))
                at += length
        return found

    def units(self) -> list[Unit]:
        """Stretches to attend to one by one."""
        if self._units is None:
            self._units = []
            at, run = 0, None
            for prompt, responses in self.groups:
                size = prompt + sum(responses)
                if size <= UNIT_TOKENS and run is not None and at + size - run <= UNIT_TOKENS:
                    self._units[-1].stop = at + size
                    self._units[-1].key_ranges = [(run, at + size)]
                elif size <= UNIT_TOKENS:
                    run = at
                    self._units.append(Unit(at, at + size, [(at, at + size)]))
                else:
                    run = None
                    inner = at + prompt
                    self._units.append(Unit(at, inner, [(at, inner)]))
                    for length in filter(None, responses):
                        keys = [(at, at + prompt), (inner, inner + length)]
                        self._units.append(Unit(inner, inner + length, keys))
                        inner += length
                at += size
        return self._units

    def mask(self, unit: Unit, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] True where a query of the unit may look."""
        key = (unit.start, unit.stop, window, device)
        if key not in self._masks:
            segment, prompt, position = self._tokens(device)
            queries = slice(unit.start, unit.stop)
            keys = torch.cat([torch.arange(a, b, device=device) for a, b in unit.key_ranges])
            same = segment[queries, None] == segment[keys]
            own_prompt = prompt[queries, None] == segment[keys]
            gap = position[queries, None] - position[keys]
            allowed = (same | own_prompt) & (gap >= 0)
            if window is not None:
                allowed &= gap < window
            self._masks[key] = allowed
        return self._masks[key]

    def _tokens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Segment number, segment number of the prompt, and position of every token."""
        key = ("tokens", device)
        if key not in self._masks:
            segment, prompt, position, count = [], [], [], 0
            for size, responses in self.groups:
                first = count
                for i, length in enumerate([size, *responses]):
                    segment += [count] * length
                    prompt += [first] * length
                    offset = size if i else 0
                    position += range(offset, offset + length)
                    count += 1
            self._masks[key] = tuple(
                torch.tensor(x, device=device) for x in (segment, prompt, position)
            )
        return self._masks[key]

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Key rows, query and key bounds, longest query and key, for variable-length kernels."""
        if device not in self._varlen:
            rows, queries, keys = [], [0], [0]
            for start, length, prompt, size in self.segments():
                rows += [*range(prompt, prompt + size), *range(start, start + length)]
                queries.append(queries[-1] + length)
                keys.append(keys[-1] + size + length)
            most_q = max(b - a for a, b in itertools.pairwise(queries))
            most_k = max(b - a for a, b in itertools.pairwise(keys))
            self._varlen[device] = (
                torch.tensor(rows).to(device, non_blocking=True),
                torch.tensor(queries, dtype=torch.int32).to(device, non_blocking=True),
                torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True),
                most_q,
                most_k,
            )
        return self._varlen[device]


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


def _varlen(q, k, v, layout: PackedLayout, scale, window) -> Tensor:
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
    sppo_layout: PackedLayout | None = None,
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


def inputs_for(layout: PackedLayout, device: torch.device) -> dict:
    """Model arguments of a packed batch beside its ids; a 4-D mask is passed on unread."""
    return {
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "sppo_layout": layout,
    }
