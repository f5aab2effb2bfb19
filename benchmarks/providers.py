"""What is compared: this package, the ceilings, eager PyTorch, torch.compile and the peers.

Every hidden-in provider computes the SPPO loss of S packed-as-padded responses and leaves gradients
in `inputs.hidden.grad` and, when the head is trained, `inputs.weight.grad`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sppo_kernels as sk

ETA = 1000.0


@dataclass
class Inputs:
    """One case: S responses of T tokens; hidden [S, T, D], weight [V, D] or logits [S, T, V]."""

    labels: Tensor
    ref: Tensor
    win: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [
            t for t in (self.hidden, self.weight, self.logits) if t is not None and t.requires_grad
        ]


def zipf_logits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits of a peaked, Zipf-like distribution in a random order of tokens, plus noise."""
    vocab = shape[-1]
    ranks = torch.arange(1, vocab + 1, device=device, dtype=torch.float32)
    base = -1.1 * torch.log(ranks)[torch.randperm(vocab, device=device)]
    out = torch.randn(shape, device=device, dtype=dtype)
    return out.mul_(1.5).add_(base.to(dtype))


def make_inputs(
    kind: str, rows: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Random inputs that look like life: 8 responses, targets likely under the model, odd ends."""
    torch.manual_seed(rows + dim + vocab)
    sequences = 8
    steps = rows // sequences
    labels = torch.randint(0, vocab, (sequences, steps), device=device)
    win = torch.rand(sequences, device=device)
    if kind == "logits":
        logits = zipf_logits((sequences, steps, vocab), dtype, device).requires_grad_()
        ref = -9.0 * steps + torch.randn(sequences, device=device)
        return Inputs(labels, ref, win, logits=logits)
    hidden = torch.randn(sequences, steps, dim, device=device, dtype=dtype)
    weight = torch.randn(vocab, dim, device=device, dtype=dtype) * (2.0 / dim**0.5)
    ref = -12.0 * steps + torch.randn(sequences, device=device)
    return Inputs(labels, ref, win, hidden=hidden.requires_grad_(), weight=weight.requires_grad_())


def clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves():
        leaf.grad = None


def eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """As in the released SPPO code: log_softmax of all logits, then gather."""
    logp = F.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    return logp.float().sum(-1)


def eager_linear(inputs: Inputs) -> Tensor:
    logits = F.linear(inputs.hidden, inputs.weight)
    return sk.sppo_loss(eager_logps(logits, inputs.labels), inputs.ref, inputs.win, eta=ETA)


def eager_logits(inputs: Inputs) -> Tensor:
    return sk.sppo_loss(eager_logps(inputs.logits, inputs.labels), inputs.ref, inputs.win, eta=ETA)


def eager_float_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """As Hugging Face losses do: the logits upcast, so that log-probs have float32 precision."""
    return eager_logps(logits.float(), labels)


def eager_float_linear(inputs: Inputs) -> Tensor:
    logps = eager_float_logps(F.linear(inputs.hidden, inputs.weight), inputs.labels)
    return sk.sppo_loss(logps, inputs.ref, inputs.win, eta=ETA)


def eager_float_logits(inputs: Inputs) -> Tensor:
    logps = eager_float_logps(inputs.logits, inputs.labels)
    return sk.sppo_loss(logps, inputs.ref, inputs.win, eta=ETA)


def eager_linear_exact(inputs: Inputs) -> Tensor:
    """The truth of a gate: everything in the dtype of the (float64) inputs."""
    return _exact(F.linear(inputs.hidden, inputs.weight), inputs)


def eager_logits_exact(inputs: Inputs) -> Tensor:
    return _exact(inputs.logits, inputs)


def _exact(logits: Tensor, inputs: Inputs) -> Tensor:
    logp = F.log_softmax(logits, -1).gather(-1, inputs.labels[..., None]).squeeze(-1)
    return sk.sppo_loss(logp.sum(-1), inputs.ref, inputs.win, eta=ETA)


def ours_linear(inputs: Inputs, impl: str) -> Tensor:
    return sk.fused_linear_sppo_loss(
        inputs.hidden, inputs.weight, inputs.labels, inputs.ref, inputs.win, eta=ETA, impl=impl
    ).loss


def ours_logits(inputs: Inputs, impl: str, inplace: bool = False) -> Tensor:
    return sk.fused_sppo_loss(
        inputs.logits, inputs.labels, inputs.ref, inputs.win, eta=ETA, impl=impl,
        inplace_backward=inplace,
    ).loss  # fmt: skip


def trl_linear(inputs: Inputs) -> Tensor:
    """TRL's chunked head for the log-probs, our loss on top (TRL has hard labels only)."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    dim = inputs.hidden.shape[-1]
    logp, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden.view(-1, dim), inputs.weight, None, inputs.labels.view(-1), 1.0, 32768,
        None, 1.0, (),
    )  # fmt: skip
    logps = logp.float().view_as(inputs.labels).sum(-1)
    return sk.sppo_loss(logps, inputs.ref, inputs.win, eta=ETA)


def liger_linear(inputs: Inputs) -> Tensor:
    """Liger's chunked sppo_hard: hard labels and no reference, and its gate likewise."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(
        beta=1.0 / ETA, loss_type="sppo_hard", use_ref_model=False, compiled=False
    )(inputs.weight, inputs.hidden, inputs.labels)
    return 0.5 * loss


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function)


def fast_impl(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "native"


def gemms(inputs: Inputs, parts: int) -> Callable[[], object]:
    """The bare products of the head: X Wᵀ, dZ W, dZᵀ X (the first `parts` of them)."""
    hidden = inputs.hidden.detach().reshape(-1, inputs.hidden.shape[-1])
    weight = inputs.weight.detach()
    dz = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)

    def run() -> None:
        torch.mm(hidden, weight.t())
        if parts > 1:
            torch.mm(dz, weight)
        if parts > 2:
            torch.mm(dz.t(), hidden)

    return run
