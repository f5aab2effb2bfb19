"""Guard of TRL's fused head: it multiplies by `lm_head.weight`, whatever the model really does.

Heads that are more than that are refused by name, adapters on the head are merged into the weight,
and the first fused call of a model is compared with the model's own logits.
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

from sppo_kernels.integrations.trl.function import Settings
from sppo_kernels.models.head import Head
from sppo_kernels.models.probe import compare, some_ids, undisturbed
from sppo_kernels.models.refusals import HeadProbeError, refused
from sppo_kernels.models.weight import refuse_if_unsupported

__all__ = ["HeadProbeError", "effective_head", "guarded"]

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
        config = model.config.get_text_config()
        for attribute in UNREAD:
            value = getattr(config, attribute, None)
            if value is not None:
                name = type(model).__name__
                raise refused("trl softcap", name=name, attribute=attribute, value=value)
        _checked_layer(model)
        result = add_head(model, temperature, *args, **kwargs)
        _install(model, temperature, settings)
        return result

    return add_fused_lm_head


def _checked_layer(model: nn.Module) -> nn.Module:
    """The head's layer, refused by name when it is not a matrix or cannot be merged into one."""
    layer, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(layer, nn.Module):
        raise refused("no head", name=name)
    refuse_if_unsupported(layer, f"{name}: its head")
    return layer


@contextlib.contextmanager
def effective_head(model: nn.Module) -> Iterator[nn.Module]:
    """Within, TRL finds the weight that the head really has: adapters merged, the copy chosen.

    Yields:
        the model's own head.
    """
    layer = _checked_layer(model)
    if not layer._modules:  # adapters and wrappers hold the layers they wrap
        yield layer
        return
    name = f"{type(model).__name__}: its head"
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in layer.parameters()):
        raise refused("trl sharded", name=name)
    weight, bias = Head(layer, name=name).parameters()
    model.get_output_embeddings = lambda: types.SimpleNamespace(weight=weight, bias=bias)
    try:
        yield layer
    finally:
        del model.get_output_embeddings


def _install(model: nn.Module, temperature: float, settings: Callable[[], Settings | None]) -> None:
    # The function and not the bound method: a deep copy of the model must run itself.
    inner = model.forward.__func__
    seen = weakref.WeakKeyDictionary()  # layers that were compared -> in which states

    @functools.wraps(inner)
    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        now = settings()
        if not fused_lm_head or now is None:
            return inner(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        with effective_head(self) as layer:
            state = Head(layer).state()
            if now.probe and state not in seen.setdefault(layer, set()):
                _probe(self, inner, temperature, kwargs)
                seen[layer].add(state)
            return inner(self, *args, fused_lm_head=True, **kwargs)

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable
def _probe(model: nn.Module, inner: Callable, temperature: float, kwargs: dict) -> None:
    """Compare the fused log-probs of a few of the batch's tokens with the model's own logits.

    Raises:
        HeadProbeError: they differ by more than rounding explains.
    """
    ids = _tokens(model, kwargs)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with undisturbed(model):
        fused = inner(model, **call, labels=ids, fused_lm_head=True).log_probs
        logits = type(model).forward(model, **call, use_cache=False).logits[:, :-1]

    def reason() -> str:
        head = model.get_output_embeddings()
        parts = [n for n, m in model.named_children() if m not in (model.base_model, head)]
        return (
            "the model does more with its hidden states than lm_head.weight, the bias, the scale "
            f"and the cap that TRL reads; modules beside its base model: {parts}"
        )

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() == 2}
    if torch.is_autocast_enabled(ids.device.type):
        dtypes.add(torch.get_autocast_dtype(ids.device.type))
    name = type(model).__name__
    compare(name, fused, logits / temperature, ids[:, 1:], reason, dtypes=(*dtypes, logits.dtype))


def _tokens(model: nn.Module, kwargs: dict) -> Tensor:
    """[1, 16] token ids: labels of the batch that count (never image tokens), repeated if few."""
    labels = kwargs.get("labels") if kwargs.get("labels") is not None else kwargs["shift_labels"]
    ids = labels[labels != -100][:PROBE_TOKENS]
    if ids.numel() < 2:  # every rank probes at its first call, whatever its batch holds
        ids = some_ids(model).flatten()
    near = kwargs.get("input_ids")
    ids = ids.to(labels.device if near is None else near.device)
    return ids.repeat(-(-PROBE_TOKENS // ids.numel()))[None, :PROBE_TOKENS]
