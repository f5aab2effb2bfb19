"""The SPPO loss in groups of whole sequences, whose gradients are finished one after another.

At the end of a group its residuals r (residual.py), hence its rows' coefficients for an upstream
gradient of 1, are known: 3U flops still, where the gradient of the logits of all rows does not fit
(docs/math.md, section 3). Gradients leave forward in float32, or in the weight's dtype if that is
wide enough, and backward multiplies them by the upstream gradient. Tests: test_linear.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.logps import streaming
from sppo_kernels.logps.call import LinearCall, chunk_rows, needs_gradient, row_bytes
from sppo_kernels.loss.residual import residual
from sppo_kernels.registry import define, fake, formula, kernel, op

DEFAULT_RETAIN_BYTES = 4 << 30

define(
    "linear_sppo_grouped",
    f"({LinearCall.schema()}, SymInt[] cu_seqlens, SymInt[] groups, Tensor ref_logps, "
    "Tensor win_rate, Tensor scale, float eta, float unit, bool need_dx, bool need_dw, "
    "bool need_db) -> (Tensor loss, Tensor logps, Tensor dh, Tensor dw, Tensor db)",
)


class Plan(NamedTuple):
    """A call whose chunk and retained rows are those of its groups."""

    call: LinearCall
    bounds: list[int]  # of the sequences, among the labels
    groups: list[int]  # bounds of the groups, among the sequences


def plan_groups(
    call: LinearCall, shape: torch.Size, cu_seqlens: Tensor | None, memory_budget: int | None
) -> Plan | None:
    """Groups for labels of this shape, or None where all fits, or bounds are not on the host."""
    if call.impl == "reference" or not any(needs_gradient(call)[1:]):
        return None
    budget = checks.budget(memory_budget)
    if budget is None:
        budget = max(DEFAULT_RETAIN_BYTES, 8 * call.weight.numel())
    if call.labels.shape[0] * row_bytes(call) <= budget:
        return None
    if cu_seqlens is None:
        bounds = [i * shape[1] for i in range(shape[0] + 1)]
    elif cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
    else:
        return None
    most = max(1, budget // row_bytes(call))
    groups = [0]
    for s in range(1, len(bounds) - 1):
        if bounds[s + 1] - bounds[groups[-1]] > most:
            groups.append(s)
    groups.append(len(bounds) - 1)
    chunk = chunk_rows(call, budget)
    retain = max(bounds[b] - bounds[a] for a, b in itertools.pairwise(groups))
    if retain > most:  # a sequence over the budget: keep whole chunks of it, and one to work in
        retain = max(0, (most - chunk) // chunk * chunk)
    return Plan(call._replace(chunk_rows=chunk, retain_rows=retain), bounds, groups)


def grouped_loss(
    plan: Plan, ref_logps: Tensor, win_rate: Tensor, scale: Tensor, eta: float, unit: float
) -> tuple[Tensor, Tensor]:
    """Scaled losses [S] and log-probs [S]; backward takes them as terms of one sum."""
    call, bounds, groups = plan
    needed = needs_gradient(call)
    return op("linear_sppo_grouped")(
        *call, bounds, groups, ref_logps, win_rate, scale, eta, unit, *needed
    )[:2]


def _saved_dtype(call: LinearCall) -> torch.dtype:
    """float16 gradients stay in float32 until the upstream gradient (a loss scale) is known."""
    return torch.float32 if call.weight.dtype == torch.float16 else call.weight.dtype


@fake("linear_sppo_grouped")
def _(*args):
    call, (_, _, ref_logps, _, _, _, _, need_dx, need_dw, need_db) = LinearCall.taken(args)
    hidden, weight, dtype = call.hidden, call.weight, _saved_dtype(call)
    return (
        hidden.new_empty(ref_logps.shape[0], dtype=torch.float32),
        hidden.new_empty(ref_logps.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_dx else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_dw else (0,), dtype=dtype),
        weight.new_empty((weight.shape[0],) if need_db else (0,), dtype=dtype),
    )


@kernel("linear_sppo_grouped")
def _(*args):
    call, (bounds, groups, ref_logps, win_rate, scale, eta, unit, need_dx, *need_head) = (
        LinearCall.taken(args)
    )
    problem = streaming.prepare(call)
    hidden, kernels = call.hidden, problem.kernels
    offsets = torch.tensor(bounds)
    if problem.target is not None:  # count the labels that were kept, on the host
        kept = (call.labels != call.ignore_index).long().cumsum(0)
        offsets = torch.cat([kept.new_zeros(1), kept])[offsets]
        bounds = offsets.tolist()
    dx = hidden.new_empty(problem.rows, hidden.shape[1]) if need_dx else None
    dz = hidden.new_empty(call.retain_rows, call.weight.shape[0])
    head = streaming.HeadGradient(problem, *need_head, several=True)
    loss, logps = torch.empty_like(ref_logps), torch.empty_like(ref_logps)
    coef = hidden.new_empty(problem.rows, dtype=torch.float32)
    for lo, hi in itertools.pairwise(groups):
        begin, end = bounds[lo], bounds[hi]
        logp = streaming.forward(problem, dx, dz, begin, end)
        local = (offsets[lo : hi + 1] - begin).to(hidden.device, non_blocking=True)
        logps[lo:hi] = kernels.segment_sum(logp, local)
        r = residual(logps[lo:hi], ref_logps[lo:hi], win_rate[lo:hi], eta) * unit
        loss[lo:hi] = scale[lo:hi] * r.square()
        of_sequence = -2.0 * unit * scale[lo:hi] * r
        coef[begin:end] = kernels.segment_expand(of_sequence, local, end - begin)
        coef[begin:end].masked_fill_(problem.labels[begin:end] == call.ignore_index, 0.0)
        head.add(coef, dz, begin, end)
    dtype = _saved_dtype(call)
    dh = hidden.new_empty(hidden.shape if need_dx else 0, dtype=dtype)
    if need_dx:
        streaming.hidden_gradient(problem, coef, dx, dh)
    return loss, logps, dh, *head.finished(dtype)


def _save(ctx, inputs, output) -> None:
    ctx.dtypes = tuple(None if t is None else t.dtype for t in inputs[:3])
    ctx.extra = len(inputs) - 3
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx, grad, *_):
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


formula("linear_sppo_grouped", _backward, _save)
