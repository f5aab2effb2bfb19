"""What a scaling sweep measures at one point: inputs, providers, ceilings, and the gate.

A point is S responses of log-normal lengths, N rows in all, of which each response's first rows are
its prompt's and have no label. Ours gets them packed; eager PyTorch gets them padded to the longest
response, as a trainer without packing would hold them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import sppo_kernels as sk
from benchmarks.harness import Refused
from sppo_kernels.testing import relative_error

ETA = 1000.0
IGNORED = -100
GATE_ROWS = 32
# Largest relative error of the loss and its gradients against float64: a few roundings.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Point:
    """Where a sweep stands: rows, hidden size, vocabulary, prompt share, length spread, responses.

    `spread` is the deviation of the logarithm of a response's length.
    """

    rows: int
    dim: int
    vocab: int
    prompt: float = 0.0
    spread: float = 0.0
    responses: int = 8


@dataclass
class Batch:
    """Inputs of a point: packed [N, ...] and padded [S, T, ...], the same rows in both."""

    hidden: Tensor  # [N, D], a leaf
    padded: Tensor  # [S, T, D], a leaf
    weight: Tensor  # [V, D], a leaf
    labels: Tensor  # [N], on the host, as a trainer has them
    labels_padded: Tensor  # [S, T], on the device
    bounds: Tensor  # [S + 1], on the host
    at: Tensor  # [N] where a packed row is among the padded ones
    ref: Tensor  # [S]
    win: Tensor  # [S]

    @property
    def counted(self) -> int:
        return int((self.labels != IGNORED).sum())

    def clear(self) -> None:
        for leaf in (self.hidden, self.padded, self.weight):
            leaf.grad = None


def lengths(point: Point) -> list[int]:
    """Rows of each response: quantiles of a log-normal distribution, their sum exactly N.

    Raises:
        ValueError: fewer rows than responses.
    """
    s = point.responses
    if point.rows < s:
        raise ValueError(f"rows: expected at least {s} for {s} responses, got {point.rows}")
    quantile = torch.erfinv(2 * (torch.arange(s, dtype=torch.float64) + 0.5) / s - 1) * 2**0.5
    share = (point.spread * quantile).exp()
    ends = (share.cumsum(0) / share.sum() * (point.rows - s)).round().long().tolist()
    return [b - a + 1 for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def make(point: Point, dtype: torch.dtype, device: torch.device, seed: int) -> Batch:
    """Random inputs: the head's rows follow Zipf's law along one direction, noise around it."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sizes = lengths(point)
    longest = max(sizes)
    labels = torch.randint(0, point.vocab, (point.rows,), generator=generator)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    at = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(sizes)])
    for start, n in zip(bounds.tolist(), sizes, strict=False):
        labels[start : start + min(n - 1, int(point.prompt * n))] = IGNORED
    padded_labels = torch.full((len(sizes) * longest,), IGNORED)
    padded_labels[at] = labels
    weight = torch.randn(point.vocab, point.dim, dtype=dtype, device=device)
    weight.mul_(1.5 / point.dim**0.5)
    common = F.normalize(torch.randn(point.dim, device=device), dim=0)
    ranks = torch.arange(1, point.vocab + 1, device=device).float()
    frequency = -1.1 * ranks.log()[torch.randperm(point.vocab, generator=generator).to(device)]
    strength = point.dim**0.5 / 2
    weight.addr_((frequency / strength).to(dtype), common.to(dtype))
    hidden = torch.randn(point.rows, point.dim, dtype=dtype, device=device)
    hidden.add_(strength * common.to(dtype))
    padded = hidden.new_zeros(len(sizes) * longest, point.dim)
    padded[at.to(device)] = hidden
    counts = torch.tensor([(labels[a:b] != IGNORED).sum() for a, b in _pairs(bounds)])
    noise = torch.randn(len(sizes), generator=generator)
    return Batch(
        hidden.requires_grad_(),
        padded.view(len(sizes), longest, point.dim).requires_grad_(),
        weight.requires_grad_(),
        labels,
        padded_labels.view(len(sizes), longest).to(device),
        bounds,
        at.to(device),
        (-math.log(point.vocab) * counts + counts.sqrt() * noise).float().to(device),
        torch.rand(len(sizes), generator=generator).to(device),
    )


def _pairs(bounds: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds.tolist()))


def ours(batch: Batch, impl: str) -> Tensor:
    return sk.fused_linear_sppo_loss(
        batch.hidden, batch.weight, batch.labels, batch.ref, batch.win,
        cu_seqlens=batch.bounds, eta=ETA, impl=impl,
    ).loss  # fmt: skip


def eager(batch: Batch) -> Tensor:
    """Logits and log_softmax of every padded row, gather, sum over rows that have a label."""
    labels = batch.labels_padded
    logp = F.log_softmax(F.linear(batch.padded, batch.weight), -1)
    logp = logp.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    logps = (logp.float() * (labels != IGNORED)).sum(-1)
    return sk.sppo_loss(logps, batch.ref, batch.win, eta=ETA)


