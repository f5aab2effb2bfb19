"""How the trainers run a model on a batch: the loss inside its head, or from its logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels import (
    fused_linear_sppo_loss,
    fused_sppo_loss,
    linear_sequence_logps,
    sequence_logps,
)
from sppo_kernels.data.collate import HostBatch, SPPOCollator
from sppo_kernels.models import attention
from sppo_kernels.models.forward import run_head
from sppo_kernels.models.probe import checked_head, probe_packing
from sppo_kernels.models.refusals import HeadProbeError
from sppo_kernels.trainer.objective import pair_objective

logger = logging.getLogger("sppo_kernels")


class LossForward:
    """Loss and log-probs of the responses of a batch, by a model inside its wrappers.

    Args:
        settings: eta, units, memory_budget, impl; `pairwise` for an objective of pairs.
        fused: inside the model's head; False: from its logits.
    """

    def __init__(self, settings: dict[str, Any], fused: bool = True) -> None:
        self.settings, self.fused = settings, fused

    def loss(self, model: nn.Module, host: HostBatch, **inputs: Any) -> tuple[Tensor, Tensor, Any]:
        """Loss [], detached log-probabilities [S], and the model's output.

        Raises:
            HeadProbeError: the head is not (or no longer) what the fused loss computes.
        """
        layout = getattr(host, "layout", None)
        sample = inputs if layout is None else {"input_ids": inputs["input_ids"][:, :64]}
        if layout is not None:
            inputs |= attention.inputs_for(layout, inputs["input_ids"].device)
        if self.fused:
            head = checked_head(model, sample, self.settings["impl"])
            settings = self.settings | {"rows": host.rows}

            def compute(hidden: Tensor, weight: Tensor, **of_head: Any) -> tuple[Tensor, Tensor]:
                return _objective(host, settings | of_head, hidden, weight, host.labels)

            found, output = run_head(model, inputs, compute, head)
            return *found, output
        output = model(**inputs, use_cache=False)
        device = output.logits.device
        logits = output.logits.flatten(0, 1).index_select(0, host.rows.to(device))
        settings = {k: v for k, v in self.settings.items() if k != "memory_budget"}
        return *_objective(host, settings, logits, host.labels.to(device)), output


def _objective(host: HostBatch, settings: dict[str, Any], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [] and detached log-probs [S] of logits and labels, or of hidden, weight and labels."""
    from_logits = len(inputs) == 2
    ref = host.ref_logps if host.ref_logps is not None else torch.zeros_like(host.win_rate)
    ref = ref.to(inputs[0].device, non_blocking=True)
    pairwise = settings.get("pairwise")
    settings = {k: v for k, v in settings.items() if k != "pairwise"}
    if pairwise is None:
        fused = fused_sppo_loss if from_logits else fused_linear_sppo_loss
        win = host.win_rate.to(inputs[0].device, non_blocking=True)
        return tuple(fused(*inputs, ref, win, host.cu_seqlens, **settings))
    settings = {k: v for k, v in settings.items() if k not in ("eta", "units")}
    plain = sequence_logps if from_logits else linear_sequence_logps
    logps = plain(*inputs, host.cu_seqlens, **settings)
    return pair_objective(logps, ref, host, pairwise), logps.detach()


def probe(
    model: nn.Module,
    examples: list[dict],
    *,
    head: str,
    packing_mode: str,
    device: torch.device,
    settings: dict[str, Any],
) -> tuple[LossForward, bool]:
    """Choose how this model is run, and prove it on a few examples.

    Args:
        head: "auto", "fused" or "logits"; packing_mode: "auto", "shared" or "padded".

    Returns:
        How to run it, and whether batches are packed.

    Raises:
        HeadProbeError: "fused" or "shared" was asked for and does not compute what the model does.
    """
    calls = []
    for packed in (False, True):
        batch = SPPOCollator(packed=packed)(few(examples))
        host: HostBatch = batch.pop("sppo")
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        if packed:
            inputs |= attention.inputs_for(host.layout, device)
        calls.append((inputs, host.rows))
    fused = head != "logits"
    try:
        if fused:
            checked_head(model, calls[0][0], settings["impl"])
            logger.info("head: fused, its log-probs are those of the model's own logits")
    except HeadProbeError as error:
        if head == "fused":
            raise
        fused = False
        logger.warning("head: logits in (slower, more memory), because %s", error)
    packed = packing_mode != "padded"
    try:
        if packed:
            worst = probe_packing(model, *calls)
            logger.info("packing: prompts once, no padding (hidden states within %.2g)", worst)
    except HeadProbeError as error:
        if packing_mode == "shared":
            raise
        packed = False
        logger.warning("%s; batches are padded, bucketed by length", error)
    return LossForward(settings, fused), packed


def few(examples: list[dict], limit: int = 512) -> list[dict]:
    """The first examples, cut to a size that costs little to probe."""
    return [
        {
            "prompt_ids": e["prompt_ids"][-limit // 4 :],
            "response_ids": [ids[: limit // 4] for ids in e["response_ids"][:2]],
            "win_rate": e["win_rate"][:2],
        }
        for e in examples[:2]
    ]
