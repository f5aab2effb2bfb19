"""Log-probs computed inside the head, in the place of logits, of a model that a framework calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sppo_kernels as sk
from sppo_kernels.integrations._swap import IntegrationError

__all__ = ["forget_heads", "fused_head"]


def forget_heads() -> None:
    """Compare every model's head with its own logits again, at its next forward."""
    from sppo_kernels.models import probe

    probe.forget_heads()


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
        model: inside whatever wraps it (PEFT, DDP, a DeepSpeed engine).
        labels: [B, T], shifted already, −100 to ignore.
        temperature: divides the logits.

    The `logits` of the model's output have one column then, and mean nothing.

    Yields:
        A dict that is filled at the end: "logps" [B, T] float32; "entropy" [B, T] when asked for;
        "mean_logits" [B, T], the mean over the vocabulary of every row's logits, detached.

    Raises:
        IntegrationError: the head is not one that the fused operators compute, its weight is not
            here, or the forward did not use it; the message names the model and the reason.
    """
    from sppo_kernels.models.forward import in_head
    from sppo_kernels.models.probe import checked_head
    from sppo_kernels.models.refusals import HeadProbeError

    got: dict[str, Tensor] = {}

    def compute(hidden: Tensor, weight: Tensor, **options: Any) -> dict[str, Tensor]:
        if hidden.shape[:-1] != labels.shape:
            raise IntegrationError(
                f"{head.name}: expected hidden states for labels of shape {tuple(labels.shape)}, "
                f"got {tuple(hidden.shape)}"
            )
        # cap(scale z) / T is the cap c / T of (scale / T) z
        options["logit_scale"] /= temperature
        if options["softcap"] is not None:
            options["softcap"] /= temperature
        if entropy:
            stats = sk.linear_token_stats(hidden, weight, labels, outputs=("entropy",), **options)
            found = {"logps": stats.logps, "entropy": stats.entropy}
        else:
            found = {"logps": sk.linear_token_logps(hidden, weight, labels, **options)}
        if mean_logits:
            with torch.no_grad():
                found["mean_logits"] = _mean_logits(hidden, weight, **options)
        return found

    try:
        head = checked_head(model)
        with in_head(model, compute, head) as tap:
            yield got
        got.update(tap.result)
    except HeadProbeError as error:
        raise IntegrationError(
            f"the head of {type(model).__name__} cannot be fused: {error}; without the patch of "
            "the head the framework's own logits remain"
        ) from error


def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Mean over the vocabulary of each row's logits, [...] float32."""
    if softcap is None:  # the mean of linear maps is the linear map of the mean
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean = mean + bias.float().mean()
        return mean * logit_scale
    none = torch.zeros(hidden.shape[:-1], dtype=torch.long)
    options = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    outputs = ("mean_logits",)
    return sk.linear_token_stats(hidden, weight, none, outputs=outputs, **options).mean_logits
