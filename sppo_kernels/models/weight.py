"""The weight and bias that a head really applies: through adapters, wrappers and sharding.

Every kind of head is either computed exactly or refused by name with what to do; none is guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Packages whose linear layers hold packed or scaled weights, whatever their dtype says.
QUANTISERS = (
    "aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm", "gptqmodel",
    "hqq", "optimum.quanto", "quanto", "torchao", "transformers.integrations", "vptq",
)  # fmt: skip
PACKED = ("qweight", "W_q", "weight_packed", "quant_state", "SCB", "weight_scale_inv", "scales")
MERGE = "merge it (merge_and_unload) or leave the head out of target_modules"


class HeadProbeError(RuntimeError):
    """The fused log-probabilities would not be those of the model; the message names the reason."""


def refuse_if_unsupported(layer: nn.Module, name: str) -> None:
    """What can be told from the modules alone, also while their weights are sharded.

    Raises:
        HeadProbeError: the head is quantised, not linear, or adapted in a way that is not exact.
    """
    layer = _chosen(layer)
    if "token_adapter" in layer._modules:
        return refuse_if_unsupported(layer.token_adapter.base_layer, name)
    if "base_layer" in layer._modules:
        if not (layer.merged or layer.disable_adapters):
            _refuse_adapter(layer, name)
        return refuse_if_unsupported(layer.base_layer, name)
    kind = type(layer)
    if kind.__name__ == "FullyShardedDataParallel" or _is_fsdp2(layer):
        raise HeadProbeError(
            f"{name} is an FSDP unit of its own, whose weight exists only inside its forward; "
            "leave the head in the root unit (no fully_shard or auto-wrap policy for it)"
        )
    origin = next((c for c in kind.__mro__ if c.__module__.startswith(QUANTISERS)), None)
    held = [a for a in PACKED if a in vars(layer) or a in layer._buffers or a in layer._parameters]
    weight = getattr(layer, "weight", None)
    held += [a for a in ("quant_state", "CB", "SCB") if getattr(weight, a, None) is not None]
    if origin is not None or held:
        what = origin.__module__.split(".")[0] if origin else ", ".join(held)
        raise HeadProbeError(
            f"{name} is a quantised {kind.__name__} ({what}); keep the head in 16 or 32 bits "
            "(llm_int8_skip_modules=['lm_head'] or modules_to_not_convert of its quantiser)"
        )
    if not isinstance(layer, nn.Linear):
        inside = ", ".join(type(m).__name__ for m in layer.children())
        raise HeadProbeError(
            f"{name} is {kind.__name__}{f' of {inside}' if inside else ''}, not one nn.Linear; "
            "compute its logits and use fused_sppo_loss or sequence_logps"
        )
    for old in ("weight_g", "weight_orig"):
        if old in layer._parameters:
            raise HeadProbeError(
                f"{name} is reparametrised by hooks ({old}); use torch.nn.utils.parametrizations"
            )
    if weight is not None and weight.dtype not in FLOATS:
        raise HeadProbeError(
            f"{name} has a weight of dtype {weight.dtype}, which is quantised; keep the head in 16 "
            "or 32 bits"
        )
    local = getattr(weight, "_local_tensor", weight)
    own_dispatch = getattr(type(local), "__torch_dispatch__", None)
    if own_dispatch is not Tensor.__torch_dispatch__ and not _of_torch(type(local)):
        raise HeadProbeError(
            f"{name} has a weight of type {type(local).__name__}, which is not a plain tensor "
            "(quantised?); keep the head in 16 or 32 bits"
        )


def effective(layer: nn.Module, name: str = "lm_head") -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] or None, differentiable in the head's and adapter's parameters.

    LoRA gives W + s B A (rsLoRA by its s), DoRA m / ||W + s B A|| (W + s B A) with the norm held
    constant as in peft, trainable tokens and `modules_to_save` their own rows and weights. DTensor
    weights are gathered, with a gradient that is taken to be the same on every rank of their mesh
    (tensor parallelism; FSDP2's own are whole inside the model's forward).

    Raises:
        HeadProbeError: as `refuse_if_unsupported`, and for weights that are not here now.
    """
    refuse_if_unsupported(layer, name)
    layer = _chosen(layer)
    if "token_adapter" in layer._modules:
        return _trainable_tokens(layer.token_adapter, name)
    if "base_layer" in layer._modules:
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # what the layer's own forward does
        weight, bias = effective(layer.base_layer, name)
        if not (layer.merged or layer.disable_adapters):
            weight, bias = _with_lora(layer, weight, bias)
        return weight, bias
    return _whole(layer.weight, name, layer), (
        None if layer.bias is None else _whole(layer.bias, f"{name}.bias", layer, 1)
    )