def trl(batch: Batch) -> Tensor:
    """TRL's chunked head over the rows that count, as its trainer takes them out; our loss."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    device = batch.hidden.device
    keep = (batch.labels != IGNORED).nonzero().squeeze(-1)
    rows = batch.hidden.index_select(0, keep.to(device))
    labels = batch.labels[keep].to(device)
    logp, *_ = ChunkedLogProbFunction.apply(
        rows, batch.weight, None, labels, 1.0, 32768, None, 1.0, ()
    )
    sequence = torch.bucketize(keep, batch.bounds[1:], right=True).to(device)
    logps = logp.new_zeros(len(batch.ref), dtype=torch.float32)
    logps = logps.index_add(0, sequence, logp.float())
    return sk.sppo_loss(logps, batch.ref, batch.win, eta=ETA)


def losses(device: torch.device, peers: bool) -> dict[str, Callable[[Batch], Tensor]]:
    """Providers by name, ours first."""
    impl = "triton" if device.type == "cuda" else "native"
    found = {f"sppo-kernels {impl}": lambda b: ours(b, impl), "eager": eager}
    if peers:
        found["TRL chunked"] = trl
    return found


def gemms(batch: Batch) -> Callable[[], object]:
    """The bare products over the rows that count: X Wᵀ, dZ W, dZᵀ X."""
    device = batch.hidden.device
    rows = batch.hidden.detach()[(batch.labels != IGNORED).to(device)]
    weight = batch.weight.detach()
    dz = torch.randn(rows.shape[0], weight.shape[0], device=device, dtype=rows.dtype)

    def run() -> None:
        torch.mm(rows, weight.t())
        torch.mm(dz, weight)
        torch.mm(dz.t(), rows)

    return run


def step(loss: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], object]:
    """The loss and its backward."""

    def run() -> None:
        batch.clear()
        loss(batch).backward()

    return run


def flops(provider: str, batch: Batch) -> float:
    """Operations of the products: eager computes padding and prompts too, the others do not."""
    vocab, dim = batch.weight.shape
    rows = batch.labels_padded.numel() if provider == "eager" else batch.counted
    return 6.0 * rows * dim * vocab


def gate(
    loss: Callable[[Batch], Tensor],
    point: Point,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> float:
    """Relative error of loss and gradients against float64, at the point with few rows.

    Raises:
        Refused: it is above GATE[dtype], or NaN.
    """
    few = replace(point, rows=max(point.responses, min(GATE_ROWS, point.rows)))
    batch = make(few, dtype, device, seed)
    hidden, weight = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight))
    labels = batch.labels.to(device)
    logp = F.log_softmax(hidden @ weight.mT, -1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    logp = logp * (labels != IGNORED)
    logps = torch.stack([logp[a:b].sum() for a, b in _pairs(batch.bounds)])
    truth = (logps - batch.ref.double() - ETA * (batch.win.double() - 0.5)).square().mean()
    truth.backward()
    value = loss(batch)
    value.backward()
    rows = batch.hidden.grad
    if rows is None:
        rows = batch.padded.grad.reshape(-1, point.dim)[batch.at]
    found = ((value, truth), (rows, hidden.grad), (batch.weight.grad, weight.grad))
    errors = [relative_error(a, b) for a, b in found]
    if not all(error <= GATE[dtype] for error in errors):
        raise Refused(f"wrong by {max(errors):.1e}, more than {GATE[dtype]:.0e}")
    return max(errors)


def random_games(games: int, k: int, seed: int) -> Tensor:
    """[games, K, K] float64 probabilities with P_ij + P_ji = 1."""
    generator = torch.Generator().manual_seed(seed)
    return sk.symmetrize(2 * torch.randn(games, k, k, generator=generator, dtype=torch.float64))


def game_gate(name: str, games: Tensor, impl: str) -> float:
    """Error of win rates against the mean over opponents, exploitability of equilibria.

    Raises:
        Refused: above 1e-10.
    """
    k = games.shape[-1]
    if name == "win_rates":
        others = games * (1 - torch.eye(k, dtype=games.dtype, device=games.device))
        want = others.sum(-1) / (k - 1)
        error = float((sk.win_rates(games, impl=impl) - want).abs().max())
    else:
        strategy = sk.nash(games, impl=impl).strategy
        # Against the mixture x, response i wins (P x)_i: none may win more than half.
        gain = (games @ strategy[..., None]).amax() - 0.5
        error = max(float(gain), float((strategy.sum(-1) - 1).abs().max()))
    if not error <= 1e-10:
        raise Refused(f"wrong by {error:.1e}, more than 1e-10")
    return error


def game_step(name: str, games: Tensor, impl: str) -> Callable[[], object]:
    function = {"nash": sk.nash, "win_rates": sk.win_rates}[name]
    return lambda: function(games, impl=impl)
