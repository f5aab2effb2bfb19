"""Log-probabilities of tokens and of whole sequences, from logits.

log π(y | x) of a response y is S = Σ_i log p(y_i | x, y_<i) (arXiv 2405.00675, section 3); its
gradient with respect to the logits of row i is onehot(y_i) − softmax(z_i): docs/math.md, section 5.

    bytes    one read of the logits for the values; a read and a write more for the gradient
    flops    O(N V), far below what the reads cost
    kernels  triton/token_logps.py, csrc/cpu/rows_impl.h; the specification is reference.py
    tests    tests/logps/test_token.py, test_triton_logps.py; in PyTorch: test_framework.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve
from sppo_kernels.logps import reference
from sppo_kernels.logps.call import load
from sppo_kernels.logps.segments import sequence_offsets, sum_sequences
from sppo_kernels.registry import define, fake, formula, kernel, once, op

__all__ = ["sequence_logps", "token_logps"]

# logits [B, T, V], labels [B, T] -> logp [B, T], norm [2, B, T]: the rows' maxima m and sums of
# exp(z - m). float32.
_SAVED = "Tensor labels, Tensor logp, Tensor norm, int ignore_index, str impl"
define(
    "token_logps",
    "(Tensor logits, Tensor labels, int ignore_index, bool inplace_backward, str impl) "
    "-> (Tensor logp, Tensor norm)",
)
define("token_logps_backward", f"(Tensor grad, Tensor logits, {_SAVED}) -> Tensor")
define("token_logps_backward_", f"(Tensor grad, Tensor(a!) logits, {_SAVED}) -> ()")


@fake("token_logps")
def _(logits, labels, ignore_index, inplace_backward, impl):
    return tuple(
        logits.new_empty(shape, dtype=torch.float32) for shape in (labels.shape, (2, *labels.shape))
    )


@fake("token_logps_backward")
def _(grad, logits, labels, logp, norm, ignore_index, impl):
    return logits.new_empty(logits.shape)


@fake("token_logps_backward_")
def _(grad, logits, labels, logp, norm, ignore_index, impl):
    return None


@kernel("token_logps")
def _(logits, labels, ignore_index, inplace_backward, impl):
    return load(impl).token_logps(logits, labels, ignore_index)


def _write_gradient(out, grad, logits, labels, logp, norm, ignore_index, impl) -> None:
    coef = grad.neg().contiguous()  # d log p / d z = onehot - softmax
    load(impl).token_logps_backward(coef, logits, labels, logp, norm, ignore_index, out)


@kernel("token_logps_backward")
def _(grad, logits, *saved):
    out = logits.new_empty(logits.shape)
    _write_gradient(out, grad, logits, *saved)
    return out


@kernel("token_logps_backward_")
def _(grad, logits, *saved):
    _write_gradient(logits, grad, logits, *saved)


def _save(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index, ctx.inplace, ctx.impl = inputs
    logp, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logp, norm)


def _backward(ctx, grad, _norm):
    if grad is None:
        return None, None, None, None, None
    logits, *saved = ctx.saved_tensors
    saved += [ctx.ignore_index, ctx.impl]
    if not ctx.inplace:
        return op("token_logps_backward")(grad, logits, *saved), None, None, None, None
    if torch.is_grad_enabled():
        raise RuntimeError("inplace_backward: cannot be combined with create_graph=True")
    logits = logits.detach()
    torch.autograd.graph.increment_version(logits)  # so that other readers of it fail loudly
    op("token_logps_backward_")(grad, logits, *saved)
    return logits, None, None, None, None


formula("token_logps", _backward, _save)
once("token_logps_backward")


def checked_logits(logits: object, labels: object, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Check logits [..., V] and labels [...]; return them as [B, T, V] and contiguous [B, T]."""
    logits = checks.floating("logits", logits)
    labels = checks.integers("labels", labels)
    if logits.dim() < 2:
        raise ValueError(f"logits: expected shape [..., V], got {tuple(logits.shape)}")
    checks.shape("labels", labels, logits.shape[:-1], "that of logits without its last one")
    checks.same_device("labels", labels, "logits", logits)
    checks.labels_in_range(labels, logits.shape[-1], ignore_index)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    elif logits.dim() > 3:
        logits = logits.flatten(0, -3)
    return logits, labels.reshape(logits.shape[:-1]).contiguous()


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under its row of logits.

    Args:
        logits: [..., V], bfloat16, float16, float32 (or float64: reference). Views over the
            leading dimensions, such as `logits[:, :-1]`, are read in place.
        labels: [...], int64 or int32; `labels[i]` is the token that row i predicts.
        ignore_index: rows with this label give 0, cost nothing and get a zero gradient; what
            they hold, NaN included, is not looked at.
        inplace_backward: write the gradient into the memory of `logits`, which must not be needed
            again. Autograd raises if another operator saved them.
        impl: "auto", "reference", "triton" or "native".

    Returns:
        float32 (float64 for float64), in nats, the shape of `labels`. NaN and infinities in the
        logits reach it as they reach torch.log_softmax.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. Labels
            out of range raise on the CPU and under SPPO_KERNELS_CHECK=1; elsewhere they give NaN.
        RuntimeError: `impl` cannot run here.
    """
    rows, targets = checked_logits(logits, labels, ignore_index)
    chosen = resolve(impl, rows.device.type, rows.dtype)
    if chosen == "reference":
        return reference.token_logps(rows, targets, ignore_index).view(labels.shape)
    inplace = inplace_backward and not torch.compiler.is_compiling()  # compilers reuse memory
    logp, _ = op("token_logps")(rows, targets, ignore_index, inplace, chosen)
    return logp.view(labels.shape)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each sequence: the sum of its tokens' log-probabilities.

    Args:
        logits: [B, T, V] padded, or [N, V] packed with `cu_seqlens`.
        labels: [B, T] or [N]; see `token_logps`.
        cu_seqlens: [S+1], int32 or int64, from 0 to N, never decreasing: sequence s is the rows
            cu_seqlens[s]:cu_seqlens[s+1]. Without it, every row of the batch is a sequence.

    Returns:
        [S] float32 (float64 for float64), in nats. An empty or fully ignored sequence has
        log-probability 0 and zero gradient.

    Raises: as `token_logps`.
    """
    logp = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        impl=impl,
    )
    offsets = sequence_offsets(labels.shape, cu_seqlens, logp.device)
    return sum_sequences(logp, offsets, resolve(impl, logits.device.type, logits.dtype))
