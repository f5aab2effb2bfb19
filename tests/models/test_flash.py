"""Packing through flash-attn's interface, against the exact attention in blocks.

flash-attn needs a GPU: its documented semantics (causal, aligned to the last key; a window of keys
to the left; fewer key than query heads) stand in for it here.
"""

import sys
import types

import pytest
import torch

from sppo_kernels.data.layout import PackedLayout
from sppo_kernels.models import attention as packing


def stand_in(
    q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    assert causal
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    out = torch.empty_like(q)
    for s in range(len(cu_q) - 1):
        x = q[cu_q[s] : cu_q[s + 1]].transpose(0, 1)
        repeat = q.shape[1] // k.shape[1]
        y, z = (
            t[cu_k[s] : cu_k[s + 1]].transpose(0, 1).repeat_interleave(repeat, 0) for t in (k, v)
        )
        rows = torch.arange(x.shape[1])[:, None] + y.shape[1] - x.shape[1]
        columns = torch.arange(y.shape[1])[None]
        seen = columns <= rows
        if window_size[0] >= 0:
            seen &= columns >= rows - window_size[0]
        scores = (x @ y.transpose(1, 2) * softmax_scale).masked_fill(~seen, float("-inf"))
        out[cu_q[s] : cu_q[s + 1]] = (scores.softmax(-1) @ z).transpose(0, 1)
    return out


@pytest.fixture
def flash(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    packing.flash_varlen.cache_clear()
    yield
    packing.flash_varlen.cache_clear()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_varlen_equals_blocks(flash, generator, window, kv_heads):
    layout = PackedLayout([(5, [3, 7, 1]), (2, [4]), (6, [2, 9])])
    q = torch.randn(1, 4, layout.total, 8, generator=generator)
    k, v = (torch.randn(1, kv_heads, layout.total, 8, generator=generator) for _ in range(2))
    expected, _ = packing.packed_attention(
        None, q, k, v, None, sliding_window=window, sppo_layout=layout
    )
    got = packing._varlen(q, k, v, layout, 8**-0.5, window)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_flash_attn_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    packing.flash_varlen.cache_clear()
    assert packing.flash_varlen() is None
    packing.flash_varlen.cache_clear()
