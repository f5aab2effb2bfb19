"""The hidden-in algorithm: row chunks through vendor GEMMs and one row kernel.

For a chunk X of hidden rows, with U = 2 N D V flops:

    z  = X Wᵀ                       1U
    z <- dz = softmax(z) - onehot   in place, by the row kernel, which also yields log p
    dX = dz W                       1U
    dW = dzᵀ (diag(c) X)            1U, once, when the coefficients c of the rows are known

dX needs no coefficient either: backward multiplies its rows by c (docs/math.md). The row kernel
is the backend's row_logps, so that every backend runs this same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_ACCUMULATE_COLUMNS = 16384  # vocabulary slice of a partial dW, so that no second [V, D] is held
_BIAS_COLUMNS = 2048


@dataclass
class Problem:
    """One call: the rows that count, and where their hidden states and log-probs live."""

    backend: ModuleType  # gives row_logps
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V] float32
    labels: Tensor  # [M]
    source: Tensor | None  # [M] rows of hidden, or None for 0..M-1
    target: Tensor | None  # [M] positions among the L labels, or None for 0..M-1
    unique: bool  # no hidden row is used twice
    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_rows: int

    @property
    def rows(self) -> int:
        return self.labels.shape[0]

    def chunks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for first in range(begin, end, self.chunk_rows):
            yield first, min(first + self.chunk_rows, end)

    def gather(self, begin: int, end: int) -> Tensor:
        """Hidden rows of the labels begin..end."""
        if self.source is None:
            return self.hidden[begin:end]
        return self.hidden.index_select(0, self.source[begin:end])

    def product(self, begin: int, end: int, out: Tensor) -> None:
        """Fill `out` [C, V] with the chunk's raw products z."""
        torch.mm(self.gather(begin, end), self.weight.t(), out=out)

    def logits(self, begin: int, end: int, out: Tensor, write_grad: bool) -> Tensor:
        """Fill `out` [C, V] with the chunk's logits, or with dz, and return log p [C]."""
        self.product(begin, end, out)
        logp, _ = self.backend.row_logps(
            out,
            self.labels[begin:end],
            self.bias,
            self.logit_scale,
            self.softcap,
            self.ignore_index,
            write_grad,
        )
        return logp

    def scaled(self, begin: int, end: int, coef: Tensor) -> Tensor:
        """diag(coef) X, with rows of ignored labels 0 whatever their hidden states hold."""
        x = self.gather(begin, end)
        out = torch.mul(x, coef[begin:end, None], out=torch.empty_like(x))
        return out.masked_fill_((self.labels[begin:end] == self.ignore_index)[:, None], 0)

    def buffer(self, rows: int) -> Tensor:
        return self.hidden.new_empty(rows, self.weight.shape[0])


def on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor's values stops no device."""
    return tensor.device.type == "cpu"


def prepare(
    backend: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int,
) -> Problem:
    """Drop ignored labels where that needs no synchronisation: when `labels` are on the host."""
    source, target, unique = rows, None, rows is None
    if on_host(labels):
        keep = labels != ignore_index
        if not bool(keep.all()):
            target = keep.nonzero().squeeze(1)
            labels = labels.index_select(0, target)
            source = target if rows is None else rows.index_select(0, target.to(rows.device))
    device = hidden.device
    if device.type != "cpu":
        labels, source, target = (
            None if t is None else t.to(device, non_blocking=True) for t in (labels, source, target)
        )
    return Problem(
        backend, hidden, weight, None if bias is None else bias.float().contiguous(),
        labels, source, target, unique, logit_scale, softcap, ignore_index, chunk_rows,
    )  # fmt: skip


def place(problem: Problem, values: Tensor, size: int) -> Tensor:
    """Values [M] of the rows that count, among `size` labels; 0 elsewhere."""
    if problem.target is None:
        return values
    return values.new_zeros(size).index_copy_(0, problem.target, values)


def forward(
    problem: Problem, need_dx: bool, need_dw: bool, dx: Tensor, dz: Tensor, begin: int, end: int
) -> Tensor:
    """log p [end - begin]; fills dx [begin:end] and the first rows of dz, as many as it has.

    Both are gradients of log p with respect to (−hidden row) and (−logits row): coefficient 1.
    """
    retain = min(dz.shape[0], end - begin) if need_dw else 0
    logp = problem.hidden.new_empty(end - begin, dtype=torch.float32)
    spare = None
    for first, last in problem.chunks(begin, end):
        if last - begin <= retain:
            z = dz[first - begin : last - begin]
        else:
            if spare is None:
                spare = problem.buffer(min(problem.chunk_rows, end - begin))
            z = spare[: last - first]
        write_grad = need_dx or last - begin <= retain
        logp[first - begin : last - begin] = problem.logits(first, last, z, write_grad)
        if need_dx:
            torch.mm(z, problem.weight, out=dx[first:last])
    return logp


