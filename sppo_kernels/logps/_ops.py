"""Schemas and fakes of every log-prob operator under `torch.ops.sppo_kernels`.

Public functions (logps.py, loss.py) check and normalise their arguments, then call these. Shapes:
B, T batch and steps; N rows; L labels; S sequences; V vocabulary; D hidden size. Log-probs,
their gradients and norms are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.registry import define
from sppo_kernels.registry import fake as _fake

_LINEAR = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, "
    "float logit_scale, float? softcap, int ignore_index"
)

SCHEMAS = {
    # Compiled CPU kernels; see csrc/cpu/rows.cpp.
    "native_token_logps": "(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)",
    "native_token_logps_backward": (
        "(Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor norm, int ignore_index, "
        "Tensor(a!) out) -> ()"
    ),
    "native_row_logps": (
        "(Tensor(a!) z, Tensor labels, Tensor? bias, float logit_scale, float? softcap, "
        "int ignore_index, bool write_grad) -> (Tensor, Tensor)"
    ),
    "native_segment_sum": "(Tensor values, Tensor cu_seqlens) -> Tensor",
    "native_segment_expand": "(Tensor values, Tensor cu_seqlens, SymInt rows) -> Tensor",
    # Logits in: logits [B, T, V], labels [B, T] -> logp [B, T], norm [2, B, T]: the rows'
    # maxima m and sums of exp(z - m).
    "token_logps": (
        "(Tensor logits, Tensor labels, int ignore_index, bool inplace_backward, str impl) "
        "-> (Tensor logp, Tensor norm)"
    ),
    "token_logps_backward": (
        "(Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor norm, int ignore_index, "
        "str impl) -> Tensor"
    ),
    "token_logps_backward_": (
        "(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor logp, Tensor norm, "
        "int ignore_index, str impl) -> ()"
    ),
    # values [N], cu_seqlens [S+1] -> [S], and its transpose.
    "segment_sum": "(Tensor values, Tensor cu_seqlens, str impl) -> Tensor",
    "segment_expand": "(Tensor values, Tensor cu_seqlens, SymInt rows, str impl) -> Tensor",
    # -> loss [S] (scaled), logps [S], coef [B, T] = d loss / d logp of the row, logp [B, T], norm.
    "sppo_from_logits": (
        "(Tensor logits, Tensor labels, Tensor cu_seqlens, Tensor ref_logps, Tensor win_rate, "
        "Tensor scale, float eta, bool win_units, int ignore_index, bool inplace_backward, "
        "str impl) -> (Tensor loss, Tensor logps, Tensor coef, Tensor logp, Tensor norm)"
    ),
    # Hidden in: hidden [N, D], weight [V, D], labels [L], rows [L] into hidden.
    # -> logp [L], and what backward needs: dx [L, D], dz [retain, V], each before its coefficient.
    "linear_token_logps": (
        f"({_LINEAR}, bool need_dx, bool need_dw, SymInt chunk_rows, SymInt retain_rows, str impl) "
        "-> (Tensor logp, Tensor dx, Tensor dz)"
    ),
    "linear_token_logps_backward": (
        f"(Tensor grad, {_LINEAR}, Tensor dx, Tensor dz, bool need_dx, bool need_dw, "
        "bool need_db, SymInt chunk_rows, str impl) -> (Tensor dh, Tensor dw, Tensor db)"
    ),
    # The loss of whole sequences in groups of rows, gradients for an upstream gradient of 1.
    "linear_sppo_grouped": (
        f"({_LINEAR}, SymInt[] cu_seqlens, SymInt[] groups, Tensor ref_logps, Tensor win_rate, "
        "Tensor scale, float eta, bool win_units, bool need_dx, bool need_dw, bool need_db, "
        "SymInt chunk_rows, SymInt retain_rows, str impl) "
        "-> (Tensor loss, Tensor logps, Tensor dh, Tensor dw, Tensor db)"
    ),
}

for _name, _schema in SCHEMAS.items():
    define(_name, _schema)


def _float(like: Tensor, *shape) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


@_fake("native_token_logps")
def _(logits, labels, ignore_index):
    return _float(logits, *labels.shape), _float(logits, 2, *labels.shape)


@_fake("native_token_logps_backward")
def _(grad, logits, labels, logp, norm, ignore_index, out):
    return None


@_fake("native_row_logps")
def _(z, labels, bias, logit_scale, softcap, ignore_index, write_grad):
    return _float(z, labels.shape[0]), _float(z, labels.shape[0])


@_fake("native_segment_sum")
def _(values, cu_seqlens):
    return _float(values, cu_seqlens.shape[0] - 1)


@_fake("native_segment_expand")
def _(values, cu_seqlens, rows):
    return _float(values, rows)


@_fake("token_logps")
def _(logits, labels, ignore_index, inplace_backward, impl):
    return _float(logits, *labels.shape), _float(logits, 2, *labels.shape)


@_fake("token_logps_backward")
def _(grad, logits, labels, logp, norm, ignore_index, impl):
    return logits.new_empty(logits.shape)


@_fake("token_logps_backward_")
def _(grad, logits, labels, logp, norm, ignore_index, impl):
    return None


@_fake("segment_sum")
def _(values, cu_seqlens, impl):
    return _float(values, cu_seqlens.shape[0] - 1)


@_fake("segment_expand")
def _(values, cu_seqlens, rows, impl):
    return _float(values, rows)


@_fake("sppo_from_logits")
def _(logits, labels, cu, ref, win, scale, eta, win_units, ignore_index, inplace_backward, impl):
    rows = labels.shape
    return (
        _float(logits, ref.shape[0]),
        _float(logits, ref.shape[0]),
        _float(logits, *rows),
        _float(logits, *rows),
        _float(logits, 2, *rows),
    )


@_fake("linear_token_logps")
def _(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index,
    need_dx, need_dw, chunk_rows, retain_rows, impl,
):  # fmt: skip
    dx = hidden.new_empty((labels.shape[0], hidden.shape[1]) if need_dx else (0,))
    dz = hidden.new_empty((retain_rows, weight.shape[0]) if need_dw else (0,))
    return _float(hidden, labels.shape[0]), dx, dz


@_fake("linear_token_logps_backward")
def _(
    grad, hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, dx, dz,
    need_dx, need_dw, need_db, chunk_rows, impl,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,)),
        weight.new_empty((weight.shape[0],) if need_db else (0,)),
    )


@_fake("linear_sppo_grouped")
def _(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, cu_seqlens, groups,
    ref_logps, win_rate, scale, eta, win_units, need_dx, need_dw, need_db, chunk_rows,
    retain_rows, impl,
):  # fmt: skip
    sequences = ref_logps.shape[0]
    # float16 gradients stay in float32 until the upstream gradient (a loss scale) is known.
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return (
        _float(hidden, sequences),
        _float(hidden, sequences),
        hidden.new_empty(hidden.shape if need_dx else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_dw else (0,), dtype=dtype),
        weight.new_empty((weight.shape[0],) if need_db else (0,), dtype=dtype),
    )
