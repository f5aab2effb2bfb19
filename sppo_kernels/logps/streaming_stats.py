"""Statistics of the logits' rows along the hidden-in path, and the entropy's gradient.

Forward reads every chunk of raw logits once more, before row_logps may turn it into dz. The
entropy's gradient is not proportional to dz, so backward computes the logits anew where there is
one: 3U for hidden states and head, one chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sppo_kernels.logps import streaming
from sppo_kernels.logps.streaming import Problem


@dataclass
class Observed(Problem):
    """A problem that fills `found` with the statistics of its rows as their logits appear."""

    wanted: tuple[bool, bool, bool, bool]  # entropy, squares, mean, top1
    found: tuple[Tensor, ...]  # norm [3, M], entropy, squares, mean, top1 [M]; or no elements

    def product(self, begin: int, end: int, out: Tensor) -> None:
        super().product(begin, end, out)
        parts = self.backend.row_stats(out, self.labels[begin:end], *head(self), *self.wanted)
        for whole, part in zip(self.found, parts, strict=True):
            if part.numel():
                whole[..., begin:end] = part


def head(problem: Problem) -> tuple:
    """What the row kernels take of the head, in their order."""
    return problem.bias, problem.logit_scale, problem.softcap, problem.ignore_index


def observed(problem: Problem, wanted: tuple[bool, bool, bool, bool], size: int) -> Observed:
    """`problem` with memory for its statistics; norm is of `size` columns, the labels' number."""
    entropy, *_ = wanted
    like, rows = problem.hidden, problem.rows
    norm = like.new_empty(3, size if entropy else 0, dtype=torch.float32)
    dtypes = (torch.float32, torch.float32, torch.float32, torch.bool)
    found = (
        like.new_empty(rows if asked else 0, dtype=dtype)
        for asked, dtype in zip(wanted, dtypes, strict=True)
    )
    return Observed(**vars(problem), wanted=wanted, found=(norm, *found))


def row_units(grad_logp: Tensor, grad_entropy: Tensor) -> Tensor:
    """A power of two for each row, near the larger of its gradients.

    The row of logits then takes gradients near 1, so that float16 neither overflows nor loses
    small ones; the power of two is multiplied back where coefficients are.
    """
    largest = torch.maximum(grad_logp.abs(), grad_entropy.abs()).clamp(2.0**-100, 2.0**100)
    return torch.exp2(torch.ceil(torch.log2(largest)))


def gradient(
    problem: Problem,
    norm: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    dh: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Fill dh [N, D], dw [V, D], db [V] with gradients of Σ (grad_logp log p + grad_entropy H).

    norm: [3, M]; grad_logp, grad_entropy: [M] float32. With more than one chunk dw is float32.
    """
    unit = row_units(grad_logp, grad_entropy)
    of_logp, of_entropy = (grad_logp / unit).contiguous(), (grad_entropy / unit).contiguous()
    unit = unit.masked_fill(problem.labels == problem.ignore_index, 0.0)
    dx = None
    if dh is not None:
        dx = problem.hidden.new_empty(problem.rows, problem.hidden.shape[1])
    buffer = problem.buffer(min(problem.chunk_rows, problem.rows))
    for first, last in problem.chunks(0, problem.rows):
        dz = buffer[: last - first]
        problem.product(first, last, dz)
        problem.backend.row_stats_backward(
            dz, problem.labels[first:last], *head(problem), norm[:, first:last],
            of_logp[first:last], of_entropy[first:last],
        )  # fmt: skip
        if dx is not None:
            torch.mm(dz, problem.weight, out=dx[first:last])
        if dw is not None or db is not None:
            streaming.weight_gradient(problem, unit, dz, dw, db, first, last, first == 0)
    if dx is not None:
        streaming.hidden_gradient(problem, unit, dx, dh)
