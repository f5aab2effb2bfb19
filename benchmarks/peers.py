"""Adapters to other people's kernels, and the reasons why they cannot run a case.

Each gives its peer what that peer is given in life: rows are taken out where its trainer does so,
and rows that do not count are paid for where it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sppo_kernels as sk
from benchmarks.harness import missing
from benchmarks.inputs import IGNORED, Case, Inputs
from benchmarks.truth import ETA


def needs(package: str) -> Callable[..., str | None]:
    """The reason of a provider that needs a package and nothing else."""

    def reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
        return missing(package)

    return reason


def _loss(logps: Tensor, inputs: Inputs) -> Tensor:
    return sk.sppo_loss(logps, inputs.ref, inputs.win, eta=ETA)


def trl_linear(inputs: Inputs) -> Tensor:
    """TRL's chunked head for the log-probs of completion rows, our loss on top."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = inputs.labels != IGNORED
    logp, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden[mask], inputs.weight, None, inputs.labels[mask], 1.0, 32768, inputs.softcap,
        1.0, (),
    )  # fmt: skip
    each = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logp.float())
    return _loss(each.sum(-1), inputs)


def liger_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    if case.softcap:
        return "it has no softcap"
    return missing("liger_kernel")


def liger_linear(inputs: Inputs, compiled: bool = True) -> Tensor:
    """Liger's chunked sppo_hard: pairs of the batch's halves, hard labels, no reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(
        ignore_index=IGNORED, beta=1.0 / ETA, loss_type="sppo_hard", use_ref_model=False,
        compiled=compiled,
    )(inputs.weight, inputs.hidden, inputs.labels)  # fmt: skip
    return 0.5 * loss


def cce_linear(inputs: Inputs) -> Tensor:
    """Apple's cut cross-entropy of each row with its own default of skipping small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.hidden.is_cuda else "torch_compile"
    each = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, softcap=inputs.softcap, reduction="none",
        impl=impl,
    )  # fmt: skip
    return _loss(-each.float().sum(-1), inputs)


def torch_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has it without chunking"
    return "it has no softcap" if case.softcap else None


def _torch(inputs: Inputs, reduction: str) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        inputs.hidden.flatten(0, -2), inputs.weight, inputs.labels.flatten(), reduction=reduction,
        ignore_index=IGNORED, options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip


def torch_linear(inputs: Inputs) -> Tensor:
    """PyTorch's chunked linear cross-entropy of each row: it recomputes, four products."""
    return _loss(-_torch(inputs, "none").float().view(inputs.labels.shape).sum(-1), inputs)


def torch_sum(inputs: Inputs) -> Tensor:
    """The same with one scalar, whose gradient is known at once: three products."""
    return _torch(inputs, "sum")


def quack_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if case.softcap:
        return "it has no softcap"
    if case.rows % 8 or case.dim % 8 or case.vocab % 8:
        return "it needs rows, hidden size and vocabulary that are multiples of 8"
    return missing("quack")


def quack_sum(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        inputs.hidden.flatten(0, -2), inputs.weight, inputs.labels.flatten(), ignore_index=IGNORED,
        reduction="sum",
    )  # fmt: skip
