"""A model's own forward with log-probs computed inside its head, in the place of logits.

The model is called through whatever wraps it (PEFT, DDP, a DeepSpeed engine); auxiliary losses and
other outputs stay its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sppo_kernels as sk
from sppo_kernels.integrations._swap import IntegrationError

__all__ = ["checked_head", "forget_heads", "fused_head"]

_heads: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def forget_heads() -> None:
    """Probe every model again at its next forward."""
    _heads.clear()


def checked_head(lm: nn.Module) -> Any:
    """The `Head` of a transformers model, compared once with the model's own logits.

    Raises:
        IntegrationError: the head is not one that the fused operators compute, or its weight is
            partitioned; the message names the model and the reason.
    """
    from sppo_kernels.models.head import HeadProbeError, find_head
    from sppo_kernels.models.probe import probe_head

    if lm in _heads:
        return _heads[lm]
    try:
        head = find_head(lm)
        weight = head.layer.weight
        if hasattr(weight, "ds_id"):
            raise HeadProbeError("its weight is partitioned by ZeRO-3; use stage 2 or below")
        if hasattr(weight, "full_tensor"):
            raise HeadProbeError("its weight is a DTensor; gather it first")
        if not weight.is_floating_point():
            raise HeadProbeError(f"its weight is quantised ({weight.dtype})")
        ids = torch.arange(8, device=weight.device).reshape(1, 8) % weight.shape[0]
        training = lm.training
        lm.eval()
        try:
            probe_head(lm, head, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        finally:
            lm.train(training)
    except HeadProbeError as error:
        raise IntegrationError(
            f"the head of {type(lm).__name__} cannot be fused: {error}; without the patch of the "
            "head the framework's own logits remain"
        ) from error
    _heads[lm] = head
    return head


@contextlib.contextmanager
def fused_head(
    model: nn.Module,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    mean_logits: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """While it holds, a call of `model` computes log-probs of `labels`, and no logits.

    Args:
        labels: [B, T], shifted already, −100 to ignore.
        temperature: divides the logits.

    The `logits` of the model's output have one column then, and mean nothing.

    Yields:
        A dict that the forward fills: "logps" [B, T] float32; "entropy" [B, T] when asked for;
        "mean_logits" [B, T], the mean over the vocabulary of every row's logits, detached.

    Raises:
        IntegrationError: see `checked_head`; or the forward did not use the head as expected.
    """
    from sppo_kernels.models.head import causal_lm

    lm = causal_lm(model)
    head = checked_head(lm)
    if head.softcap is not None and temperature != 1.0:
        raise IntegrationError(
            f"temperature: expected 1.0 for a model with softcapped logits, got {temperature}"
        )
    got: dict[str, Tensor] = {}

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.shape[:-1] != labels.shape:
            raise IntegrationError(
                f"{type(lm).__name__}: expected hidden states for labels of shape "
                f"{tuple(labels.shape)}, its head got {tuple(hidden.shape)}"
            )
        weight, bias = head.parameters()
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        options = {
            "bias": bias,
            "logit_scale": head.logit_scale / temperature,
            "softcap": head.softcap,
        }
        if entropy:
            stats = sk.linear_token_stats(hidden, weight, labels, outputs=("entropy",), **options)
            got["logps"], got["entropy"] = stats.logps, stats.entropy
        else:
            got["logps"] = sk.linear_token_logps(hidden, weight, labels, **options)
        if mean_logits:
            with torch.no_grad():
                got["mean_logits"] = _mean_logits(hidden, weight, **options)
        # not used, but in the graph: DDP looks from the outputs for the parameters that take part
        return (got["logps"] * 1.0)[..., None].to(hidden.dtype)

    before = head.layer.__dict__.get("forward")
    head.layer.forward = forward
    try:
        yield got
        if "logps" not in got:
            raise IntegrationError(f"{type(lm).__name__}: its forward did not use its head")
    finally:
        if before is None:
            del head.layer.forward
        else:
            head.layer.forward = before


def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Mean over the vocabulary of each row's logits, [..., ] float32."""
    if softcap is None:  # the mean of linear maps is the linear map of the mean
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean = mean + bias.float().mean()
        return mean * logit_scale
    none = torch.zeros(hidden.shape[:-1], dtype=torch.long)
    options = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    outputs = ("mean_logits",)
    return sk.linear_token_stats(hidden, weight, none, outputs=outputs, **options).mean_logits