def adapter_state(layer: nn.Module) -> tuple:
    """What changes a head's meaning without changing the module: a key for caches."""
    if not hasattr(layer, "active_adapters"):
        return (type(layer).__name__,)
    merged = getattr(layer, "merged", False)
    return (type(layer).__name__, tuple(layer.active_adapters), merged, layer.disable_adapters)


def _chosen(layer: nn.Module) -> nn.Module:
    """The copy that peft's `modules_to_save` runs."""
    while "modules_to_save" in layer._modules:
        active = list(layer.active_adapters)
        use_original = layer.disable_adapters or not active
        if use_original or active[0] not in layer.modules_to_save:
            layer = layer.original_module
        else:
            layer = layer.modules_to_save[active[0]]
    return layer


def _refuse_adapter(layer: nn.Module, name: str) -> None:
    known = {(c.__module__, c.__name__) for c in type(layer).__mro__}
    if ("peft.tuners.lora.layer", "Linear") not in known:
        kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        raise HeadProbeError(f"{name} is adapted by {kind}, which is not low-rank LoRA; {MERGE}")
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    for adapter in active:
        if getattr(layer.lora_dropout[adapter], "p", 0):
            raise HeadProbeError(
                f"{name} has LoRA with dropout (adapter {adapter!r}), which acts on the head's "
                "input and has no merged weight; set lora_dropout=0 or leave the head out"
            )
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        kind = getattr(variant, "__name__", type(variant).__name__)
        if variant is not None and kind != "DoraLinearVariant":
            raise HeadProbeError(f"{name} is adapted by LoRA's {kind}; {MERGE}")
        if variant is not None and len(active) > 1:
            raise HeadProbeError(
                f"{name} has DoRA beside other active adapters {active}, whose product depends on "
                f"their order; {MERGE}"
            )


def _with_lora(
    layer: nn.Module, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    base = weight
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        up, down = layer.lora_B[adapter], layer.lora_A[adapter]
        scaling = layer.scaling[adapter]
        delta = _whole(up.weight, "lora_B", up) @ _whole(down.weight, "lora_A", down) * scaling
        if adapter in getattr(layer, "lora_variant", {}):
            merged = base + delta.to(base.dtype)
            magnitude = layer.lora_magnitude_vector[adapter].weight
            norm = torch.linalg.norm(merged, dim=1).detach()
            weight = (magnitude / norm)[:, None].to(merged.dtype) * merged
        else:
            weight = weight + delta.to(weight.dtype)
        if up.bias is not None:  # lora_bias
            extra = (up.bias * scaling).to(weight.dtype)
            bias = extra if bias is None else bias + extra
    return weight, bias


def _trainable_tokens(layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        return effective(layer.base_layer, name)
    _whole(layer.base_layer.weight, name, layer.base_layer)  # refuses what is not here
    return layer.get_merged_weights(layer.active_adapters), None  # peft applies no bias here


def _whole(weight: Tensor, name: str, layer: nn.Module, dim: int = 2) -> Tensor:
    """The full tensor, on a device, or a refusal that says which system holds it."""
    if hasattr(weight, "ds_id") and (weight.numel() == 0 or _not_available(weight)):
        raise HeadProbeError(
            f"{name} is partitioned by ZeRO-3 and not gathered; run the call inside "
            "deepspeed.zero.GatheredParameters([head.weight]), or compute logits"
        )
    if weight.is_meta:
        hook = getattr(layer, "_hf_hook", None)
        why = "offloaded by accelerate" if hook is not None else "never loaded"
        raise HeadProbeError(
            f"{name} is on the meta device ({why}); give the head a device (device_map)"
        )
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if weight.dim() != dim or weight.numel() == 0:
        raise HeadProbeError(
            f"{name} has shape {tuple(weight.shape)} here: a shard or flat parameter (FSDP, "
            "ZeRO-3); call through the wrapped model, and keep the head in the root unit"
        )
    return weight


def _not_available(weight: Tensor) -> bool:
    return getattr(getattr(weight, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"


def _of_torch(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "torch"


def _is_fsdp2(layer: nn.Module) -> bool:
    return any(c.__name__ == "FSDPModule" for c in type(layer).__mro__)
