"""The hidden-in algorithm: row chunks through vendor GEMMs and one row kernel.

For a chunk X of hidden rows, with U = 2 N D V flops:

    z  = X Wᵀ                       1U
    z <- dz = softmax(z) - onehot   in place, by the row kernel, which also yields log p
    dX = dz W                       1U
    dW = dzᵀ (diag(c) X)            1U, once, when the coefficients c of the rows are known

dX needs no coefficient either: backward multiplies its rows by c (docs/math.md, section 3). The
entropy's gradient is not proportional to dz, so where there is one backward computes the logits
anew: 3U for hidden states and head, one chunk at a time (section 6). The row kernels are the
backend's row_logps, row_stats and row_stats_backward, so that every backend runs this same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sppo_kernels.logps.call import LinearCall, load

_ACCUMULATE_COLUMNS = 16384  # vocabulary slice of a partial dW, so that no second [V, D] is held
_BIAS_COLUMNS = 2048


def on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor's values stops no device."""
    return tensor.device.type == "cpu"


@dataclass
class Problem:
    """The rows of a call that count, and where their hidden states and log-probs live."""

    call: LinearCall
    kernels: ModuleType
    bias: Tensor | None  # [V] float32
    labels: Tensor  # [M], on the device of hidden
    source: Tensor | None  # [M] rows of hidden, or None for 0..M-1
    target: Tensor | None  # [M] positions among the L labels, or None for 0..M-1

    @property
    def rows(self) -> int:
        return self.labels.shape[0]

    def chunks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for first in range(begin, end, self.call.chunk_rows):
            yield first, min(first + self.call.chunk_rows, end)

    def gather(self, begin: int, end: int) -> Tensor:
        """Hidden rows of the labels begin..end."""
        if self.source is None:
            return self.call.hidden[begin:end]
        return self.call.hidden.index_select(0, self.source[begin:end])

    def product(self, begin: int, end: int, out: Tensor) -> None:
        """Fill `out` [C, V] with the chunk's raw products z."""
        torch.mm(self.gather(begin, end), self.call.weight.t(), out=out)

    def run(self, kernel: Callable, z: Tensor, begin: int, end: int, *more):
        """A row kernel on the chunk's raw products z, with their labels and the head."""
        c = self.call
        head = (self.bias, c.logit_scale, c.softcap, c.ignore_index)
        return kernel(z, self.labels[begin:end], *head, *more)

    def scaled(self, begin: int, end: int, coef: Tensor) -> Tensor:
        """diag(coef) X, with rows of ignored labels 0 whatever their hidden states hold."""
        x = self.gather(begin, end)
        out = torch.mul(x, coef[begin:end, None], out=torch.empty_like(x))
        return out.masked_fill_((self.labels[begin:end] == self.call.ignore_index)[:, None], 0)

    def buffer(self, rows: int) -> Tensor:
        """Memory for the logits of a chunk of at most so many rows."""
        rows = min(self.call.chunk_rows, rows)
        return self.call.hidden.new_empty(rows, self.call.weight.shape[0])

    def of_rows(self, values: Tensor) -> Tensor:
        """Of values [..., L] those of the rows that count."""
        return values if self.target is None else values.index_select(-1, self.target)

    def upstream(self, grad: Tensor | None) -> Tensor:
        """A gradient [L] as that of the rows that count; 0 for ignored labels, and for None."""
        if grad is None:
            return self.call.hidden.new_zeros(self.rows, dtype=torch.float32)
        return self.of_rows(grad).masked_fill(self.labels == self.call.ignore_index, 0.0)

    def placed(self, values: Tensor) -> Tensor:
        """Values [M] of the rows that count, among the L labels; 0 elsewhere."""
        if self.target is None:
            return values
        return values.new_zeros(self.call.labels.shape[0]).index_copy_(0, self.target, values)


def prepare(call: LinearCall) -> Problem:
    """Drop ignored labels where that needs no synchronisation: when they are on the host."""
    labels, source, target = call.labels, call.rows, None
    if on_host(labels):
        keep = labels != call.ignore_index
        if not bool(keep.all()):
            target = keep.nonzero().squeeze(1)
            labels = labels.index_select(0, target)
            source = target if source is None else source.index_select(0, target.to(source.device))
    device = call.hidden.device
    if device.type != "cpu":
        labels, source, target = (
            None if t is None else t.to(device, non_blocking=True) for t in (labels, source, target)
        )
    bias = None if call.bias is None else call.bias.float().contiguous()
    return Problem(call, load(call.impl), bias, labels, source, target)


