"""Finding a model's head: which layer it is, and what its config says of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.models.refusals import HeadProbeError, refused
from sppo_kernels.models.weight import adapter_state, effective, gathered, refuse_if_unsupported

__all__ = ["Head", "HeadProbeError", "causal_lm", "find_head"]

# What the configs of transformers call a factor on the logits, and whether they multiply or divide;
# 0 where it is one on the hidden states, which the model applies before its head.
SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite
    "logits_mup_width_multiplier": 0,  # Inkling
}
# Model types whose forward disagrees with the table: name -> power.
SCALE_EXCEPTIONS = {
    ("hyperclovax", "logits_scaling"): 1,
    ("minicpm3", "logits_scaling"): 0,  # before the head
    ("mpt", "logit_scale"): 0,  # in the config, read by nothing
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# peft wrappers that run the model more than once or reweigh adapters by its input.
MIXERS = ("XLORA", "POLY")


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP, FSDP, DeepSpeed and torch.compile wrappers.

    Raises:
        HeadProbeError: a wrapper mixes adapters by input, or splits batches.
    """
    while True:
        name = type(model).__name__
        if isinstance(model, nn.DataParallel):
            raise refused("data parallel", name=name)
        # By type: DeepSpeed and FSDP pass unknown attributes on to what they wrap.
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):
            config = getattr(model, "active_peft_config", None)
            kind = str(getattr(config, "peft_type", "")).rsplit(".", 1)[-1]
            if kind in MIXERS:
                raise refused("mixed adapters", name=name, kind=kind)
            model = model.get_base_model()
        elif not hasattr(type(model), "get_output_embeddings") and _inner(model) is not None:
            model = _inner(model)
        else:
            return model


def _inner(model: nn.Module) -> nn.Module | None:
    for name in ("module", "_fsdp_wrapped_module"):
        if name in model._modules:
            return model._modules[name]
    return None


@dataclass
class Head:
    """A linear head: logits = cap(scale * (hidden weight^T + bias)).

    Attributes:
        layer: the module; its weight is read anew at every step, so that sharding, LoRA on the head
            and `modules_to_save` work.
        logit_scale, softcap: of the config, as applied to what `layer` gives.
        vocab: rows of the weight that are logits, None for all (padded vocabularies).
        name: of the head, for messages.
        embedding: the input embedding, when the config says that the head is tied to it.
    """

    layer: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None
    name: str = "lm_head"
    embedding: nn.Module | None = None

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None, differentiable; to be called in the layer's forward.

        Raises:
            HeadProbeError: the weight is not here (sharded, partitioned, offloaded) or not one
                matrix (quantised, an adapter that is not low-rank); see `docs/models.md`.
        """
        self._refuse_untied()
        weight, bias = effective(self.layer, self.name)
        if self.vocab is not None and self.vocab < weight.shape[0]:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return weight, bias

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Hidden states, weight, and options as the linear operators take them.

        On the head's device (a device_map may have put it elsewhere), in the dtype of `hidden`
        unless autocast decides.
        """
        weight, bias = self.parameters()
        hidden = gathered(hidden).to(weight.device)
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        options = {"bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return hidden, weight, options

    def state(self) -> tuple:
        """What changes the head's meaning without changing the module: a key for caches."""
        layer = self.layer
        patched = id(vars(layer)["forward"]) if "forward" in vars(layer) else None
        hooks = (*layer._forward_hooks, *layer._forward_pre_hooks)
        return (self.logit_scale, self.softcap, self.vocab, adapter_state(layer), hooks, patched)

    def _refuse_untied(self) -> None:
        """FSDP breaks a tie silently when its two ends are in different units."""
        if self.embedding is None or not isinstance(self.layer, nn.Linear):
            return
        weight, other = self.layer.weight, getattr(self.embedding, "weight", None)
        # FSDP1 replaces parameters by views, FSDP2 by DTensors or under classes of its own.
        sharded = not isinstance(weight, nn.Parameter) or hasattr(weight, "full_tensor")
        if other is None or not (sharded or hasattr(other, "full_tensor") or other.dim() != 2):
            return
        if weight is not other and _address(weight) != _address(other):
            raise refused("tie", name=self.name)


def _address(weight: Tensor) -> int:
    local = getattr(weight, "_local_tensor", weight)
    return local.data_ptr() or id(weight)


def beside(lm: nn.Module, head: Head) -> list[str]:
    """Modules with weights beside the base model and the head: only a probe tells what they do."""
    base = getattr(lm, "base_model_prefix", "") or "model"
    path = head.name.split(".")[1:]
    found, box = [], lm
    for part in path if path[0] != base else path[:1]:
        found += [
            name
            for name, module in box.named_children()
            if name not in (part, base) and next(module.parameters(), None) is not None
        ]
        box = getattr(box, part)
    return found


def find_head(lm: nn.Module) -> Head:
    """The head of a causal language model by its config.

    Raises:
        HeadProbeError: there is no linear head, or it is not of a kind the fused loss computes; the
            message names the head, the kind and what to do.
    """
    config, name = getattr(lm, "config", None), type(lm).__name__
    if config is None or not hasattr(lm, "get_output_embeddings"):
        raise refused("no model", name=name)
    if getattr(config, "is_encoder_decoder", False):
        raise refused("encoder-decoder", name=name)
    layer = lm.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        raise refused("no head", name=name)
    path = next((p for p, m in lm.named_modules() if m is layer), "lm_head")
    label = f"{name}.{path}"
    refuse_if_unsupported(layer, label)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, scale = getattr(text, "model_type", ""), 1.0
    for attribute, power in SCALES.items():
        value = getattr(text, attribute, None)
        power = SCALE_EXCEPTIONS.get((kind, attribute), power)
        if value is not None and power:
            scale *= float(value) ** power
    if not scale > 0:
        raise refused("scale", name=label, scale=scale)
    cap = next((c for c in (getattr(text, n, None) for n in SOFTCAPS) if c), None)
    tied = getattr(text, "tie_word_embeddings", False) and hasattr(lm, "get_input_embeddings")
    return Head(
        layer,
        scale,
        None if cap is None else float(cap),
        vocab=getattr(text, "unpadded_vocab_size", None),
        name=label,
        embedding=lm.get_input_embeddings() if tied else None,
    )
