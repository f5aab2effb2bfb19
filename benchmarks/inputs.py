"""Random inputs that look like life: peaked or flat logits, uneven lengths, rows that do not count.

A batch has eight responses of T rows each: the prompt's (label -100), the response's, padding
(-100). Responses have between half and all of what the prompt leaves. With a prompt share of 0
every row counts.

Peaked ("zipf") logits: a token's frequency falls as its rank^-1.1, which a head stores along one
direction of its rows; context adds normal noise of deviation 1.5, and a label's logit is raised by
2 to 10, so that labels are about as likely as a model's own text is to the model. Flat logits are
normal noise of deviation 0.5, with labels drawn evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCES = 8
KINDS = ("zipf", "flat")
PROMPT_SHARE = 0.25
IGNORED = -100


class Case(NamedTuple):
    """A shape and the kind of its inputs: rows N = 8 T, hidden size D, vocabulary V."""

    rows: int
    dim: int
    vocab: int
    inputs: str = "zipf"
    prompt: float = PROMPT_SHARE
    softcap: float | None = None

    def title(self, group: str) -> str:
        name = f"N={self.rows} V={self.vocab}"
        if not group.startswith("logits"):
            name += f" D={self.dim}"
        return name + (f" softcap={self.softcap:g}" if self.softcap else "")


@dataclass
class Inputs:
    """hidden [S, T, D] and weight [V, D], or logits [S, T, V]; labels [S, T]; ref, win [S].

    `host_labels` are the same labels on the CPU, as a trainer has them. `what` describes the rows.
    """

    labels: Tensor
    ref: Tensor
    win: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    host_labels: Tensor | None = None
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


def random_labels(case: Case, frequency: Tensor | None, generator: torch.Generator) -> Tensor:
    """Labels [S, T] on the CPU: prompt, response of a random length, padding."""
    steps = case.rows // SEQUENCES
    if steps < 1:
        raise ValueError(f"rows: expected at least {SEQUENCES}, got {case.rows}")
    start = int(case.prompt * steps)
    room = steps - start
    lengths = torch.full((SEQUENCES,), room)
    if case.prompt > 0:
        lengths = torch.randint(-(-room // 2), room + 1, (SEQUENCES,), generator=generator)
        lengths[int(torch.randint(SEQUENCES, (), generator=generator))] = room
    if frequency is None:
        labels = torch.randint(case.vocab, (SEQUENCES, steps), generator=generator)
    else:
        weights = frequency.double().exp()
        labels = torch.multinomial(
            weights, SEQUENCES * steps, replacement=True, generator=generator
        ).view(SEQUENCES, steps)
    at = torch.arange(steps)
    labels[(at < start) | (at >= start + lengths[:, None])] = IGNORED
    return labels


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
    labels = random_labels(case, frequency, host)
    counts = (labels != IGNORED).sum(-1)
    nats = 2.5 if frequency is not None else math.log(case.vocab)
    ref = -nats * counts + counts.sqrt() * torch.randn(SEQUENCES, generator=host)
    win = torch.rand(SEQUENCES, generator=host)
    raised = 2 + 8 * torch.rand(labels.shape, generator=host)
    found = Inputs(
        labels.to(device), ref.float().to(device), win.to(device), host_labels=labels,
        softcap=case.softcap, what=describe(case, counts),
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
    total, rows = int(counts.sum()), SEQUENCES * (case.rows // SEQUENCES)
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
