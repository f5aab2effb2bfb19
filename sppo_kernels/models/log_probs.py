"""Log-probs and SPPO's loss of any transformers causal language model, inside its wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels import checks
from sppo_kernels.logps.linear import linear_sequence_logps, linear_token_logps
from sppo_kernels.loss.sppo import fused_linear_sppo_loss
from sppo_kernels.models.forward import run_head
from sppo_kernels.models.probe import checked_head
from sppo_kernels.results import SPPOOutput

__all__ = ["model_sequence_logps", "model_sppo_loss", "model_token_logps"]

REFUSED = ("adapter_names", "inputs_embeds", "logits_to_keep", "past_key_values", "return_dict")


def model_token_logps(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each label under a causal language model, never holding its logits.

    Equal to log_softmax of `model(...).logits` in float32 at the labels, with the model's softcap,
    scale and bias; the head's GEMMs run only on rows that predict a label.

    Args:
        model: a transformers causal LM, also inside PEFT, DDP, FSDP or torch.compile; call it as it
            is wrapped.
        input_ids: [B, T] int64.
        labels: [B, T], aligned with input_ids as transformers has it (label t is predicted by row
            t - 1; the first column counts for nothing), -100 where ignored. On a GPU they are
            copied to the host before the forward, a synchronisation that CPU labels spare.
        attention_mask: [B, T] or None.
        memory_budget, impl: as in `linear_token_logps`.
        check: compare with the model's own logits on a slice of the batch, once for a model and
            head (`checked_head`); without it the config is trusted,
            except for models with further layers beside base model and head.
        model_kwargs: further inputs of the model (position_ids, token_type_ids, ...).

    Returns:
        [B, T-1] float32 (float64 for a float64 model), in nats, 0 where labels are ignored. A
        router's auxiliary loss is not part of it.

    Raises:
        HeadProbeError: the model's head is not one this computes, by name and with what to do.
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    options = {"memory_budget": memory_budget, "impl": impl}
    return _call(linear_token_logps, model, inputs, labels, check, options)


def model_sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each row's labels: sums of `model_token_logps`, same arguments.

    Returns:
        [B] float32 (float64 for a float64 model), in nats.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    options = {"memory_budget": memory_budget, "impl": impl}
    return _call(linear_sequence_logps, model, inputs, labels, check, options)


def model_sppo_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    attention_mask: Tensor | None = None,
    *,
    eta: float = 1000.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    units: str = "log_ratio",
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> SPPOOutput:
    """SPPO's loss (arXiv 2405.00675, eq. 4.4) of a batch of responses, one a row.

    Args:
        ref_logps: [B], log-probability of each response under the reference (of
            `model_sequence_logps` without gradients), in nats.
        win_rate: [B], P(response beats the policy), in [0, 1].
        eta, weights, reduction, units: as in `sppo_loss`.

    Returns:
        SPPOOutput(loss, logps [B], detached).

    The other arguments and errors are those of `model_token_logps`.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    for name, value in (("ref_logps", ref_logps), ("win_rate", win_rate)):
        value = checks.floating(name, value, 1)
        checks.shape(name, value, labels.shape[:1], "one for each row")
    options = {"eta": eta, "weights": weights, "reduction": reduction, "units": units}
    options |= {"memory_budget": memory_budget, "impl": impl}
    options |= {"ref_logps": ref_logps, "win_rate": win_rate}
    return SPPOOutput(*_call(fused_linear_sppo_loss, model, inputs, labels, check, options))


def _call(
    op: Callable, model: nn.Module, inputs: dict, labels: Tensor, check: bool, options: dict
) -> Any:
    """Check the arguments and the head, and call the model with `op` in its head."""
    input_ids = checks.integers("input_ids", inputs["input_ids"])
    labels = checks.integers("labels", labels)
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [B, T] with T >= 2, got {tuple(input_ids.shape)}")
    checks.shape("labels", labels, input_ids.shape, "that of input_ids (shifted inside)")
    inputs = {k: v for k, v in inputs.items() if v is not None}
    for name in REFUSED:
        if name in inputs:
            raise ValueError(f"{name}: not understood here; the call computes log-probs of labels")
    head = checked_head(model, inputs, options["impl"], check)
    # On the host, where the ignored ones are dropped without waiting for a device.
    wanted = labels[:, 1:].cpu()
    rows = torch.arange(labels.numel()).view(labels.shape)[:, :-1]

    def compute(hidden: Tensor, weight: Tensor, **of_head: Any) -> Any:
        there = {
            k: v.to(hidden.device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in options.items()
        }
        result = op(hidden, weight, wanted, rows=rows, **there, **of_head)
        return tuple(result) if isinstance(result, tuple) else result

    return run_head(model, inputs, compute, head)[0]
