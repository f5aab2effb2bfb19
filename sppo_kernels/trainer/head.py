"""Finding a model's head, and proving on one batch that it is what the fused loss computes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels import linear_token_logps

logger = logging.getLogger("sppo_kernels")


class HeadProbeError(RuntimeError):
    """The fused log-probabilities are not those of the model; the message names the difference."""


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP, FSDP and torch.compile wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and not hasattr(model, "get_output_embeddings"):
            model = model.module
        else:
            return model


def backbone(lm: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in hidden states."""
    inner = getattr(lm, getattr(lm, "base_model_prefix", "") or "model", None)
    if inner is None or inner is lm:
        raise HeadProbeError(f"{type(lm).__name__} has no base model that yields hidden states")
    return getattr(inner, "decoder", inner)  # OPT's head sits on its decoder


@dataclass
class Head:
    """A linear head: logits = cap(scale * (hidden weight^T + bias)).

    Attributes:
        layer: the module; its weight is read anew at every step, so that sharding, LoRA on the head
            and `modules_to_save` work.
        logit_scale, softcap: of the config.
    """

    layer: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None, differentiable."""
        layer = self.layer
        if hasattr(layer, "modules_to_save") and hasattr(layer, "active_adapters"):
            active = layer.active_adapters
            if active and not getattr(layer, "disable_adapters", False):
                layer = layer.modules_to_save[active[0]]
            else:
                layer = layer.original_module
        weight, bias = layer.weight, getattr(layer, "bias", None)
        adapted = hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer")
        if adapted and not layer.merged and not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    weight = weight + layer.get_delta_weight(name).to(weight.dtype)
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        if bias is not None and hasattr(bias, "full_tensor"):
            bias = bias.full_tensor()
        return weight, bias


def find_head(lm: nn.Module) -> Head:
    """The head of a causal language model by its config.

    Raises:
        HeadProbeError: there is no linear head, or it is not of a kind the fused loss computes.
    """
    config = getattr(lm, "config", None)
    name = type(lm).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise HeadProbeError(f"{name} is an encoder-decoder; its labels are not a continuation")
    layer = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise HeadProbeError(f"{name} has no linear output embedding")
    backbone(lm)
    dropout = getattr(layer, "lora_dropout", None) or {}
    if any(getattr(d, "p", 0) for d in dropout.values()):
        raise HeadProbeError(f"{name} has LoRA with dropout on its head, which acts on its input")
    if layer.weight.dim() != 2 or layer.weight.numel() == 0:
        raise HeadProbeError(
            f"{name}: the head's weight has shape {tuple(layer.weight.shape)} here (is it "
            "partitioned by ZeRO-3?)"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for attribute, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(text, attribute, None)
        if value is not None:
            scale *= float(value) ** power
    softcap = getattr(text, "final_logit_softcapping", None)
    return Head(layer, scale, None if softcap is None else float(softcap))


@torch.no_grad()
def probe_head(lm: nn.Module, head: Head, inputs: dict[str, Tensor], impl: str = "auto") -> float:
    """Compare fused log-probs with log_softmax of the model's own logits, on one padded batch.

    Both start from the same hidden states, so only the head is compared.

    Args:
        inputs: input_ids [B, T], attention_mask [B, T].

    Returns:
        The largest difference of a token's log-probability, in nats.

    Raises:
        HeadProbeError: it is larger than rounding explains; the message says where and by how much.
    """
    captured: list[Any] = []
    hook = backbone(lm).register_forward_hook(lambda _m, _a, out: captured.append(out[0]))
    try:
        logits = lm(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if len(captured) != 1 or captured[0].shape[:2] != inputs["input_ids"].shape:
        raise HeadProbeError(f"{type(lm).__name__} does not feed its base model's output to a head")
    hidden, labels = captured[0][:, :-1], inputs["input_ids"][:, 1:]
    labels = labels.masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    weight, bias = head.parameters()
    if weight.shape != (logits.shape[-1], hidden.shape[-1]):
        raise HeadProbeError(
            f"the head's weight is {tuple(weight.shape)}, but the model maps {hidden.shape[-1]} "
            f"features to {logits.shape[-1]} logits"
        )
    fused = linear_token_logps(
        hidden,
        weight.to(hidden.dtype),
        labels,
        bias=None if bias is None else bias.to(hidden.dtype),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        impl=impl,
    )
    logits = logits[:, :-1].float()
    eager = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    keep = labels != -100
    gap = (fused.float() - eager).abs().masked_fill(~keep, 0)
    worst = float(gap.max())
    # Two roundings of the largest logit, on each side, and of the softmax.
    allowed = 8 * torch.finfo(hidden.dtype).eps * max(1.0, float(logits.abs().max())) + 1e-5
    if not worst <= allowed:
        where = tuple(int(x) for x in torch.unravel_index(gap.argmax(), gap.shape))
        raise HeadProbeError(
            f"{type(lm).__name__}: the fused log-probability of the token at {where} is "
            f"{float(fused[where]):.6g}, the model's own {float(eager[where]):.6g} (difference "
            f"{worst:.3g}, rounding explains {allowed:.3g}); assumed logit_scale="
            f"{head.logit_scale:g}, softcap={head.softcap}, bias={bias is not None}"
        )
    return worst
