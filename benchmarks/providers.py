"""What is compared, in one table: this package, eager PyTorch, torch.compile, and the peers.

Every provider takes `Inputs` and returns a loss; its backward leaves gradients in the inputs'
leaves. `task` says which loss it can compute (benchmarks/truth.py): most the SPPO loss with soft
win rates, some peers only hard labels or a plain cross-entropy, and their gate asks for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sppo_kernels as sk
from benchmarks import peers
from benchmarks.inputs import Case, Inputs
from benchmarks.rows import GROUPS, LOGITS, OURS
from benchmarks.truth import ETA
from sppo_kernels.backend import triton_interpreted, unavailable

LINEAR = GROUPS[:3]
Loss = Callable[[Inputs], Tensor]
Reason = Callable[[Case, torch.dtype, torch.device], "str | None"]


def runs(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The reason of a provider that runs everything."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss.

    why_not: the reason why it cannot run a case, or None. inplace: it overwrites the logits, so it
    is timed on a copy of its own. packs: it takes rows without padding, where a case can have them.
    includes: what a reader must know that the name does not say. compiles: its first call compiles.
    """

    name: str
    loss: Loss
    groups: tuple[str, ...] = LINEAR
    task: str = "sppo"
    why_not: Reason = runs
    includes: str = ""
    inplace: bool = False
    packs: bool = False
    compiles: bool = False


