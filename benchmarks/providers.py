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
from benchmarks.inputs import Case, Inputs, clear, make_inputs, prepare
from benchmarks.rows import OURS
from benchmarks.truth import ETA
from sppo_kernels.backend import triton_interpreted, unavailable

__all__ = ["Case", "Inputs", "Provider", "clear", "fast_impl", "make_inputs", "prepare", "table"]

GROUPS = ("trainable", "frozen", "forward", "logits", "logits-forward")
LINEAR, LOGITS = GROUPS[:3], GROUPS[3:]
Loss = Callable[[Inputs], Tensor]
Reason = Callable[[Case, torch.dtype, torch.device], "str | None"]


def runs(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The reason of a provider that runs everything."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss.

    why_not: the reason why it cannot run a case, or None. inplace: it overwrites the logits, so it
    is timed on a copy of its own. includes: what a reader must know that the name does not say.
    compiles: its first call compiles.
    """

    name: str
    loss: Loss
    groups: tuple[str, ...] = LINEAR
    task: str = "sppo"
    why_not: Reason = runs
    includes: str = ""
    inplace: bool = False
    compiles: bool = False


def fast_impl(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "native"


def ours_linear(inputs: Inputs, impl: str) -> Tensor:
    return sk.fused_linear_sppo_loss(
        inputs.hidden, inputs.weight, inputs.host_labels, inputs.ref, inputs.win, eta=ETA,
        softcap=inputs.softcap, impl=impl,
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


def eager_loss(logits: Tensor, inputs: Inputs) -> Tensor:
    return sk.sppo_loss(eager_logps(logits, inputs.labels), inputs.ref, inputs.win, eta=ETA)


def eager_linear(inputs: Inputs) -> Tensor:
    return eager_loss(head(inputs), inputs)


def eager_float_linear(inputs: Inputs) -> Tensor:
    """As Hugging Face losses do: the logits upcast, so that log-probs have float32 precision."""
    return eager_loss(head(inputs).float(), inputs)


def eager_logits(inputs: Inputs) -> Tensor:
    return eager_loss(inputs.logits, inputs)


def eager_float_logits(inputs: Inputs) -> Tensor:
    return eager_loss(inputs.logits.float(), inputs)


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
def compiled(function: Loss) -> Loss:
    # Shapes are static, so that a second shape does not turn the first's code into a slower one.
    return torch.compile(function, dynamic=False)


def own(impl: str) -> Reason:
    def reason(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
        if impl == "triton" and device.type == "cpu" and triton_interpreted():
            return "it is interpreted here, which says nothing about its time"
        return unavailable(impl, device.type, dtype)

    return reason


def table() -> tuple[Provider, ...]:
    """All providers, the most important first."""
    ours = []
    for impl in ("native", "triton", "reference"):
        name, reason = f"{OURS} {impl}", own(impl)
        ours.append(
            Provider(name, functools.partial(ours_linear, impl=impl), LINEAR, why_not=reason)
        )
        ours.append(
            Provider(name, functools.partial(ours_logits, impl=impl), LOGITS, why_not=reason)
        )
        if impl != "reference":
            loss = functools.partial(ours_logits, impl=impl, inplace=True)
            place = f"{name}, in place"
            ours.append(Provider(place, loss, ("logits",), why_not=reason, inplace=True))
    fast = [p for p in ours if not p.name.endswith("reference")]
    reference = [p for p in ours if p.name.endswith("reference")]
    return (
        *fast,
        Provider("eager", eager_linear),
        Provider("eager", eager_logits, LOGITS),
        Provider("torch.compile", lambda i: compiled(eager_linear)(i), compiles=True),
        Provider("torch.compile", lambda i: compiled(eager_logits)(i), LOGITS, compiles=True),
        Provider("eager, float32 log-probs", eager_float_linear),
        Provider("eager, float32 log-probs", eager_float_logits, LOGITS),
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
        *reference,
    )  # fmt: skip


def of_group(group: str) -> list[Provider]:
    """The table's rows of a group, names unique."""
    return [p for p in table() if group in p.groups]


def ceiling_name(group: str) -> str:
    return "copy of the logits" if group in LOGITS else f"bare GEMMs ({products(group)})"


def products(group: str) -> int:
    """Matrix products that a hidden-in group cannot do without."""
    return {"trainable": 3, "frozen": 2, "forward": 1}[group]


def gemms(inputs: Inputs, parts: int) -> Callable[[], object]:
    """The bare products of the head over the rows that count: X Wᵀ, dZ W, dZᵀ X (`parts` first)."""
    hidden = inputs.hidden.detach().reshape(-1, inputs.hidden.shape[-1])[inputs.counted]
    weight = inputs.weight.detach()
    dz = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)

    def run() -> None:
        torch.mm(hidden, weight.t())
        if parts > 1:
            torch.mm(dz, weight)
        if parts > 2:
            torch.mm(dz.t(), hidden)

    return run


def ceiling(group: str, inputs: Inputs) -> Callable[[], object]:
    """What bounds a group: the bare products, or a copy of the logits on the device."""
    if group in LOGITS:
        return lambda: inputs.logits.detach().clone()
    return gemms(inputs, products(group))


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
