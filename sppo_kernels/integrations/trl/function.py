"""TRL's chunked log-prob function, on our operators: same call, same outputs, same gradients.

TRL's logits are cap·tanh(scale·(h Wᵀ + b)/cap) / T. With scale' = scale/T and cap' = cap/T that is
cap'·tanh(scale'·(h Wᵀ + b)/cap'), so the temperature needs no code of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import sppo_kernels as sk
from sppo_kernels import checks
from sppo_kernels.integrations.trl.versions import Found, Layout, UnsupportedTRLError

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# At most what TRL's own function holds on the CPU: five float32 tiles of 4096 x 32768.
DEFAULT_BUDGET = 2 << 30


@dataclass
class Settings:
    """What `patch` was given; read at every call."""

    memory_budget: int | None = DEFAULT_BUDGET
    impl: str = "auto"
    probe: bool = True


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OPTIONAL,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probs of `targets` and TRL's optional outputs, each [N] or None.

    Args:
        hidden: [N, D]. The work is done in its dtype, or in autocast's where that is on.
        weight, bias: [V, D] and [V] or None, of any float dtype; each gradient is in that dtype.
        targets: [N].
        temperature: above 0; divides the logits, after the soft cap.
        outputs: any of "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".

    Returns:
        log-probs (float32, nats), entropy (differentiable), log_sum_sq_probs, mean_logits (float32)
        and is_top1 (bool); what was not asked for is None.

    Raises:
        TypeError, ValueError: an argument is not what the operators take; quantised and partitioned
            weights are named.
    """
    settings = settings or Settings()
    unknown = set(outputs) - {"log_probs", *OPTIONAL}
    if unknown:
        raise ValueError(f"outputs: expected any of {('log_probs', *OPTIONAL)}, got {unknown}")
    temperature = checks.positive("temperature", temperature)
    weight, bias = dense("weight", weight), None if bias is None else dense("bias", bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    options: dict[str, Any] = {
        "bias": bias,
        "logit_scale": logit_scale / temperature,
        "softcap": None
        if final_logit_softcapping is None
        else final_logit_softcapping / temperature,
        "memory_budget": settings.memory_budget,
        "impl": settings.impl,
    }
    wanted = tuple(name for name in OPTIONAL if name in outputs)
    if not wanted:
        logps = sk.linear_token_logps(hidden, weight, targets, **options)
        return logps, None, None, None, None
    stats = sk.linear_token_stats(hidden, weight, targets, outputs=wanted, **options)
    return stats.logps, *(getattr(stats, name) for name in OPTIONAL)


def dense(name: str, value: Tensor) -> Tensor:
    """`value` when it is an ordinary float tensor that is all here; otherwise an error by name."""
    if isinstance(value, DTensor):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; gather it (full_tensor)")
    if not value.is_floating_point() or value.element_size() < 2:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}: the head "
            "is quantised; leave it out of the quantisation"
        )
    if is_traceable_wrapper_subclass(value):
        raise TypeError(
            f"{name}: expected a plain tensor, got {type(value).__name__}; is it quantised?"
        )
    if hasattr(value, "ds_id"):
        if value.numel() == 0:
            raise ValueError(
                f"{name}: partitioned by ZeRO-3 and not gathered; call within TRL's "
                "maybe_gather_lm_head_ctx"
            )
        # ZeRO-3 empties the parameter after this call; what backward keeps must stay whole.
        value = value.view_as(value)
    return value


class FusedLogProbs:
    """Stands where TRL has its autograd function: `apply` takes what that one's takes."""

    def __init__(self, found: Found, settings: Settings) -> None:
        self.layout: Layout = found.layout
        self.settings = settings
        self.signature = inspect.Signature(
            list(inspect.signature(found.function.forward).parameters.values())[1:]
        )

    def apply(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(zip(self.layout.parameters, bound.arguments.values(), strict=True))
        del given["chunk_size"]  # of the vocabulary; ours are chunks of rows, by memory_budget
        given = {"bias": None, **given, "settings": self.settings}
        if self.layout.outputs == 2:
            return fused_logprobs(**given, outputs=("entropy",))[:2]
        return fused_logprobs(**given)


def prove(found: Found) -> None:
    """Compare both functions, with gradients, on a tiny problem, before anything is replaced.

    TRL 1.15's runs on a GPU only; without one it cannot be compared.

    Raises:
        UnsupportedTRLError: they differ, so TRL's function means something else in this version.
    """
    on_cpu = found.compact is not None or not found.layout.fused_head
    if not (on_cpu or torch.cuda.is_available()):
        return
    device = "cpu" if on_cpu else "cuda"
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (3, 4), "weight": (7, 4), "bias": (7,)}
    values: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device)
        for name, shape in shapes.items()
        if name in found.layout.parameters
    }
    rest = {
        "targets": torch.tensor([0, 6, 3], device=device),
        "temperature": 0.7,
        "chunk_size": 5,
        "final_logit_softcapping": 1.5,
        "logit_scale": 1.3,
        "outputs": ("log_probs", *OPTIONAL),
    }
    results = []
    for function in (found.function, FusedLogProbs(found, Settings())):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        call = {**leaves, **{n: v for n, v in rest.items() if n in found.layout.parameters}}
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            outputs = function.apply(*(call[name] for name in found.layout.parameters))
            outputs[0].square().sum().backward()
        results.append(
            [o.detach().float() for o in outputs] + [leaf.grad for leaf in leaves.values()]
        )
    theirs, ours = results
    if len(theirs) != len(ours):
        raise UnsupportedTRLError(f"TRL {found.version}: {len(theirs)} results, not {len(ours)}")
    for place, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise UnsupportedTRLError(
                f"TRL {found.version}: result {place} of its log-prob function on a test problem "
                f"is {a.flatten()[:3].tolist()}, ours {b.flatten()[:3].tolist()}"
            )
