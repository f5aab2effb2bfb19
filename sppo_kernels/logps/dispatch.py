"""The kernels of the operators declared in _ops: each picks its backend by the argument `impl`."""

from __future__ import annotations

import itertools

import torch

from sppo_kernels.logps import (
    _ops,  # noqa: F401  (schemas)
    streaming,
)
from sppo_kernels.logps.backends import load
from sppo_kernels.registry import kernel as _kernel


@_kernel
def token_logps(logits, labels, ignore_index, inplace_backward, impl):
    return load(impl).token_logps(logits, labels, ignore_index)


@_kernel
def token_logps_backward(grad, logits, labels, logp, norm, ignore_index, impl):
    backend = load(impl)
    out = logits.new_empty(logits.shape)
    coef = grad.neg().contiguous()  # d log p / d z = onehot - softmax
    backend.token_logps_backward(coef, logits, labels, logp, norm, ignore_index, out)
    return out


@_kernel
def token_logps_backward_(grad, logits, labels, logp, norm, ignore_index, impl):
    coef = grad.neg().contiguous()
    load(impl).token_logps_backward(coef, logits, labels, logp, norm, ignore_index, logits)


@_kernel
def segment_sum(values, cu_seqlens, impl):
    return load(impl).segment_sum(values.contiguous(), cu_seqlens)


@_kernel
def segment_expand(values, cu_seqlens, rows, impl):
    return load(impl).segment_expand(values.contiguous(), cu_seqlens, rows)


@_kernel
def sppo_from_logits(
    logits, labels, cu_seqlens, ref_logps, win_rate, scale, eta, win_units, ignore_index,
    inplace_backward, impl,
):  # fmt: skip
    return load(impl).sppo_from_logits(
        logits, labels, cu_seqlens, ref_logps, win_rate, scale, eta, win_units, ignore_index
    )


@_kernel
def linear_token_logps(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index,
    need_dx, need_dw, chunk_rows, retain_rows, impl,
):  # fmt: skip
    backend = load(impl)
    problem = streaming.prepare(
        backend, hidden, weight, bias, labels, rows, logit_scale, softcap,
        ignore_index, chunk_rows,
    )  # fmt: skip
    size = labels.shape[0]
    dx = hidden.new_empty((size, hidden.shape[1]) if need_dx else (0,))
    dz = hidden.new_empty((retain_rows, weight.shape[0]) if need_dw else (0,))
    logp = streaming.forward(problem, need_dx, need_dw, dx, dz, 0, problem.rows)
    return streaming.place(problem, logp, size), dx, dz


@_kernel
def linear_token_logps_backward(
    grad, hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, dx, dz,
    need_dx, need_dw, need_db, chunk_rows, impl,
):  # fmt: skip
    backend = load(impl)
    problem = streaming.prepare(
        backend, hidden, weight, bias, labels, rows, logit_scale, softcap,
        ignore_index, chunk_rows,
    )  # fmt: skip
    coef = -grad if problem.target is None else -grad.index_select(0, problem.target)
    coef = coef.masked_fill(problem.labels == ignore_index, 0.0)
    dh = torch.empty_like(hidden) if need_dx else hidden.new_empty(0)
    dw, db = weight.new_empty(0), weight.new_empty(0)
    if need_dx:
        streaming.hidden_gradient(problem, coef, dx[: problem.rows], dh)
    if need_dw or need_db:
        several = streaming.weight_parts(problem, dz) != 1
        dtype = torch.float32 if several else weight.dtype
        dw = weight.new_empty(weight.shape if need_dw else (0,), dtype=dtype)
        db = weight.new_empty(weight.shape[0] if need_db else 0, dtype=torch.float32)
        if problem.rows == 0:
            dw.zero_(), db.zero_()
        streaming.weight_gradient(
            problem, coef, dz, dw if need_dw else None, db if need_db else None, 0, problem.rows
        )
    return dh, dw.to(weight.dtype), db.to(weight.dtype)


@_kernel
def linear_sppo_grouped(
    hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, cu_seqlens, groups,
    ref_logps, win_rate, scale, eta, win_units, need_dx, need_dw, need_db, chunk_rows,
    retain_rows, impl,
):  # fmt: skip
    backend = load(impl)
    problem = streaming.prepare(
        backend, hidden, weight, bias, labels, rows, logit_scale, softcap,
        ignore_index, chunk_rows,
    )  # fmt: skip
    unit = 1.0 / eta if win_units else 1.0
    target = (win_rate - 0.5) * (eta * unit)
    bounds, offsets = list(cu_seqlens), torch.tensor(cu_seqlens)
    if problem.target is not None:  # count the labels that were kept, on the host
        kept = (labels != ignore_index).long().cumsum(0)
        offsets = torch.cat([kept.new_zeros(1), kept])[offsets]
        bounds = offsets.tolist()
    device = hidden.device

    dx = hidden.new_empty((problem.rows, hidden.shape[1]) if need_dx else (0,))
    dz = hidden.new_empty((retain_rows, weight.shape[0]) if need_dw or need_db else (0,))
    dw = torch.zeros(weight.shape if need_dw else 0, dtype=torch.float32, device=device)
    db = torch.zeros(weight.shape[0] if need_db else 0, dtype=torch.float32, device=device)
    loss = torch.empty(len(bounds) - 1, dtype=torch.float32, device=device)
    logps, coef = torch.empty_like(loss), dz.new_empty(problem.rows, dtype=torch.float32)
    first_group = True
    for lo, hi in itertools.pairwise(groups):
        begin, end = bounds[lo], bounds[hi]
        logp = streaming.forward(problem, need_dx, need_dw or need_db, dx, dz, begin, end)
        local = (offsets[lo : hi + 1] - begin).to(device, non_blocking=True)
        logps[lo:hi] = backend.segment_sum(logp, local)
        residual = (logps[lo:hi] - ref_logps[lo:hi]) * unit - target[lo:hi]
        loss[lo:hi] = scale[lo:hi] * residual.square()
        of_sequence = -2.0 * unit * scale[lo:hi] * residual
        coef[begin:end] = backend.segment_expand(of_sequence, local, end - begin)
        coef[begin:end].masked_fill_(problem.labels[begin:end] == ignore_index, 0.0)
        if (need_dw or need_db) and end > begin:
            streaming.weight_gradient(
                problem, coef, dz, dw if need_dw else None, db if need_db else None,
                begin, end, first_group,
            )  # fmt: skip
            first_group = False
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    dh = hidden.new_empty(hidden.shape if need_dx else 0, dtype=dtype)
    if need_dx:
        streaming.hidden_gradient(problem, coef, dx, dh)
    return loss, logps, dh, dw.to(dtype), db.to(dtype)
