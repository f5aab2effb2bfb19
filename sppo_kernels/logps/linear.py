"""Log-probabilities from hidden states, without ever holding the logits of all rows.

log p(y_i) with z = hidden weightᵀ and u = softcap(logit_scale (z + bias)): docs/math.md, sections 3
to 6. With U = 2 N D V flops and chunks of C rows (`CHUNK_ROWS`):

    flops    U without a gradient, 2U for hidden alone, 3U with the weight; 4U for rows over
             `memory_budget`; another 2U where a gradient of the entropy arrives
    bytes    C V elements of logits; N D of dX; N V of dz where the weight needs a gradient
    driver   streaming.py, whose GEMMs are torch.mm, around one row kernel a backend:
             triton/row_logps.py and triton/row_stats.py, csrc/cpu/rows_impl.h and stats_impl.h
    tests    tests/logps/test_linear.py, test_stats.py, test_properties.py; Triton in
             test_triton_public.py, test_triton_row.py; in PyTorch: test_framework.py

The specification is reference.py. One operator serves all three functions: an output that is not
asked for has no elements and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.logps import reference, streaming
from sppo_kernels.logps.call import CHUNK_ROWS, LinearCall, checked, needs_gradient
from sppo_kernels.logps.segments import sequence_offsets, sum_sequences
from sppo_kernels.registry import define, fake, formula, kernel, once, op
from sppo_kernels.results import TokenStats

__all__ = [
    "CHUNK_ROWS",
    "TOKEN_STATS",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
]

TOKEN_STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# -> log p and what was wanted [L], and what backward needs: norm [3, L] with the entropy (the
# maximum m of a row's logits u, the sum of exp(u - m), the mean of m - u under softmax(u)); dx
# [L, D] and dz [retain_rows, V], gradients of -log p before their coefficients.
define(
    "linear_token_logps",
    f"({LinearCall.schema()}, bool entropy, bool squares, bool mean, bool top1, bool need_dx) "
    "-> (Tensor logp, Tensor entropy, Tensor squares, Tensor mean, Tensor top1, Tensor norm, "
    "Tensor dx, Tensor dz)",
)
define(
    "linear_token_logps_backward",
    f"(Tensor? grad_logp, Tensor? grad_entropy, {LinearCall.schema()}, Tensor norm, Tensor dx, "
    "Tensor dz, bool need_dx, bool need_dw, bool need_db) -> (Tensor dh, Tensor dw, Tensor db)",
)


@fake("linear_token_logps")
def _outputs(*args):
    """Memory for what the operator returns."""
    call, (entropy, squares, mean, top1, need_dx) = LinearCall.taken(args)
    hidden, size = call.hidden, call.labels.shape[0]

    def of_labels(asked, *shape, dtype=torch.float32):
        return hidden.new_empty((*shape, size if asked else 0), dtype=dtype)

    return (
        of_labels(True),
        of_labels(entropy),
        of_labels(squares),
        of_labels(mean),
        of_labels(top1, dtype=torch.bool),
        of_labels(entropy, 3),
        hidden.new_empty((size, hidden.shape[1]) if need_dx else (0,)),
        hidden.new_empty(call.retain_rows, call.weight.shape[0]),
    )


@kernel("linear_token_logps")
def _(*args):
    call, (*wanted, need_dx) = LinearCall.taken(args)
    problem = streaming.prepare(call)
    _, *found, norm, dx, dz = _outputs(*args)
    read = None
    if any(wanted):
        read = streaming.statistics(problem, tuple(wanted), (norm, *found))
    logp = streaming.forward(problem, dx if need_dx else None, dz, 0, problem.rows, read)
    return problem.placed(logp), *found, norm, dx, dz


@fake("linear_token_logps_backward")
def _(grad_logp, grad_entropy, *args):
    call, (_, _, _, need_dx, need_dw, need_db) = LinearCall.taken(args)
    return (
        call.hidden.new_empty(call.hidden.shape if need_dx else (0,)),
        call.weight.new_empty(call.weight.shape if need_dw else (0,)),
        call.weight.new_empty((call.weight.shape[0],) if need_db else (0,)),
    )


@kernel("linear_token_logps_backward")
def _(grad_logp, grad_entropy, *args):
    call, (norm, dx, dz, need_dx, *need_head) = LinearCall.taken(args)
    problem = streaming.prepare(call)
    dh = call.hidden.new_empty(call.hidden.shape if need_dx else 0)
    if grad_entropy is None and (not need_dx or dx.dim() == 2):
        coef = problem.upstream(-grad_logp)
        parts = streaming.weight_parts(problem, dz)
        head = streaming.HeadGradient(problem, *need_head, several=parts != 1)
        if need_dx:
            streaming.hidden_gradient(problem, coef, dx[: problem.rows], dh)
        head.add(coef, dz, 0, problem.rows)
    else:
        head = streaming.HeadGradient(problem, *need_head, several=problem.rows > call.chunk_rows)
        gradients = problem.upstream(grad_logp), problem.upstream(grad_entropy)
        norm = problem.of_rows(norm)
        streaming.recomputed(problem, norm, *gradients, dh if need_dx else None, head)
    return dh, *head.finished(call.weight.dtype)


def _save(ctx, inputs, output) -> None:
    call, (entropy, *_) = LinearCall.taken(inputs)
    _, *fixed = output if not entropy else (output[0], *output[2:])
    ctx.mark_non_differentiable(*fixed)
    ctx.set_materialize_grads(False)
    call.save(ctx, *output[5:])


def _backward(ctx, grad_logp, grad_entropy, *_):
    call, saved = LinearCall.saved(ctx)
    none = (None,) * (len(call) + 5 - 3)
    if grad_logp is None and grad_entropy is None:
        return None, None, None, *none
    needed = tuple(ctx.needs_input_grad[:3])
    found = op("linear_token_logps_backward")(grad_logp, grad_entropy, *call, *saved, *needed)
    dh, dw, db = (g if need else None for g, need in zip(found, needed, strict=True))
    return dh, dw, None if db is None else db.to(call.bias.dtype), *none


formula("linear_token_logps", _backward, _save)
once("linear_token_logps_backward")


def _observed(
    call: LinearCall, wanted: tuple[bool, ...], entropy_grad: bool = False
) -> list[Tensor | None]:
    """log p [L] and the four statistics [L] that are wanted."""
    if call.impl == "reference":
        return reference.linear_token_logps(call, wanted)
    need_dx = needs_gradient(call)[0]
    if entropy_grad and wanted[0]:  # backward computes the logits anew: nothing is worth keeping
        call, need_dx = call._replace(retain_rows=0), False
    return op("linear_token_logps")(*call, *wanted, need_dx)[:5]


def logps_of(call: LinearCall) -> Tensor:
    """log p [L] of a checked call."""
    return _observed(call, (False,) * len(TOKEN_STATS))[0]


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under logits computed from hidden states.

    The logits are softcap·tanh(u / softcap) (or u itself) with
    u = logit_scale · (hidden[rows] weightᵀ + bias).

    Args:
        hidden: [..., D], bfloat16, float16, float32 (or float64: reference).
        weight: [V, D], the head, of the dtype of `hidden`; under torch.autocast both are cast.
        labels: [...], int64 or int32: the token each row predicts. Ignored labels cost nothing on
            the CPU, and on a GPU when `labels` (and `rows`) are given on the CPU; GPU labels are
            never read by the host, so there an ignored row costs its share of the GEMMs.
        bias: [V] or None.
        rows: the shape of `labels`, indices into the flattened rows of `hidden`; many labels may
            share a row. Without it, label i belongs to row i.
        logit_scale: factor on the logits, above 0.
        softcap: the logits' soft bound, above 0 (Gemma 2), or None.
        ignore_index: labels with this value give 0 and a zero gradient.
        memory_budget: bytes that may be held for logits (the chunk in work and what is kept for
            the weight's gradient). Rows over it are recomputed in backward: 4 GEMMs for them
            instead of 3. None keeps all rows when the weight needs a gradient.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        float32 (float64 for float64), in nats, the shape of `labels`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        RuntimeError: `impl` cannot run here.
    """
    call = checked(
        hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, memory_budget, impl
    )
    return logps_of(call).view(labels.shape)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each sequence from hidden states: sums of `linear_token_logps`.

    Args:
        hidden: [B, T, D] padded, or [N, D] packed with `cu_seqlens`; any [..., D] with `rows`.
        labels: [B, T] or [N].
        cu_seqlens: [S+1] over the labels, as in `sequence_logps`.

    Returns:
        [S] float32 (float64 for float64), in nats. An empty or fully ignored sequence has
        log-probability 0 and zero gradient.

    The other arguments and errors are those of `linear_token_logps`.
    """
    call = checked(
        hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, memory_budget, impl
    )
    offsets = sequence_offsets(labels.shape, cu_seqlens, hidden.device)
    return sum_sequences(logps_of(call), offsets, call.impl)


def _wanted(outputs: object) -> tuple[bool, bool, bool, bool]:
    """Which of TOKEN_STATS are asked for."""
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(f"outputs: expected a tuple of names out of {TOKEN_STATS}, got {outputs!r}")
    unknown = [name for name in outputs if name not in TOKEN_STATS]
    if unknown:
        raise ValueError(f"outputs: expected names out of {TOKEN_STATS}, got {unknown[0]!r}")
    return tuple(name in outputs for name in TOKEN_STATS)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    outputs: tuple[str, ...] = ("entropy",),
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """`linear_token_logps` together with statistics of each token's distribution.

    With u the logits of a label's row (transformed by bias, scale and softcap, as in
    `linear_token_logps`) and p = softmax(u): the entropy −Σ p log p, log Σ p², the mean of u, and
    whether the label is the first maximum of u. Gradients pass through the log-probabilities and
    the entropy: ∂H/∂u = −p (log p + H); the others are constants.

    Args:
        outputs: which of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" to compute. With
            none of them the log-probabilities are those of `linear_token_logps`, to the bit.
        entropy_grad: whether backward will bring a gradient for the entropy. Any gradient is right
            with either value; True skips the product that serves the log-probs' gradient alone:
            with a trainable head 4 products in all (1 forward, 3 backward) instead of 5 (2 and 3).

    Returns:
        `TokenStats`, each field of the shape of `labels`: float32 (float64 for float64) in nats,
        `is_top1` bool; None where not asked for; 0 or False for ignored labels.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        RuntimeError: `impl` cannot run here.

    The other arguments are those of `linear_token_logps`.
    """
    wanted = _wanted(outputs)
    call = checked(
        hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, memory_budget, impl
    )
    found = _observed(call, wanted, entropy_grad)
    return TokenStats(
        *(
            values.view(labels.shape) if asked else None
            for values, asked in zip(found, (True, *wanted), strict=True)
        )
    )
