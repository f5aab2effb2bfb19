"""The kernels of the operators declared in _stats_ops."""

from __future__ import annotations

import torch

from sppo_kernels.logps import streaming, streaming_stats
from sppo_kernels.logps.backends import load
from sppo_kernels.registry import kernel as _kernel


@_kernel
def linear_token_stats(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, entropy, squares, mean,
    top1, need_dx, need_dw, chunk_rows, retain_rows, impl,
):  # fmt: skip
    problem = streaming.prepare(
        load(impl), hidden, weight, bias, labels, rows, logit_scale, softcap,
        ignore_index, chunk_rows,
    )  # fmt: skip
    size = labels.shape[0]
    problem = streaming_stats.observed(problem, (entropy, squares, mean, top1), size)
    dx = hidden.new_empty((size, hidden.shape[1]) if need_dx else (0,))
    dz = hidden.new_empty((retain_rows, weight.shape[0]) if need_dw else (0,))
    logp = streaming.forward(problem, need_dx, need_dw, dx, dz, 0, problem.rows)
    norm, *found = problem.found
    placed = (
        streaming.place(problem, values, size) if asked else values
        for values, asked in zip(found, problem.wanted, strict=True)
    )
    return streaming.place(problem, logp, size), *placed, norm, dx, dz


@_kernel
def linear_token_stats_backward(
    grad_logp, grad_entropy, hidden, weight, bias, labels, rows, logit_scale, softcap,
    ignore_index, norm, need_dx, need_dw, need_db, chunk_rows, impl,
):  # fmt: skip
    problem = streaming.prepare(
        load(impl), hidden, weight, bias, labels, rows, logit_scale, softcap,
        ignore_index, chunk_rows,
    )  # fmt: skip

    def of_rows(grad):
        if grad is None:
            return hidden.new_zeros(problem.rows, dtype=torch.float32)
        return grad if problem.target is None else grad.index_select(0, problem.target)

    several = problem.rows > chunk_rows
    dh = hidden.new_empty(hidden.shape if need_dx else 0)
    dtype = torch.float32 if several else weight.dtype
    dw = weight.new_empty(weight.shape if need_dw else 0, dtype=dtype)
    db = weight.new_empty(weight.shape[0] if need_db else 0, dtype=torch.float32)
    if problem.rows == 0:
        dw.zero_(), db.zero_()
    streaming_stats.gradient(
        problem, norm, of_rows(grad_logp), of_rows(grad_entropy), dh if need_dx else None,
        dw if need_dw else None, db if need_db else None,
    )  # fmt: skip
    return dh, dw.to(weight.dtype), db.to(weight.dtype)
