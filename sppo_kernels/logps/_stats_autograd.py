"""Autograd formula of linear_token_stats: log-probs and entropy are differentiable, once."""

from __future__ import annotations

from sppo_kernels.logps import _stats_ops
from sppo_kernels.registry import formula as _formula
from sppo_kernels.registry import once as _once
from sppo_kernels.registry import op

assert _stats_ops  # imported for its registrations


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, rows = inputs[:5]
    ctx.head = inputs[5:8]
    ctx.entropy = inputs[8]
    need_dx, need_dw, ctx.chunk_rows, _, ctx.impl = inputs[12:]
    ctx.kept = need_dx or need_dw
    _, entropy, squares, mean, top1, norm, dx, dz = output
    fixed = (squares, mean, top1, norm, dx, dz)
    ctx.mark_non_differentiable(*fixed if ctx.entropy else (entropy, *fixed))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, rows, norm, dx, dz)


def _backward(ctx, grad_logp, grad_entropy, *_):
    none = (None,) * 14
    if grad_logp is None and grad_entropy is None:
        return None, None, None, *none
    hidden, weight, bias, labels, rows, norm, dx, dz = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[:3])
    inputs = (hidden, weight, bias, labels, rows, *ctx.head)
    if grad_entropy is None and ctx.kept:
        gradients = op("linear_token_logps_backward")(
            grad_logp, *inputs, dx, dz, *needed, ctx.chunk_rows, ctx.impl
        )
    else:
        gradients = op("linear_token_stats_backward")(
            grad_logp, grad_entropy, *inputs, norm, *needed, ctx.chunk_rows, ctx.impl
        )
    dh, dw, db = (g if need else None for g, need in zip(gradients, needed, strict=True))
    if db is not None:
        db = db.to(bias.dtype)
    return dh, dw, db, *none


_formula("linear_token_stats", _backward, _save)
_once("linear_token_stats_backward")
