"""Random inputs that look like life: peaked or flat logits, uneven lengths, rows that do not count.

A batch has S responses of T rows each: the prompt's (label -100), the response's, padding (-100).
Responses have between half and all of what the prompt leaves; with a prompt share of 0 every row
counts. With a length spread, their lengths are log-normal instead and add up to N without padding.

Peaked ("zipf") logits: a token's frequency falls as its rank^-1.1, which a head stores along one
direction of its rows; context adds normal noise of deviation 1.5, and a label's logit is raised by
2 to 10, so that labels are about as likely as a model's own text is to the model. Flat logits are
normal noise of deviation 0.5, with labels drawn evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCES = 8
KINDS = ("zipf", "flat")
PROMPT_SHARE = 0.25
IGNORED = -100


class Case(NamedTuple):
    """A shape and the kind of its inputs: rows N, hidden size D, vocabulary V, responses S.

    `spread` is the deviation of the logarithm of a response's length, prompt included, and N then
    counts no padding; without it N = S T counts all rows.
    """

    rows: int
    dim: int
    vocab: int
    inputs: str = "zipf"
    prompt: float = PROMPT_SHARE
    softcap: float | None = None
    spread: float | None = None
    responses: int = SEQUENCES

    def title(self, group: str) -> str:
        name = f"N={self.rows} V={self.vocab}"
        if not group.startswith("logits"):
            name += f" D={self.dim}"
        name += f" softcap={self.softcap:g}" if self.softcap else ""
        if self.spread is not None:
            name += f" responses={self.responses} prompt={self.prompt:g} spread={self.spread:g}"
        return name


@dataclass
class Inputs:
    """hidden [S, T, D] and weight [V, D], or logits [S, T, V]; labels [S, T]; ref, win [S].

    Packed: hidden [N, D] and labels [N], of which response s has rows bounds[s] to bounds[s + 1].
    `host_labels` are the same labels on the CPU, as a trainer has them. `ends` [S], of cases with a
    length spread: rows of a response before its padding. `what` describes the rows.
    """

    labels: Tensor
    ref: Tensor
    win: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    host_labels: Tensor | None = None
    ends: Tensor | None = None
    bounds: Tensor | None = None
    softcap: float | None = None
    what: str = ""

    def leaves(self) -> list[Tensor]:
        found = (self.hidden, self.weight, self.logits)
        return [t for t in found if t is not None and t.requires_grad]

    @property
    def counted(self) -> Tensor:
        """[N] whether a flattened row has a label."""
        return self.labels.reshape(-1) != IGNORED

    @property
    def count(self) -> int:
        """Rows that have a label."""
        return int((self.host_labels != IGNORED).sum())

    def packed(self) -> Inputs:
        """The same rows without padding, the head the same leaf."""
        real = torch.arange(self.labels.shape[1]) < self.ends[:, None]
        there = real.to(self.labels.device)
        return replace(
            self,
            labels=self.labels[there],
            host_labels=self.host_labels[real],
            hidden=self.hidden.detach()[there].requires_grad_(self.hidden.requires_grad),
            bounds=torch.cat([self.ends.new_zeros(1), self.ends]).cumsum(0),
        )


def lengths(case: Case) -> Tensor:
    """[S] rows of each response: quantiles of a log-normal distribution, their sum exactly N."""
    s = case.responses
    quantile = torch.erfinv(2 * (torch.arange(s, dtype=torch.float64) + 0.5) / s - 1) * 2**0.5
    share = (case.spread * quantile).exp()
    ends = (share.cumsum(0) / share.sum() * (case.rows - s)).round().long()
    return ends.diff(prepend=ends.new_zeros(1)) + 1


def random_labels(
    case: Case, frequency: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels [S, T] on the CPU: prompt, response, padding; and where the padding begins [S]."""
    s = case.responses
    if case.rows < s:
        raise ValueError(f"rows: expected at least {s} for {s} responses, got {case.rows}")
    if case.spread is None:
        steps = case.rows // s
        start = torch.full((s,), int(case.prompt * steps))
        room = steps - int(start[0])
        ends = torch.full((s,), steps)
        if case.prompt > 0:
            ends = start + torch.randint(-(-room // 2), room + 1, (s,), generator=generator)
            ends[int(torch.randint(s, (), generator=generator))] = steps
    else:
        ends = lengths(case)
        start, steps = (case.prompt * ends).long().minimum(ends - 1), int(ends.max())
    if frequency is None:
        labels = torch.randint(case.vocab, (s, steps), generator=generator)
    else:
        weights = frequency.double().exp()
        labels = torch.multinomial(weights, s * steps, replacement=True, generator=generator)
        labels = labels.view(s, steps)
    at = torch.arange(steps)
    labels[(at < start[:, None]) | (at >= ends[:, None])] = IGNORED
    return labels, ends


def token_frequencies(vocab: int, generator: torch.Generator) -> Tensor:
    """[V] logarithms of Zipf's law, tokens in a random order; float32 on the CPU."""
    ranks = torch.arange(1, vocab + 1, dtype=torch.float32)
    return (-1.1 * ranks.log())[torch.randperm(vocab, generator=generator)]


def make_inputs(
    kind: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int | None = None
) -> Inputs:
    """Inputs of a case: kind "linear" (hidden and weight) or "logits".

    The same case gives the same labels everywhere, and the same values on one device.
    """
    if case.inputs not in KINDS:
        raise ValueError(f"inputs: expected one of {KINDS}, got {case.inputs!r}")
    if not 0 <= case.prompt < 1:
        raise ValueError(f"prompt: expected a share in [0, 1), got {case.prompt}")
    seed = case.rows + case.dim + case.vocab if seed is None else seed
    host = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    frequency = token_frequencies(case.vocab, host) if case.inputs == "zipf" else None
    labels, ends = random_labels(case, frequency, host)
    counts = (labels != IGNORED).sum(-1)
    nats = 2.5 if frequency is not None else math.log(case.vocab)
    ref = -nats * counts + counts.sqrt() * torch.randn(case.responses, generator=host)
    win = torch.rand(case.responses, generator=host)
    raised = 2 + 8 * torch.rand(labels.shape, generator=host)
    found = Inputs(
        labels.to(device), ref.float().to(device), win.to(device), host_labels=labels,
        ends=None if case.spread is None else ends, softcap=case.softcap,
        what=describe(case, counts),
    )  # fmt: skip
    targets = found.labels.clamp_min(0)
    deviation = 0.5 if frequency is None else 1.5
    if kind == "logits":
        out = torch.randn(*labels.shape, case.vocab, device=device, dtype=dtype).mul_(deviation)
        if frequency is not None:
            out.add_(frequency.to(device, dtype))
            out.scatter_add_(-1, targets[..., None], raised.to(device, dtype)[..., None])
        found.logits = out.requires_grad_()
        return found
    hidden = torch.randn(*labels.shape, case.dim, device=device, dtype=dtype)
    weight = torch.randn(case.vocab, case.dim, device=device, dtype=dtype)
    weight.mul_(deviation / case.dim**0.5)
    if frequency is not None:
        common = torch.nn.functional.normalize(torch.randn(case.dim, device=device), dim=0)
        strength = case.dim**0.5 / 2
        along = frequency.to(device) / strength
        weight.addr_(along.to(dtype), common.to(dtype))
        hidden.add_(strength * common.to(dtype))
        rows = weight[targets].float()  # [S, T, D]
        raised = raised.to(device)[..., None] / rows.square().sum(-1, keepdim=True)
        hidden.add_((raised * rows).to(dtype))
    found.hidden, found.weight = hidden.requires_grad_(), weight.requires_grad_()
    return found


def describe(case: Case, counts: Tensor) -> str:
    total, rows = int(counts.sum()), case.rows
    rows -= rows % case.responses if case.spread is None else 0
    if case.prompt == 0:
        return f"{case.inputs}, all {rows} rows count"
    return (
        f"{case.inputs}, {total} of {rows} rows count (prompts {case.prompt:.0%}, responses of "
        f"{int(counts.min())} to {int(counts.max())})"
    )


def prepare(group: str, inputs: Inputs) -> Inputs:
    """Ask for the gradients that the group has, and no others; old gradients go."""
    for name in ("hidden", "weight", "logits"):
        leaf = getattr(inputs, name)
        if leaf is not None:
            leaf.grad = None
            frozen = group.endswith("forward") or (group == "frozen" and name == "weight")
            leaf.requires_grad_(not frozen)
    return inputs


def clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves():
        leaf.grad = None
