"""The compiled CPU kernels, under the names that every fused backend has.

Equations, bytes and numerics: csrc/cpu/rows_impl.h (log-probs, their gradient) and
csrc/cpu/stats_impl.h (statistics, the entropy's gradient).
"""

from __future__ import annotations

import torch
from torch import Tensor

import sppo_kernels._C  # noqa: F401  (the kernels; fails where they are not built)
from sppo_kernels.registry import define, fake, op

# z [C, V] are raw products of the GEMM; u = softcap(logit_scale * (z + bias)).
_HEAD = "Tensor? bias, float logit_scale, float? softcap, int ignore_index"

define("native_token_logps", "(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)")
define(
    "native_token_logps_backward",
    "(Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor norm, int ignore_index, "
    "Tensor(a!) out) -> ()",
)
define(
    "native_row_logps", f"(Tensor(a!) z, Tensor labels, {_HEAD}, bool write_grad) -> Tensor logp"
)
define(
    "native_row_stats",
    f"(Tensor z, Tensor labels, {_HEAD}, bool entropy, bool squares, bool mean, bool top1) "
    "-> (Tensor norm, Tensor entropy, Tensor squares, Tensor mean, Tensor top1)",
)
define(
    "native_row_stats_backward",
    f"(Tensor(a!) z, Tensor labels, {_HEAD}, Tensor norm, Tensor grad_logp, "
    "Tensor grad_entropy) -> ()",
)
define("native_segment_sum", "(Tensor values, Tensor cu_seqlens) -> Tensor")
define("native_segment_expand", "(Tensor values, Tensor cu_seqlens, SymInt rows) -> Tensor")


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


@fake("native_token_logps")
def _(logits, labels, ignore_index):
    return _float(logits, *labels.shape), _float(logits, 2, *labels.shape)


@fake("native_token_logps_backward")
def _(grad, logits, labels, logp, norm, ignore_index, out):
    return None


@fake("native_row_logps")
def _(z, labels, bias, logit_scale, softcap, ignore_index, write_grad):
    return _float(z, labels.shape[0])


@fake("native_row_stats")
def _(z, labels, bias, logit_scale, softcap, ignore_index, entropy, squares, mean, top1):
    size = labels.shape[0]
    norm = _float(z, 3, size if entropy else 0)
    found = (_float(z, size if asked else 0) for asked in (entropy, squares, mean))
    return norm, *found, z.new_empty(size if top1 else 0, dtype=torch.bool)


@fake("native_row_stats_backward")
def _(z, labels, bias, logit_scale, softcap, ignore_index, norm, grad_logp, grad_entropy):
    return None


@fake("native_segment_sum")
def _(values, cu_seqlens):
    return _float(values, cu_seqlens.shape[0] - 1)


@fake("native_segment_expand")
def _(values, cu_seqlens, rows):
    return _float(values, rows)


token_logps = op("native_token_logps")
token_logps_backward = op("native_token_logps_backward")
row_logps = op("native_row_logps")
row_stats = op("native_row_stats")
row_stats_backward = op("native_row_stats_backward")
segment_sum = op("native_segment_sum")
segment_expand = op("native_segment_expand")
