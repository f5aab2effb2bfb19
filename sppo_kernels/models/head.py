"""Finding a model's head: which layer it is, and what its config says of the logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sppo_kernels.models.weight import HeadProbeError, effective, refuse_if_unsupported

__all__ = ["Head", "HeadProbeError", "backbone", "causal_lm", "find_head"]

# What the configs of transformers call a factor on the logits, and whether they multiply or divide.
SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite, MiniCPM3
    "logits_mup_width_multiplier": -1,  # Inkling
}
# Model types whose forward disagrees with the table: name -> power.
SCALE_EXCEPTIONS = {
    ("hyperclovax", "logits_scaling"): 1,
    ("mpt", "logit_scale"): 0,  # in the config, read by nothing
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# peft wrappers whose own forward adds tokens or reweighs adapters, which a head cannot see.
WRAPPERS_WITH_FORWARD = ("XLORA", "POLY")


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP, FSDP, DeepSpeed and torch.compile wrappers.

    Raises:
        HeadProbeError: a wrapper changes the input (prompt learning), mixes adapters by input, or
            splits batches.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise HeadProbeError("nn.DataParallel splits a batch in its forward; use DDP instead")
        # By type: DeepSpeed and FSDP pass unknown attributes on to what they wrap.
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):
            config = getattr(model, "active_peft_config", None)
            kind = str(getattr(config, "peft_type", "")).rsplit(".", 1)[-1]
            if getattr(config, "is_prompt_learning", False) or kind in WRAPPERS_WITH_FORWARD:
                raise HeadProbeError(
                    f"{type(model).__name__} with {kind} changes what the model sees outside of "
                    "it; compute its logits and use sequence_logps"
                )
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
        vocab: rows of the weight that are logits, None for all (padded vocabularies).
        name: of the head, for messages.
        beside: modules with weights beside base model and head; only a probe tells if they matter.
        embedding: the input embedding, when the config says that the head is tied to it.
    """

    layer: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None
    name: str = "lm_head"
    beside: tuple[str, ...] = ()
    embedding: nn.Module | None = None

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None, differentiable.

        Raises:
            HeadProbeError: the weight is not here (sharded, partitioned, offloaded) or not one
                matrix (quantised, an adapter that is not low-rank); see `docs/models.md`.
        """
        self._refuse_untied()
        weight, bias = effective(self.layer, self.name)
        if self.vocab is not None and self.vocab < weight.shape[0]:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return weight, bias

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
            raise HeadProbeError(
                f"{self.name} is tied to the input embedding by the config, but holds another "
                "tensor here: FSDP has them in different units; put both in the root unit"
            )


def _address(weight: Tensor) -> int:
    local = getattr(weight, "_local_tensor", weight)
    return local.data_ptr() or id(weight)


def find_head(lm: nn.Module) -> Head:
    """The head of a causal language model by its config.

    Raises:
        HeadProbeError: there is no linear head, or it is not of a kind the fused loss computes; the
            message names the head, the kind and what to do.
    """
    config = getattr(lm, "config", None)
    name = type(lm).__name__
    if config is None or not hasattr(lm, "get_output_embeddings"):
        raise HeadProbeError(f"{name} is not a transformers language model (config, output head)")
    if getattr(config, "is_encoder_decoder", False):
        raise HeadProbeError(f"{name} is an encoder-decoder; its labels are not a continuation")
    layer = lm.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        raise HeadProbeError(f"{name} has no linear output embedding (get_output_embeddings())")
    backbone(lm)
    path = next((p for p, m in lm.named_modules() if m is layer), "lm_head")
    label = f"{name}.{path}"
    refuse_if_unsupported(layer, label)
    beside = _beside(lm, path, label)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, scale = getattr(text, "model_type", ""), 1.0
    for attribute, power in SCALES.items():
        value = getattr(text, attribute, None)
        power = SCALE_EXCEPTIONS.get((kind, attribute), power)
        if value is not None and power:
            scale *= float(value) ** power
    if not scale > 0:
        raise HeadProbeError(f"{label}: the config scales its logits by {scale}, not above 0")
    cap = next((c for c in (getattr(text, n, None) for n in SOFTCAPS) if c), None)
    tied = getattr(text, "tie_word_embeddings", False) and hasattr(lm, "get_input_embeddings")
    return Head(
        layer,
        scale,
        None if cap is None else float(cap),
        vocab=getattr(text, "unpadded_vocab_size", None),
        name=label,
        beside=beside,
        embedding=lm.get_input_embeddings() if tied else None,
    )


def _beside(lm: nn.Module, path: str, label: str) -> tuple[str, ...]:
    """Modules with weights beside base model and head; refused when they share the head's box."""
    base = getattr(lm, "base_model_prefix", "") or "model"
    parts = path.split(".")
    box = lm
    for depth, part in enumerate(parts):
        others = [
            n
            for n, m in box.named_children()
            if n not in (part, base) and next(m.parameters(), None) is not None
        ]
        if depth == 0:
            beside = tuple(others)
        elif others and parts[0] != base:
            raise HeadProbeError(
                f"{label} has extra layers in its head ({', '.join(others)} in {type(box).__name__}"
                "); compute its logits and use fused_sppo_loss or sequence_logps"
            )
        box = getattr(box, part)
    return beside