def forward(
    problem: Problem,
    dx: Tensor | None,
    dz: Tensor,
    begin: int,
    end: int,
    read: Callable[[Tensor, int, int], None] | None = None,
) -> Tensor:
    """log p [end - begin]; fills dx [begin:end] and the first rows of dz, as many as it has.

    Both are gradients of log p with respect to (−hidden row) and (−logits row): coefficient 1.
    `read(z, first, last)` sees every chunk of raw products before dz may take its place.
    """
    retain = min(dz.shape[0], end - begin)
    logp = problem.call.hidden.new_empty(end - begin, dtype=torch.float32)
    spare = None
    for first, last in problem.chunks(begin, end):
        keep = last - begin <= retain
        if keep:
            z = dz[first - begin : last - begin]
        else:
            spare = problem.buffer(end - begin) if spare is None else spare
            z = spare[: last - first]
        problem.product(first, last, z)
        if read is not None:
            read(z, first, last)
        row_logps = problem.kernels.row_logps
        logp[first - begin : last - begin] = problem.run(
            row_logps, z, first, last, keep or dx is not None
        )
        if dx is not None:
            torch.mm(z, problem.call.weight, out=dx[first:last])
    return logp


def statistics(
    problem: Problem, wanted: tuple[bool, ...], outputs: tuple[Tensor, ...]
) -> Callable[[Tensor, int, int], None]:
    """A reader for `forward` that fills norm [3, L] and the statistics [L] that are wanted."""
    if problem.target is not None:
        for whole in outputs:
            whole.zero_()

    def read(z: Tensor, begin: int, end: int) -> None:
        parts = problem.run(problem.kernels.row_stats, z, begin, end, *wanted)
        for whole, part in zip(outputs, parts, strict=True):
            if part.numel() and problem.target is not None:
                whole.index_copy_(-1, problem.target[begin:end], part)
            elif part.numel():
                whole[..., begin:end] = part

    return read


def hidden_gradient(problem: Problem, coef: Tensor, dx: Tensor, out: Tensor) -> Tensor:
    """out [N, D] = rows of dx times their coefficients, summed over labels that share a row."""
    if problem.source is None:
        return torch.mul(dx, coef[:, None], out=out)
    if problem.call.rows is None:  # no hidden row is used twice
        scaled = torch.mul(dx, coef[:, None], out=torch.empty_like(dx, dtype=out.dtype))
        return out.zero_().index_copy_(0, problem.source, scaled)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    scaled = dx * coef[:, None]
    if on_host(out):
        total.index_add_(0, problem.source, scaled)
    else:  # index_add_ adds in no fixed order there; index_put_ sorts first
        total.index_put_((problem.source,), scaled, accumulate=True)
    return out.copy_(total)


def _retained(problem: Problem, dz: Tensor, rows: int) -> int:
    """How many of `rows` rows forward kept in dz: whole chunks only."""
    kept = min(dz.shape[0], rows)
    return kept if kept == rows else kept - kept % problem.call.chunk_rows