def retained_rows(problem: Problem, dz: Tensor, rows: int) -> int:
    """How many of `rows` rows forward kept in dz: whole chunks only."""
    kept = min(dz.shape[0], rows)
    return kept if kept == rows else kept - kept % problem.chunk_rows


def hidden_gradient(problem: Problem, coef: Tensor, dx: Tensor, out: Tensor) -> Tensor:
    """out [N, D] = rows of dx times their coefficients, summed over labels that share a row."""
    if problem.source is None:
        return torch.mul(dx, coef[:, None], out=out)
    if problem.unique:
        scaled = torch.mul(dx, coef[:, None], out=torch.empty_like(dx, dtype=out.dtype))
        return out.zero_().index_copy_(0, problem.source, scaled)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    scaled = dx * coef[:, None]
    if on_host(out):
        total.index_add_(0, problem.source, scaled)
    else:  # index_add_ adds in no fixed order there; index_put_ sorts first
        total.index_put_((problem.source,), scaled, accumulate=True)
    return out.copy_(total)


def weight_gradient(
    problem: Problem,
    coef: Tensor,
    dz: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    begin: int,
    end: int,
    first_group: bool = True,
) -> None:
    """Add the rows begin..end to dw [V, D] and db [V] (or set them, with `first_group`).

    One GEMM over the rows that dz holds; the rest is recomputed chunk by chunk. More than one
    part accumulates in dw itself, which must then be float32. db is always float32.
    """
    kept = retained_rows(problem, dz, end - begin)
    parts: list[tuple[int, int]] = [(begin, begin + kept)] if kept else []
    parts += problem.chunks(begin + kept, end)
    coef = coef.float()
    unit = _power_of_two(coef[begin:end]) if problem.hidden.dtype == torch.float16 else None
    if unit is not None:
        coef = coef / unit
    spare = None
    for first, last in parts:
        if first < begin + kept:
            z = dz[:kept]
        else:
            if spare is None:
                spare = problem.buffer(min(problem.chunk_rows, end - begin))
            z = spare[: last - first]
            problem.logits(first, last, z, True)
        if dw is not None:
            _accumulate(dw, z, problem.scaled(first, last, coef), unit, first_group)
        if db is not None:
            _accumulate_bias(db, z, coef[first:last], unit, first_group)
        first_group = False


def weight_parts(problem: Problem, dz: Tensor) -> int:
    """In how many parts weight_gradient adds up: above 1 it needs a float32 accumulator."""
    kept = retained_rows(problem, dz, problem.rows)
    return bool(kept) + -(-(problem.rows - kept) // problem.chunk_rows)


def _power_of_two(coef: Tensor) -> Tensor:
    """A power of two near max|coef|: float16 products stay in range, and no bit is lost."""
    largest = coef.abs().amax().clamp(min=2.0**-100, max=2.0**100)
    return torch.exp2(torch.ceil(torch.log2(largest)))


def _accumulate(total: Tensor, z: Tensor, x: Tensor, unit: Tensor | None, first: bool) -> None:
    """total (+)= unit * zᵀ x, in float32 when total is, a slice of the vocabulary at a time."""
    if unit is None and total.dtype == z.dtype:
        if first:
            torch.mm(z.t(), x, out=total)
        else:
            total.addmm_(z.t(), x)
        return
    for v in range(0, z.shape[1], _ACCUMULATE_COLUMNS):
        part = _matmul_float(z[:, v : v + _ACCUMULATE_COLUMNS].t(), x)
        if unit is not None:
            part = part * unit
        slot = total[v : v + _ACCUMULATE_COLUMNS]
        if first:
            slot.copy_(part)
        else:
            slot.add_(part)


def _accumulate_bias(
    total: Tensor, z: Tensor, coef: Tensor, unit: Tensor | None, first: bool
) -> None:
    """total [V] (+)= unit * zᵀ coef in float32, a slice of the vocabulary at a time."""
    for v in range(0, z.shape[1], _BIAS_COLUMNS):
        columns = z[:, v : v + _BIAS_COLUMNS].float()
        if on_host(z):  # BLAS adds a column's terms one after another: keep those runs short
            part = torch.stack(
                [c @ rows for c, rows in zip(coef.split(128), columns.split(128), strict=True)]
            ).sum(0)
        else:
            part = coef @ columns
        if unit is not None:
            part = part * unit
        slot = total[v : v + _BIAS_COLUMNS]
        if first:
            slot.copy_(part)
        else:
            slot.add_(part)


def _matmul_float(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, kept in the GEMM's own float32 accumulator where the device can."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
