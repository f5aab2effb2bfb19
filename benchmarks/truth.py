"""The gate: float64 values of a batch's loss and gradients, and how far a provider is from them.

Everything is computed from the rounded inputs, in float64, for every row of the batch, so that
whatever a provider does in chunks is covered. Per-token gradients come from autograd on the logits;
those of hidden and weight follow by the chain rule for each task's loss on sequence log-probs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Refused, within
from benchmarks.inputs import Inputs

ETA = 1000.0
# Largest relative error against float64: a few roundings of the dtype.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in GATE)
PIECE = 2048  # rows at a time


class Truth:
    """float64 losses and gradients of one batch, for each task.

    sppo: soft win rates and given reference log-probs. hard: the first half won, the second lost,
    reference 0. on-policy: the reference is the policy itself. cross-entropy: −Σ log p.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        counted = inputs.counted.nonzero().squeeze(-1)  # [L]
        self.sequence = counted // inputs.labels.shape[1]  # [L]
        labels = inputs.labels.reshape(-1)[counted]
        self.linear = inputs.logits is None
        if self.linear:
            hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach().double()
            self.rows = hidden.reshape(-1, hidden.shape[-1])[counted].double()  # [L, D]
            self.unit = torch.empty(
                len(labels), len(self.weight), dtype=torch.float64, device=labels.device
            )  # [L, V]: the gradient of each row's log p by its logits
        else:
            given = inputs.logits.detach()
            self.unit = given.reshape(-1, given.shape[-1])[counted].double()
        logp = torch.empty(len(labels), dtype=torch.float64, device=labels.device)
        for at in range(0, len(labels), PIECE):
            piece = slice(at, at + PIECE)
            z = self.rows[piece] @ self.weight.mT if self.linear else self.unit[piece]
            z = z.detach().requires_grad_()
            capped = z if not inputs.softcap else inputs.softcap * torch.tanh(z / inputs.softcap)
            found = F.log_softmax(capped, -1).gather(-1, labels[piece, None]).squeeze(-1)
            (self.unit[piece],) = torch.autograd.grad(found.sum(), z)
            logp[piece] = found.detach()
        self.logps = logp.new_zeros(len(inputs.labels)).index_add(0, self.sequence, logp)  # [S]
        self.mean_logp = float(logp.mean())

    @functools.cached_property
    def unit_hidden(self) -> Tensor:
        """[L, D] gradient of each row's log p by its hidden state."""
        return self.unit @ self.weight

    def loss(self, task: str) -> tuple[Tensor, Tensor]:
        """The task's loss, and its derivative [S] by the sequence log-probs."""
        logps = self.logps.clone().requires_grad_()
        ref, win = self.inputs.ref.double(), self.inputs.win.double()
        if task == "cross-entropy":
            value = -logps.sum()
        else:
            if task == "hard":
                ref = torch.zeros_like(ref)
                win = (torch.arange(len(win), device=win.device) < len(win) // 2).double()
            elif task == "on-policy":
                ref = self.logps
            value = (logps - ref - ETA * (win - 0.5)).square().mean()
        return value.detach(), torch.autograd.grad(value, logps)[0]

    def check(self, value: Tensor, inputs: Inputs, task: str) -> float:
        """The larger of the relative errors of a loss and of the gradients in the leaves' `.grad`.

        Args:
            inputs: what the provider was given: those of the truth, a copy of them, or packed.

        Raises:
            Refused: a leaf has no gradient, or the error is above GATE or NaN.
        """
        error = self.error(value, inputs, task)
        leaf = inputs.logits if inputs.hidden is None else inputs.hidden
        return within(error, GATE[leaf.dtype])

    def error(self, value: Tensor, inputs: Inputs, task: str) -> float:
        """The error of `check`, whatever it is."""
        truth, by_sequence = self.loss(task)
        error = _relative((value.detach().double() - truth).square(), truth.square())
        for leaf in inputs.leaves():
            if leaf.grad is None:
                raise Refused("a gradient is missing")
            found = self._gradient_error(leaf, inputs, by_sequence[self.sequence])
            error = found if not found <= error else error  # NaN if either is
        return error

    def _gradient_error(self, leaf: Tensor, inputs: Inputs, by_row: Tensor) -> float:
        if leaf is inputs.weight:
            want, got = (self.unit * by_row[:, None]).mT @ self.rows, leaf.grad
            pairs = zip(want.split(PIECE), got.split(PIECE), strict=True)
            return _relative(*_distances(pairs))
        unit = self.unit_hidden if leaf is inputs.hidden else self.unit
        got = leaf.grad.reshape(-1, leaf.shape[-1])
        counted = inputs.counted.nonzero().squeeze(-1)
        pairs = (
            (unit[at : at + PIECE] * by_row[at : at + PIECE, None], got[counted[at : at + PIECE]])
            for at in range(0, len(unit), PIECE)
        )
        wrong, right = _distances(pairs)
        outside = got[~inputs.counted]  # rows that do not count: zero is right
        return _relative(wrong + outside.double().square().sum(), right)


def _distances(pairs) -> tuple[Tensor, Tensor]:
    wrong = right = 0.0
    for want, got in pairs:
        right = right + want.square().sum()
        wrong = wrong + want.sub_(got).square_().sum()
    return wrong, right


def _relative(wrong: Tensor, right: Tensor) -> float:
    wrong, right = float(wrong) ** 0.5, float(right) ** 0.5
    return wrong / right if right > 0 else wrong