def fast_impl(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "native"


def ours_linear(inputs: Inputs, impl: str) -> Tensor:
    return sk.fused_linear_sppo_loss(
        inputs.hidden, inputs.weight, inputs.host_labels, inputs.ref, inputs.win,
        cu_seqlens=inputs.bounds, eta=ETA, softcap=inputs.softcap, impl=impl,
    ).loss  # fmt: skip


def ours_logits(inputs: Inputs, impl: str, inplace: bool = False) -> Tensor:
    return sk.fused_sppo_loss(
        inputs.logits, inputs.labels, inputs.ref, inputs.win, eta=ETA, impl=impl,
        inplace_backward=inplace,
    ).loss  # fmt: skip


def head(inputs: Inputs) -> Tensor:
    """Logits of all rows, in the dtype of the inputs."""
    logits = F.linear(inputs.hidden, inputs.weight)
    if inputs.softcap:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return logits


def eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax of all logits, gather, and a sum over the rows that count."""
    logp = F.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return (logp.float() * (labels >= 0)).sum(-1)


def eager(inputs: Inputs, float32: bool = False) -> Tensor:
    """All logits; with `float32` upcast, as Hugging Face losses do, for log-probs as precise."""
    logits = head(inputs) if inputs.logits is None else inputs.logits
    logps = eager_logps(logits.float() if float32 else logits, inputs.labels)
    return sk.sppo_loss(logps, inputs.ref, inputs.win, eta=ETA)


def released_sppo(inputs: Inputs) -> Tensor:
    """The step of the released SPPO trainer: the reference's logits too, every time.

    Full logits and log_softmax of policy and reference, in float32 as mixed precision leaves them.
    The reference is at the policy's point here, as in the first step of a round of self-play.
    """
    with torch.no_grad():
        ref = eager_logps(head(inputs).float(), inputs.labels)
    logps = eager_logps(head(inputs).float(), inputs.labels)
    return (logps - ref - ETA * (inputs.win - 0.5)).square().mean()


@functools.cache
def compiled() -> Loss:
    # Shapes are static, so that a second shape does not turn the first's code into a slower one.
    return torch.compile(eager, dynamic=False)


def own(impl: str) -> Reason:
    def reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
        if impl == "triton" and device.type == "cpu" and triton_interpreted():
            return "it is interpreted here, which says nothing about its time"
        return unavailable(impl, device.type, dtype)

    return reason


def ours(impl: str) -> list[Provider]:
    """Our providers with one implementation."""
    name, reason = f"{OURS} {impl}", own(impl)
    logits = functools.partial(ours_logits, impl=impl)
    found = [
        Provider(
            name, functools.partial(ours_linear, impl=impl), LINEAR, why_not=reason, packs=True
        ),
        Provider(name, logits, LOGITS, why_not=reason),
    ]
    if impl != "reference":
        place = functools.partial(logits, inplace=True)
        found.append(
            Provider(f"{name}, in place", place, ("logits",), why_not=reason, inplace=True)
        )
    return found


def table() -> tuple[Provider, ...]:
    """All providers, the most important first."""
    upcast = functools.partial(eager, float32=True)
    return (
        *ours("native"),
        *ours("triton"),
        Provider("eager", eager, GROUPS),
        Provider("torch.compile", lambda i: compiled()(i), GROUPS, compiles=True),
        Provider("eager, float32 log-probs", upcast, GROUPS),
        Provider(
            "TRL chunked", peers.trl_linear, why_not=peers.needs("trl"),
            includes="the rows that count are taken out, as its trainer does",
        ),
        Provider(
            "Liger sppo_hard", peers.liger_linear, task="hard", why_not=peers.liger_reason,
            includes="hard labels, no reference; compiled, its default", compiles=True,
        ),
        Provider(
            "Apple CCE", peers.cce_linear, why_not=peers.needs("cut_cross_entropy"),
            includes="on the CPU its torch_compile implementation", compiles=True,
        ),
        Provider(
            "F.linear_cross_entropy", peers.torch_linear, why_not=peers.torch_reason,
            includes="chunked by its default options, reduction none",
        ),
        Provider(
            "released SPPO", released_sppo, ("trainable",), task="on-policy",
            includes="the reference's forward, every step",
        ),
        Provider(
            "F.linear_cross_entropy, sum", peers.torch_sum, ("trainable",), task="cross-entropy",
            why_not=peers.torch_reason, includes="a plain cross-entropy, not a loss of sums",
        ),
        Provider(
            "QuACK cross-entropy", peers.quack_sum, ("trainable", "frozen"), task="cross-entropy",
            why_not=peers.quack_reason, includes="a plain cross-entropy, not a loss of sums",
        ),
        *ours("reference"),
    )  # fmt: skip


def of_group(group: str) -> list[Provider]:
    """The table's rows of a group, names unique."""
    return [p for p in table() if group in p.groups]


def ceiling_name(group: str) -> str:
    return "copy of the logits" if group in LOGITS else f"bare GEMMs ({products(group)})"


def products(group: str) -> int:
    """Matrix products that a hidden-in group cannot do without."""
    return {"trainable": 3, "frozen": 2, "forward": 1}[group]


def ceiling(group: str, inputs: Inputs) -> Callable[[], object]:
    """What bounds a group: a copy of the logits on the device, or the bare products of the head.

    These are X Wᵀ, dZ W, dZᵀ X over the rows that count, as many of them as the group needs.
    """
    if group in LOGITS:
        return lambda: inputs.logits.detach().clone()
    hidden = inputs.hidden.detach().reshape(-1, inputs.hidden.shape[-1])[inputs.counted]
    weight, parts = inputs.weight.detach(), products(group)
    dz = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)

    def run() -> None:
        torch.mm(hidden, weight.t())
        if parts > 1:
            torch.mm(dz, weight)
        if parts > 2:
            torch.mm(dz.t(), hidden)

    return run


def counted(group: str, inputs: Inputs) -> tuple[float | None, float | None]:
    """Flops of the products, or bytes of logits that must move, of one step.

    Hidden-in: 2 L D V for each product, L the rows that count. Logits-in: the rows that count are
    read once, and in the backward read once more while a gradient of all rows is written.
    """
    if group in LOGITS:
        row = inputs.logits.shape[-1] * inputs.logits.element_size()
        total, count = inputs.labels.numel(), inputs.count
        rows = count if group.endswith("forward") else 2 * count + total
        return None, float(rows * row)
    vocab, dim = inputs.weight.shape
    return 2.0 * inputs.count * dim * vocab * products(group), None


def ceiling_counted(group: str, inputs: Inputs) -> tuple[float | None, float | None]:
    """The same for the ceiling: a copy reads and writes all logits."""
    if group in LOGITS:
        return None, 2.0 * inputs.logits.numel() * inputs.logits.element_size()
    return counted(group, inputs)
