"""The model's forward with the loss inside, so that DDP, FSDP, PEFT and autocast wrap both."""

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
from sppo_kernels.models import attention as packing
from sppo_kernels.models.head import (
    Head,
    HeadProbeError,
    backbone,
    causal_lm,
    find_head,
)
from sppo_kernels.models.probe import probe_head
from sppo_kernels.trainer.objective import pair_objective

logger = logging.getLogger("sppo_kernels")


class LossForward:
    """Replaces `lm.forward` of one model: with `sppo=HostBatch` it returns (loss, logps [S]).

    Without it, the model's own forward runs. `head` None means logits in.
    """

    def __init__(self, lm: nn.Module, head: Head | None, settings: dict[str, Any]) -> None:
        self.lm, self.head, self.settings = lm, head, settings
        self.original = lm.forward
        # the class's signature stays visible to generate() and peft through __wrapped__
        self.__wrapped__ = self.original

    def install(self) -> None:
        self.lm.forward = self

    def remove(self) -> None:
        if isinstance(self.lm.__dict__.get("forward"), LossForward):
            del self.lm.forward

    def __deepcopy__(self, memo):
        raise TypeError("a model under training by SPPOTrainer cannot be copied; call release()")

    def __call__(self, *args, sppo: HostBatch | None = None, **kwargs):
        if sppo is None:
            return self.original(*args, **kwargs)
        return self.loss(sppo, *args, **kwargs)

    def loss(self, host: HostBatch, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """Loss [] and log-probabilities [S] of the responses of a batch."""
        kwargs = {k: v for k, v in kwargs.items() if k in ("attention_mask", "position_ids")}
        device = input_ids.device
        if host.layout is not None:
            kwargs |= packing.inputs_for(host.layout, device)
        win = host.win_rate.to(device, non_blocking=True)
        ref = host.ref_logps if host.ref_logps is not None else torch.zeros_like(host.win_rate)
        ref = ref.to(device, non_blocking=True)
        settings = dict(self.settings)
        pairwise = settings.pop("pairwise", None)
        if self.head is None:
            logits = self.original(input_ids=input_ids, use_cache=False, **kwargs).logits
            logits = logits.flatten(0, 1).index_select(0, host.rows.to(device))
            settings.pop("memory_budget")
            inputs = (logits, host.labels.to(device))
            fused, plain = fused_sppo_loss, sequence_logps
        else:
            hidden = backbone(self.lm)(input_ids=input_ids, use_cache=False, **kwargs)[0]
            weight, bias = self.head.parameters()
            if not torch.is_autocast_enabled(device.type):
                weight = weight.to(hidden.dtype)
                bias = None if bias is None else bias.to(hidden.dtype)
            settings |= {
                "rows": host.rows,
                "bias": bias,
                "logit_scale": self.head.logit_scale,
                "softcap": self.head.softcap,
            }
            inputs = (hidden, weight, host.labels)
            fused, plain = fused_linear_sppo_loss, linear_sequence_logps
        if pairwise is None:
            return fused(*inputs, ref, win, host.cu_seqlens, **settings)
        for name in ("eta", "units"):
            settings.pop(name)
        logps = plain(*inputs, host.cu_seqlens, **settings)
        return pair_objective(logps, ref, host, pairwise), logps.detach()


def probe(
    model: nn.Module,
    examples: list[dict],
    *,
    head: str,
    packing_mode: str,
    impl: str,
    device: torch.device,
    settings: dict[str, Any],
) -> tuple[LossForward, bool]:
    """Choose how this model is run, and prove it on a few examples.

    Args:
        head: "auto", "fused" or "logits"; packing_mode: "auto", "shared" or "padded".

    Returns:
        The forward to install, and whether batches are packed.

    Raises:
        HeadProbeError: "fused" or "shared" was asked for and does not compute what the model does.
    """
    lm = causal_lm(model)
    training = model.training
    model.eval()
    try:
        found = _probe_head(lm, examples, head, impl, device)
        forward = LossForward(lm, found, settings)
        packed = _probe_packing(forward, examples, packing_mode, device)
    finally:
        model.train(training)
    return forward, packed


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


def _to(inputs: dict, device: torch.device) -> dict:
    return {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}


def _probe_head(lm, examples, wanted, impl, device) -> Head | None:
    if wanted == "logits":
        return None
    try:
        found = find_head(lm)
        batch = SPPOCollator(packed=False)(few(examples))
        gap = probe_head(lm, found, _to(batch, device), impl)
    except HeadProbeError as error:
        if wanted == "fused":
            raise
        logger.warning("head: logits in (slower, more memory), because %s", error)
        return None
    logger.info("head: fused, within %.2g nats a token of the model's own logits", gap)
    return found


@torch.no_grad()
def _probe_packing(forward: LossForward, examples, wanted, device) -> bool:
    if wanted == "padded":
        return False
    lm = forward.lm
    before = lm.config._attn_implementation
    packing.register()
    why = None
    try:
        if before not in ("sdpa", "eager", "flash_attention_2", packing.NAME):
            raise ValueError(f"the attention implementation is {before!r}")
        lengths, outputs = [], []
        for packed in (False, True):
            batch = SPPOCollator(packed=packed)(few(examples))
            host: HostBatch = batch.pop("sppo")
            if packed:
                lm.set_attn_implementation(packing.NAME)
            kwargs = _to(batch, device)
            if host.layout is not None:
                kwargs |= packing.inputs_for(host.layout, device)
            hidden = backbone(lm)(use_cache=False, **kwargs)[0].flatten(0, 1)
            outputs.append(hidden.index_select(0, host.rows.to(device)).float())
            lengths.append(host.labels.numel())
        padded, shared = outputs
        gap = (shared - padded).norm(dim=-1) / padded.norm(dim=-1).clamp_min(1e-12)
        worst, allowed = float(gap.max()), 64 * torch.finfo(hidden.dtype).eps
        if not worst <= min(max(allowed, 1e-3), 0.1):
            raise ValueError(f"packed hidden states differ by {worst:.2g} from padded ones")
    except Exception as error:  # any model-specific failure means the same: pad
        why = error
        lm.set_attn_implementation(before)
    if why is None:
        logger.info("packing: prompts once, no padding (hidden states within %.2g)", worst)
        return True
    message = f"packing: {type(lm).__name__} cannot be packed ({type(why).__name__}: {why})"
    if wanted == "shared":
        raise HeadProbeError(message) from why
    logger.warning("%s; batches are padded, bucketed by length", message)
    return False
