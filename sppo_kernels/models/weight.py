"""The weight and bias that a head really applies: through adapters, wrappers and sharding.

Every kind of head is either computed exactly or refused by name with what to do; none is guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sppo_kernels.models.refusals import refused

__all__ = ["adapter_state", "effective", "gathered", "refuse_if_unsupported"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Packages whose linear layers hold packed or scaled weights, whatever their dtype says.
QUANTISERS = (
    "aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm", "gptqmodel",
    "hqq", "optimum.quanto", "quanto", "torchao", "transformers.integrations", "vptq",
)  # fmt: skip
PACKED = ("qweight", "W_q", "weight_packed", "quant_state", "SCB", "weight_scale_inv", "scales")


def refuse_if_unsupported(layer: nn.Module, name: str, inside: bool = False) -> None:
    """What can be told from the modules alone, also while their weights are sharded.

    Args:
        inside: the layer is inside an adapter of the head.

    Raises:
        HeadProbeError: the head is quantised, not linear, or adapted in a way that is not exact.
    """
    layer = _chosen(layer)
    if "token_adapter" in layer._modules:
        return refuse_if_unsupported(layer.token_adapter.base_layer, name, True)
    if "base_layer" in layer._modules:
        if not (layer.merged or layer.disable_adapters):
            _refuse_adapter(layer, name)
        return refuse_if_unsupported(layer.base_layer, name, True)
    kind = type(layer)
    parents = [c.__name__ for c in kind.__mro__]
    if "FullyShardedDataParallel" in parents or (inside and "FSDPModule" in parents):
        raise refused("own unit", name=name)
    weight = getattr(layer, "weight", None)
    what = _quantised(layer, weight)
    if what is not None:
        raise refused("quantised", name=name, kind=kind.__name__, what=what)
    if not isinstance(layer, nn.Linear):
        parts = ", ".join(type(m).__name__ for m in layer.children())
        raise refused("not linear", name=name, kind=kind.__name__ + f" of {parts}" * bool(parts))
    for old in ("weight_g", "weight_orig"):
        if old in layer._parameters:
            raise refused("reparametrised", name=name, what=old)
    return None


def _quantised(layer: nn.Module, weight: Tensor | None) -> str | None:
    """The package or attributes that show a weight which is not a plain float tensor, or None."""
    origin = next((c for c in type(layer).__mro__ if c.__module__.startswith(QUANTISERS)), None)
    if origin is not None:
        return origin.__module__.split(".")[0]
    held = [a for a in PACKED if a in vars(layer) or a in layer._buffers or a in layer._parameters]
    held += [a for a in ("quant_state", "CB", "SCB") if getattr(weight, a, None) is not None]
    if held:
        return ", ".join(held)
    if not isinstance(weight, Tensor):
        return None
    if weight.dtype not in FLOATS:
        return f"weight of dtype {weight.dtype}"
    kind = type(getattr(weight, "_local_tensor", weight))
    own_dispatch = getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__
    if own_dispatch and kind.__module__.split(".")[0] != "torch":
        return f"weight of type {kind.__name__}"
    return None


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
        raise refused("adapter", name=name, kind=kind)
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    for adapter in active:
        if getattr(layer.lora_dropout[adapter], "p", 0):
            raise refused("dropout", name=name, adapter=adapter)
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        kind = getattr(variant, "__name__", type(variant).__name__)
        if variant is not None and kind != "DoraLinearVariant":
            raise refused("adapter", name=name, kind=f"LoRA's {kind}")
        if variant is not None and len(active) > 1:
            raise refused("dora", name=name, adapters=active)


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


def gathered(tensor: Tensor) -> Tensor:
    """All of a DTensor, whose gradient is then taken to be the same on every rank; others as is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _whole(weight: Tensor, name: str, layer: nn.Module, dim: int = 2) -> Tensor:
    """The full tensor, on a device, or a refusal that says which system holds it."""
    status = getattr(getattr(weight, "ds_status", None), "name", "AVAILABLE")
    if hasattr(weight, "ds_id") and (weight.numel() == 0 or status != "AVAILABLE"):
        raise refused("zero3", name=name)
    if weight.is_meta:
        hook = getattr(layer, "_hf_hook", None)
        what = "offloaded by accelerate" if hook is not None else "never loaded"
        raise refused("meta", name=name, what=what)
    weight = gathered(weight)
    if weight.dim() != dim or weight.numel() == 0:
        raise refused("shard", name=name, shape=tuple(weight.shape))
    return weight
