"""Autograd formulas of the operators in _ops. None of them synchronises with the host."""

from __future__ import annotations

import torch

from sppo_kernels.logps import _ops  # noqa: F401  (schemas)
from sppo_kernels.registry import formula as _formula
from sppo_kernels.registry import once as _once
from sppo_kernels.registry import op

# --- logits in ------------------------------------------------------------------------------------


def _save_token_logps(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index, ctx.inplace, ctx.impl = inputs
    logp, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logp, norm)


def _logits_gradient(ctx, coef, logits, labels, logp, norm):
    args = (labels, logp, norm, ctx.ignore_index, ctx.impl)
    if not ctx.inplace:
        return op("token_logps_backward")(coef, logits, *args)
    if torch.is_grad_enabled():
        raise RuntimeError("inplace_backward: cannot be combined with create_graph=True")
    logits = logits.detach()
    torch.autograd.graph.increment_version(logits)  # so that other readers of it fail loudly
    op("token_logps_backward_")(coef, logits, *args)
    return logits


def _token_logps_backward(ctx, grad, _norm):
    if grad is None:
        return None, None, None, None, None
    return _logits_gradient(ctx, grad, *ctx.saved_tensors), None, None, None, None


_formula("token_logps", _token_logps_backward, _save_token_logps)
_once("token_logps_backward")


def _save_segment_sum(ctx, inputs, output) -> None:
    values, cu_seqlens, ctx.impl = inputs
    ctx.rows = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _segment_sum_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return op("segment_expand")(grad, cu_seqlens, ctx.rows, ctx.impl), None, None


def _save_segment_expand(ctx, inputs, output) -> None:
    _, cu_seqlens, _, ctx.impl = inputs
    ctx.save_for_backward(cu_seqlens)


def _segment_expand_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return op("segment_sum")(grad, cu_seqlens, ctx.impl), None, None, None


_formula("segment_sum", _segment_sum_backward, _save_segment_sum)
_formula("segment_expand", _segment_expand_backward, _save_segment_expand)


def _save_sppo_from_logits(ctx, inputs, output) -> None:
    logits, labels, cu_seqlens = inputs[:3]
    ctx.ignore_index, ctx.inplace, ctx.impl = inputs[8:]
    _, logps, coef, logp, norm = output
    ctx.mark_non_differentiable(logps, coef, logp, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, cu_seqlens, coef, logp, norm)


def _sppo_from_logits_backward(ctx, grad, *_):
    none = (None,) * 10
    if grad is None:
        return None, *none
    logits, labels, cu_seqlens, coef, logp, norm = ctx.saved_tensors
    rows = op("segment_expand")(grad, cu_seqlens, coef.numel(), ctx.impl).view_as(coef)
    return _logits_gradient(ctx, coef * rows, logits, labels, logp, norm), *none


_formula("sppo_from_logits", _sppo_from_logits_backward, _save_sppo_from_logits)


# --- hidden in ------------------------------------------------------------------------------------


def _save_linear(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, rows = inputs[:5]
    ctx.logit_scale, ctx.softcap, ctx.ignore_index = inputs[5:8]
    ctx.need_dx, _, ctx.chunk_rows, _, ctx.impl = inputs[8:]
    _, dx, dz = output
    ctx.mark_non_differentiable(dx, dz)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, rows, dx, dz)


def _linear_backward(ctx, grad, *_):
    none = (None,) * 8
    if grad is None:
        return None, None, None, None, None, *none
    hidden, weight, bias, labels, rows, dx, dz = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dh, dw, db = op("linear_token_logps_backward")(
        grad, hidden, weight, bias, labels, rows, ctx.logit_scale, ctx.softcap,
        ctx.ignore_index, dx, dz, need_dx, need_dw, need_db, ctx.chunk_rows, ctx.impl,
    )  # fmt: skip
    if need_db:
        db = db.to(bias.dtype)
    return (
        dh if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
        None,
        None,
        *none,
    )


_formula("linear_token_logps", _linear_backward, _save_linear)
_once("linear_token_logps_backward")


def _save_grouped(ctx, inputs, output) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.extra = len(inputs) - 3
    _, logps, dh, dw, db = output
    ctx.mark_non_differentiable(logps, dh, dw, db)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dh, dw, db)


def _grouped_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * (3 + ctx.extra)
    # The public loss is the sum of the scaled losses, so their upstream gradients are one number.
    upstream = grad[0]
    gradients = (
        (saved * upstream).to(dtype) if needed else None
        for saved, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
        )
    )
    return *gradients, *(None,) * ctx.extra


_formula("linear_sppo_grouped", _grouped_backward, _save_grouped)
