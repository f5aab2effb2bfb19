"""Log-probabilities of tokens and of whole sequences, from logits.

log π(y | x) of a response y is S = Σ_i log p(y_i | x, y_<i) (arXiv 2405.00675, section 3); its
gradient with respect to the logits of row i is onehot(y_i) − softmax(z_i). See docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve
from sppo_kernels.logps import _autograd, dispatch, reference  # noqa: F401  (registers the kernels)
from sppo_kernels.registry import op

__all__ = ["sequence_logps", "token_logps"]

assert _autograd  # imported for its registrations


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


def sequence_offsets(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """cu_seqlens for labels of this shape: the given one for packed [N], else one row each."""
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(
                "cu_seqlens: expected None with padded labels [B, T]; packed labels have shape "
                f"[N], got {tuple(shape)}"
            )
        offsets = checks.offsets(cu_seqlens, shape[0])
        return offsets.to(device, non_blocking=True)
    if len(shape) != 2:
        raise ValueError(
            "cu_seqlens: needed for packed labels [N]; without it labels must be padded, [B, T], "
            f"got {tuple(shape)}"
        )
    if shape[0] == 0:
        raise ValueError("labels: expected at least one sequence, got an empty batch")
    return torch.arange(shape[0] + 1, device=device) * shape[1]


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


def sum_sequences(logp: Tensor, offsets: Tensor, chosen: str) -> Tensor:
    """Sums of logp between offsets [S+1], by the backend `chosen`."""
    flat = logp.reshape(-1)
    if chosen == "reference":
        return reference.segment_sum(flat, offsets)
    return op("segment_sum")(flat, offsets, chosen)