def weight_parts(problem: Problem, dz: Tensor) -> int:
    """In how many parts `HeadGradient.add` adds up all rows."""
    kept = _retained(problem, dz, problem.rows)
    return bool(kept) + -(-(problem.rows - kept) // problem.call.chunk_rows)


class HeadGradient:
    """dW [V, D] and db [V], part by part; dW in float32 where there are `several`, db always."""

    def __init__(self, problem: Problem, need_dw: bool, need_db: bool, several: bool) -> None:
        weight = problem.call.weight
        dtype = torch.float32 if several else weight.dtype
        self.problem = problem
        self.dw = weight.new_empty(weight.shape, dtype=dtype) if need_dw else None
        self.db = weight.new_empty(weight.shape[0], dtype=torch.float32) if need_db else None
        self.empty = True

    def add(self, coef: Tensor, dz: Tensor, begin: int, end: int) -> None:
        """Add the rows begin..end with their coefficients [M].

        One GEMM over the rows that dz holds; the rest is recomputed chunk by chunk.
        """
        if self.dw is None and self.db is None:
            return
        problem = self.problem
        held = begin + _retained(problem, dz, end - begin)
        parts = [(begin, held)] if held > begin else []
        coef = coef.float()
        unit = None
        if problem.call.hidden.dtype == torch.float16 and end > begin:
            unit = _power_of_two(coef[begin:end].abs().amax())  # products stay in range
            coef = coef / unit
        spare = None
        for first, last in [*parts, *problem.chunks(held, end)]:
            if last <= held:
                z = dz[: held - begin]
            else:
                spare = problem.buffer(end - begin) if spare is None else spare
                z = spare[: last - first]
                problem.product(first, last, z)
                problem.run(problem.kernels.row_logps, z, first, last, True)
            if self.dw is not None:
                self._add_weight(z, problem.scaled(first, last, coef), unit)
            if self.db is not None:
                self._add_bias(z, coef[first:last], unit)
            self.empty = False

    def finished(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dW and db in `dtype`; what was not needed has no elements."""
        found = []
        for total in (self.dw, self.db):
            if total is None:
                total = self.problem.call.weight.new_empty(0)
            elif self.empty:
                total.zero_()
            found.append(total.to(dtype))
        return tuple(found)

    def _add_weight(self, z: Tensor, x: Tensor, unit: Tensor | None) -> None:
        """dW (+)= unit * zᵀ x, in float32 when dW is, a slice of the vocabulary at a time."""
        if unit is None and self.dw.dtype == z.dtype:
            if self.empty:
                torch.mm(z.t(), x, out=self.dw)
            else:
                self.dw.addmm_(z.t(), x)
            return
        for v in range(0, z.shape[1], _ACCUMULATE_COLUMNS):
            part = _matmul_float(z[:, v : v + _ACCUMULATE_COLUMNS].t(), x)
            self._put(self.dw[v : v + _ACCUMULATE_COLUMNS], part, unit)

    def _add_bias(self, z: Tensor, coef: Tensor, unit: Tensor | None) -> None:
        """db (+)= unit * zᵀ coef in float32, a slice of the vocabulary at a time."""
        for v in range(0, z.shape[1], _BIAS_COLUMNS):
            columns = z[:, v : v + _BIAS_COLUMNS].float()
            if on_host(z):  # BLAS adds a column's terms one after another: keep those runs short
                pairs = zip(coef.split(128), columns.split(128), strict=True)
                part = torch.stack([c @ rows for c, rows in pairs]).sum(0)
            else:
                part = coef @ columns
            self._put(self.db[v : v + _BIAS_COLUMNS], part, unit)

    def _put(self, slot: Tensor, part: Tensor, unit: Tensor | None) -> None:
        part = part if unit is None else part * unit
        if self.empty:
            slot.copy_(part)
        else:
            slot.add_(part)


def recomputed(
    problem: Problem,
    norm: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    dh: Tensor | None,
    head: HeadGradient,
) -> None:
    """Fill dh [N, D] and `head` with gradients of Σ (grad_logp log p + grad_entropy H).

    norm: [3, M]; grad_logp, grad_entropy: [M] float32. Each row is divided by a power of two near
    the larger of its gradients, so that float16 neither overflows nor loses small ones; the power
    is multiplied back where coefficients are.
    """
    unit = _power_of_two(torch.maximum(grad_logp.abs(), grad_entropy.abs()))
    of_logp, of_entropy = (grad_logp / unit).contiguous(), (grad_entropy / unit).contiguous()
    unit = unit.masked_fill(problem.labels == problem.call.ignore_index, 0.0)
    hidden, buffer = problem.call.hidden, problem.buffer(problem.rows)
    dx = None if dh is None else hidden.new_empty(problem.rows, hidden.shape[1])
    for first, last in problem.chunks(0, problem.rows):
        dz = buffer[: last - first]
        problem.product(first, last, dz)
        of_chunk = (t[..., first:last] for t in (norm, of_logp, of_entropy))
        problem.run(problem.kernels.row_stats_backward, dz, first, last, *of_chunk)
        if dx is not None:
            torch.mm(dz, problem.call.weight, out=dx[first:last])
        head.add(unit, dz, first, last)
    if dx is not None:
        hidden_gradient(problem, unit, dx, dh)


def _power_of_two(size: Tensor) -> Tensor:
    """Powers of two near `size`, at least it: dividing by them loses no bit."""
    return torch.exp2(torch.ceil(torch.log2(size.clamp(2.0**-100, 2.0**100))))


def _matmul_float(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, kept in the GEMM's own float32 accumulator where the device can."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
