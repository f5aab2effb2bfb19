"""Guard of TRL's fused head: it multiplies by `lm_head.weight`, whatever the model really does.

Heads that are more than that are refused by name, LoRA on the head is merged into the product, and
the first fused call of a model is compared with the model's own logits.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.integrations.trl.function import Settings, dense
from sppo_kernels.models.head import Head, HeadProbeError

__all__ = ["HeadProbeError", "check_layer", "effective_head", "guarded"]

# Transforms of the logits that TRL's head does not read, by the config's name for them.
UNREAD = ("logits_soft_cap",)
PROBE_TOKENS = 16


def guarded(add_head: Callable, settings: Callable[[], Settings | None]) -> Callable:
    """TRL's `add_fused_lm_head`, after which the model's fused calls are checked.

    Args:
        settings: gives those of the patch now in place; None: the guard lets everything through.
    """

    @functools.wraps(add_head)
    def add_fused_lm_head(model: nn.Module, temperature: float = 1.0, *args: Any, **kwargs: Any):
        refuse_known(model)
        result = add_head(model, temperature, *args, **kwargs)
        _install(model, temperature, settings)
        return result

    return add_fused_lm_head


def refuse_known(model: nn.Module) -> None:
    """Refuse a model by its config and by the kind of its head, before any step is made."""
    name, config = type(model).__name__, model.config.get_text_config()
    for attribute in UNREAD:
        if getattr(config, attribute, None) is not None:
            raise HeadProbeError(
                f"{name}: config.{attribute} = {getattr(config, attribute)} acts on the logits, "
                "and TRL's fused head does not apply it"
            )
    check_layer(name, model.get_output_embeddings())


def check_layer(name: str, layer: nn.Module | None) -> None:
    """Refuse a head that is not a float matrix, plain or with LoRA that can be merged.

    Raises:
        HeadProbeError: naming the model, the layer and what it has.
    """
    if layer is None:
        raise HeadProbeError(f"{name} has no output embedding")
    kind = type(layer).__name__
    lora = hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight")
    adapter = type(layer).__module__.startswith("peft.") or hasattr(layer, "base_layer")
    if adapter and not (lora or hasattr(layer, "modules_to_save")):
        raise HeadProbeError(f"{name}: its head is wrapped by a {kind}, which cannot be merged")
    inner = getattr(layer, "base_layer", layer)
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor):
        raise HeadProbeError(f"{name}: its head, a {kind}, has no weight matrix (is it quantised?)")
    if not hasattr(weight, "full_tensor") and not hasattr(weight, "ds_id"):
        try:
            dense("weight", weight)
        except TypeError as error:
            raise HeadProbeError(f"{name}: its head, a {kind}: {error}") from error
    if not lora:
        return
    if hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        raise HeadProbeError(f"{name}: LoRA on a head that is sharded cannot be merged; unshard it")
    extras = {
        "lora_dropout": any(getattr(d, "p", 0) for d in layer.lora_dropout.values()),
        "lora_bias": any(getattr(layer, "lora_bias", {}).values()),
        "a LoRA variant (DoRA, ...)": bool(getattr(layer, "lora_variant", {})),
    }
    for what, present in extras.items():
        if present:
            raise HeadProbeError(
                f"{name}: LoRA on its head uses {what}, which is more than a low-rank matrix"
            )


@contextlib.contextmanager
def effective_head(model: nn.Module) -> Iterator[nn.Module]:
    """Within, TRL finds the weight that the head really has: LoRA merged, the saved copy chosen.

    Yields:
        the model's own head.
    """
    layer = model.get_output_embeddings()
    check_layer(type(model).__name__, layer)
    if not (hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save")):
        yield layer
        return
    weight, bias = Head(layer).parameters()
    model.get_output_embeddings = lambda: types.SimpleNamespace(weight=weight, bias=bias)
    try:
        yield layer
    finally:
        del model.get_output_embeddings


def _install(model: nn.Module, temperature: float, settings: Callable[[], Settings | None]) -> None:
    # The function and not the bound method: a deep copy of the model must run itself.
    inner = model.forward.__func__
    seen = weakref.WeakSet()  # layers that were probed

    @functools.wraps(inner)
    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        now = settings()
        if not fused_lm_head or now is None:
            return inner(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        with effective_head(self) as layer:
            if now.probe and layer not in seen:
                _probe(self, inner, temperature, kwargs)
                seen.add(layer)
            return inner(self, *args, fused_lm_head=True, **kwargs)

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable
@torch.no_grad()
def _probe(model: nn.Module, inner: Callable, temperature: float, kwargs: dict) -> None:
    """Compare the fused log-probs of a few of the batch's tokens with the model's own logits.

    Raises:
        HeadProbeError: they differ by more than rounding explains.
    """
    ids = _tokens(model, kwargs)
    mask = torch.ones_like(ids)
    training = [module for module in model.modules() if module.training]
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            fused = inner(model, input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
            plain = type(model).forward(model, input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for module in training:
                module.training = True
    fused, logits = fused.log_probs.float(), plain.logits[:, :-1].float() / temperature
    ids, fused = ids[:, 1:, None].to(logits.device), fused.to(logits.device)
    own = torch.log_softmax(logits, -1).gather(-1, ids)[..., 0]
    worst = (fused - own).abs().max().item()
    # Roundings of the largest logit on both sides, in the coarsest dtype on the way.
    coarsest = max(torch.finfo(dtype).eps for dtype in _dtypes(model, plain.logits))
    allowed = 8 * coarsest * max(1.0, logits.abs().max().item()) + 1e-5
    if not worst <= allowed:
        head = model.get_output_embeddings()
        parts = [
            n for n, m in model.named_children() if m is not model.base_model and m is not head
        ]
        raise HeadProbeError(
            f"{type(model).__name__}: TRL's fused head gives log-probs up to {worst:.3g} nats from "
            f"those of the model's own logits (rounding explains {allowed:.3g}). The model does "
            "more with its hidden states than lm_head.weight, the bias, the scale and the cap that "
            f"TRL reads; modules beside its base model: {parts}"
        )


def _tokens(model: nn.Module, kwargs: dict) -> Tensor:
    """[1, 16] token ids: labels of the batch that count (never image tokens), repeated if few."""
    labels = kwargs.get("labels") if kwargs.get("labels") is not None else kwargs["shift_labels"]
    near = kwargs.get("input_ids")
    device = labels.device if near is None else near.device
    ids = labels[labels != -100][:PROBE_TOKENS].to(device)
    if ids.numel() < 2:  # every rank probes at its first call, whatever its batch holds
        ids = torch.arange(3, 3 + PROBE_TOKENS, device=device)
        ids = ids % model.config.get_text_config().vocab_size
    return ids.repeat(-(-PROBE_TOKENS // ids.numel()))[None, :PROBE_TOKENS]


def _dtypes(model: nn.Module, logits: Tensor) -> Iterator[torch.dtype]:
    yield logits.dtype
    yield from {p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dim() == 2}
    if torch.is_autocast_enabled(logits.device.type):
        yield torch.get_autocast_dtype(logits.device.type)
