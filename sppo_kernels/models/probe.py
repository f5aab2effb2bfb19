"""The proof on one batch that a head is what the fused loss computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.logps.linear import linear_token_logps
from sppo_kernels.models.head import Head, HeadProbeError, backbone

__all__ = ["probe_head"]

LOUD = 64.0  # largest logit of the second probe: twice the softcaps in use


@torch.no_grad()
def probe_head(
    lm: nn.Module,
    head: Head,
    inputs: dict[str, Tensor],
    impl: str = "auto",
    *,
    model: nn.Module | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Compare fused log-probs with log_softmax of the model's own logits, on one padded batch.

    Both start from the same hidden states, so only the head is compared; then once more with hidden
    states so large that the largest logit is 64, which shows softcaps at any initialisation.

    Args:
        inputs: input_ids [B, T] and, optionally, attention_mask [B, T] and other inputs.
        model: what is called, `lm` inside its wrappers; None for `lm`.
        through: log-probs [B, T-1] of labels [B, T-1] by the path that will be used, compared too.

    Returns:
        The largest difference of a token's log-probability, in nats.

    Raises:
        HeadProbeError: it is larger than rounding explains; the message says where and by how much.
    """
    mask = inputs.get("attention_mask")
    labels = inputs["input_ids"][:, 1:]
    if mask is not None and mask.shape == inputs["input_ids"].shape:
        labels = labels.masked_fill(mask[:, 1:] == 0, -100)
    model = lm if model is None else model
    seen = _run(lm, head, inputs, model, 1.0)
    worst = _compare(lm, head, seen, labels, impl)
    if through is not None:
        _agree(lm, head, through(labels), seen, labels, 4.0, "the model called for its hidden")
    loudest = float(seen.raw.abs().max())
    if 0 < loudest < LOUD:
        loud = _run(lm, head, inputs, model, min(LOUD / loudest, 1e4))
        _compare(lm, head, loud, labels, impl)
    return worst


@dataclass
class _Seen:
    hidden: Tensor  # [B, T, D], what the base model gave
    logits: Tensor  # [B, T, V], the model's own
    raw: Tensor  # [B, T, V], of the bare matrix
    head_in: Tensor | None  # what the head's layer was given
    head_out: Tensor | None
    weights: tuple[Tensor, Tensor | None]
    autocast: torch.dtype | None  # what the model itself ran under


def _run(lm: nn.Module, head: Head, inputs: dict, model: nn.Module, factor: float) -> _Seen:
    captured: list[Tensor] = []
    through_head: list[tuple[Tensor, Tensor]] = []
    weights: list[tuple[Tensor, Tensor | None]] = []
    casts: list[torch.dtype | None] = []

    def scale(_module: nn.Module, _args: Any, out: Any) -> Any:
        captured.append(out[0] * factor if factor != 1 else out[0])
        weights.append(head.parameters())  # here, where sharded weights are whole
        device = out[0].device.type
        on = torch.is_autocast_enabled(device)
        casts.append(torch.get_autocast_dtype(device) if on else None)
        if factor == 1:
            return None
        if isinstance(out, tuple):
            return (captured[-1], *out[1:])
        out["last_hidden_state"] = captured[-1]
        return out

    def watch(_module: nn.Module, args: Any, out: Any) -> None:
        if args and isinstance(out, Tensor):
            through_head.append((args[0], out))

    hooks = [
        backbone(lm).register_forward_hook(scale),
        head.layer.register_forward_hook(watch),
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # graphs know nothing of these hooks
            logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(captured) != 1 or captured[0].shape[:2] != inputs["input_ids"].shape:
        raise HeadProbeError(f"{type(lm).__name__} does not feed its base model's output to a head")
    hidden, (weight, bias) = captured[0], weights[0]
    if weight.shape != (logits.shape[-1], hidden.shape[-1]):
        raise HeadProbeError(
            f"{head.name}: its weight is {tuple(weight.shape)}, but the model maps "
            f"{hidden.shape[-1]} features to {logits.shape[-1]} logits{_extra(head)}"
        )
    raw = hidden.to(weight.device).float() @ weight.float().T
    given = through_head[0] if through_head else (None, None)
    return _Seen(hidden, logits, raw, *given, (weight, bias), casts[0])


def _compare(lm: nn.Module, head: Head, seen: _Seen, labels: Tensor, impl: str) -> float:
    weight, bias = seen.weights
    dtype, device = seen.hidden.dtype, seen.hidden.device
    with torch.autocast(device.type, seen.autocast, enabled=seen.autocast is not None):
        fused = linear_token_logps(
            seen.hidden[:, :-1].to(weight.device),
            weight.to(dtype),
            labels.to(weight.device),
            bias=None if bias is None else bias.to(dtype),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            impl=impl,
        )
    return _agree(lm, head, fused, seen, labels, 1.0, "its head")


def _agree(
    lm: nn.Module, head: Head, fused: Tensor, seen: _Seen, labels: Tensor, slack: float, what: str
) -> float:
    labels = labels.to(seen.logits.device)
    fused = fused.to(seen.logits.device).float()
    logits = seen.logits[:, :-1].float()
    eager = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    gap = (fused - eager).abs().masked_fill(labels == -100, 0)
    worst = float(gap.max())
    # Two roundings of the largest logit, on each side, and of the softmax.
    types = {seen.hidden.dtype, seen.logits.dtype, seen.autocast or seen.hidden.dtype}
    size = max(1.0, float(logits.abs().max()), head.logit_scale * float(seen.raw.abs().max()))
    allowed = slack * (8 * max(torch.finfo(t).eps for t in types) * size + 1e-5)
    if worst <= allowed:
        return worst
    where = tuple(int(x) for x in torch.unravel_index(gap.argmax(), gap.shape))
    raise HeadProbeError(
        f"{type(lm).__name__}: the fused log-probability of the token at {where} is "
        f"{float(fused[where]):.6g}, the model's own {float(eager[where]):.6g} (difference "
        f"{worst:.3g}, rounding explains {allowed:.3g}, comparing {what}); assumed logit_scale="
        f"{head.logit_scale:g}, softcap={head.softcap}, bias={seen.weights[1] is not None}"
        f"{_diagnosis(head, seen)}"
    )


def _diagnosis(head: Head, seen: _Seen) -> str:
    """Which step of the model is not the head's: before it, in it or after it."""
    if seen.head_in is None:
        return f"; the model did not call {head.name}"
    if seen.head_in.shape != seen.hidden.shape or not torch.equal(seen.head_in, seen.hidden):
        return f"; something changes the hidden states before {head.name}{_extra(head)}"
    if seen.head_out.shape != seen.logits.shape or not torch.equal(
        seen.head_out.float(), seen.logits.float()
    ):
        return f"; the model changes the logits after {head.name}"
    return f"; {head.name} is {type(head.layer).__name__} with a forward of its own"


def _extra(head: Head) -> str:
    return f" (extra layers: {', '.join(head.beside)})" if head.beside else ""
