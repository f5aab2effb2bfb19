"""Schemas and fakes of the operators behind linear_token_stats.

As in _ops: N hidden rows, L labels, V vocabulary, D hidden size. An output that was not asked for
has no elements. `norm` [3, L] holds, for each label that counts, the maximum m of its logits u,
the sum of exp(u - m) and the mean of m - u under softmax(u).
"""

from __future__ import annotations

import torch

from sppo_kernels.logps._ops import _LINEAR, _float
from sppo_kernels.registry import define
from sppo_kernels.registry import fake as _fake

_HEAD = "Tensor? bias, float logit_scale, float? softcap, int ignore_index"
_WANTED = "bool entropy, bool squares, bool mean, bool top1"

SCHEMAS = {
    # Compiled CPU kernels; see csrc/cpu/stats.cpp.
    "native_row_stats": (
        f"(Tensor z, Tensor labels, {_HEAD}, {_WANTED}) "
        "-> (Tensor norm, Tensor entropy, Tensor squares, Tensor mean, Tensor top1)"
    ),
    "native_row_stats_backward": (
        f"(Tensor(a!) z, Tensor labels, {_HEAD}, Tensor norm, Tensor grad_logp, "
        "Tensor grad_entropy) -> ()"
    ),
    # -> what was wanted [L], and what backward needs: norm, and dx, dz as of linear_token_logps.
    "linear_token_stats": (
        f"({_LINEAR}, {_WANTED}, bool need_dx, bool need_dw, SymInt chunk_rows, "
        "SymInt retain_rows, str impl) -> (Tensor logp, Tensor entropy, Tensor squares, "
        "Tensor mean, Tensor top1, Tensor norm, Tensor dx, Tensor dz)"
    ),
    # The gradient by recomputation: wherever the entropy has one.
    "linear_token_stats_backward": (
        f"(Tensor? grad_logp, Tensor? grad_entropy, {_LINEAR}, Tensor norm, bool need_dx, "
        "bool need_dw, bool need_db, SymInt chunk_rows, str impl) "
        "-> (Tensor dh, Tensor dw, Tensor db)"
    ),
}

for _name, _schema in SCHEMAS.items():
    define(_name, _schema)


def _stats(like, size, entropy, squares, mean, top1):
    return (
        _float(like, size if entropy else 0),
        _float(like, size if squares else 0),
        _float(like, size if mean else 0),
        like.new_empty(size if top1 else 0, dtype=torch.bool),
    )


@_fake("native_row_stats")
def _(z, labels, bias, logit_scale, softcap, ignore_index, entropy, squares, mean, top1):
    size = labels.shape[0]
    found = _stats(z, size, entropy, squares, mean, top1)
    return _float(z, 3, size if entropy else 0), *found


@_fake("native_row_stats_backward")
def _(z, labels, bias, logit_scale, softcap, ignore_index, norm, grad_logp, grad_entropy):
    return None


@_fake("linear_token_stats")
def _(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, entropy, squares, mean,
    top1, need_dx, need_dw, chunk_rows, retain_rows, impl,
):  # fmt: skip
    size = labels.shape[0]
    return (
        _float(hidden, size),
        *_stats(hidden, size, entropy, squares, mean, top1),
        _float(hidden, 3, size if entropy else 0),
        hidden.new_empty((size, hidden.shape[1]) if need_dx else (0,)),
        hidden.new_empty((retain_rows, weight.shape[0]) if need_dw else (0,)),
    )


@_fake("linear_token_stats_backward")
def _(
    grad_logp, grad_entropy, hidden, weight, bias, labels, rows, logit_scale, softcap,
    ignore_index, norm, need_dx, need_dw, need_db, chunk_rows, impl,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,)),
        weight.new_empty((weight.shape[0],) if need_db else (0,)),
    )
