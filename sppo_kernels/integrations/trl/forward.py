"""The fused loss inside the forward of a model under SoftSPPOTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels import fused_linear_sppo_loss, linear_sequence_logps
from sppo_kernels.integrations.trl.collator import SoftBatch
from sppo_kernels.models.head import Head, HeadProbeError, backbone, find_head
from sppo_kernels.models.probe import probe_head
from sppo_kernels.trainer.forward import LossForward

# What wrappers add for the model's own loss and outputs, and the base model does not take.
DROPPED = ("labels", "return_dict", "output_attentions", "output_hidden_states", "use_cache")


class SoftForward(LossForward):
    """`lm.forward` with `sppo=SoftBatch`: (loss, logps [S], aux loss or None).

    Without reference log-probabilities in the batch it returns logps [S] alone. Every other call
    goes to the forward that was there before.
    """

    def loss(self, host: SoftBatch, *args: Any, **kwargs: Any) -> Any:
        """Loss [] and log-probabilities [S] of the responses of a batch."""
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in DROPPED}
        if host.router:
            kwargs["output_router_logits"] = True
        out = backbone(self.lm)(*args, use_cache=False, **kwargs)
        hidden = out[0]
        weight, bias = self.head.parameters()
        hidden = hidden.to(weight.device)  # a model split over devices may end on another one
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        settings = dict(self.settings)
        shared = {
            "rows": self._rows(host, hidden.shape[1]),
            "bias": bias,
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
            "memory_budget": settings.pop("memory_budget"),
            "impl": settings.pop("impl"),
        }
        # policy and reference run the same chunks, so equal models give equal numbers
        if host.ref_logps is None:
            return linear_sequence_logps(hidden, weight, host.labels, host.cu_seqlens, **shared)
        result = fused_linear_sppo_loss(
            hidden,
            weight,
            host.labels,
            host.ref_logps.to(hidden.device, non_blocking=True),
            host.win_rate.to(hidden.device, non_blocking=True),
            host.cu_seqlens,
            **settings,
            **shared,
        )
        aux = self._aux(out, kwargs) if host.router else None
        return result.loss, result.logps, aux

    @staticmethod
    def _rows(host: SoftBatch, width: int) -> Tensor:
        """Rows of the hidden states; prompt learning puts virtual tokens before the real ones."""
        extra = width - host.width
        if extra == 0:
            return host.rows
        line = host.rows.div(host.width, rounding_mode="floor")
        return host.rows + (line + 1) * extra

    def _aux(self, out: Any, kwargs: dict[str, Any]) -> Tensor:
        """The load-balancing loss that TRL adds for a mixture of experts."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        text = self.lm.config.get_text_config()
        return load_balancing_loss_func(
            out.router_logits,
            text.num_experts,
            text.num_experts_per_tok,
            kwargs.get("attention_mask"),
        )


def install(
    lm: nn.Module, settings: dict[str, Any], like: SoftForward | None = None
) -> SoftForward:
    """Give `lm` the fused loss, after proving its head on a few tokens.

    Args:
        settings: eta, units, memory_budget, impl.
        like: of a model of the same class and config, already proved; no forward is run then.

    Raises:
        HeadProbeError: the head is not one that the fused loss computes; the message says why.
    """
    head = find_head(lm)
    if like is None:
        _probe(lm, head, settings["impl"])
    elif type(lm) is not type(like.lm) or (head.logit_scale, head.softcap) != (
        like.head.logit_scale,
        like.head.softcap,
    ):
        raise HeadProbeError(
            f"the reference is a sharded {type(lm).__name__} with another head than the policy's "
            f"{type(like.lm).__name__}; it cannot be proved while sharded"
        )
    forward = SoftForward(lm, head, settings)
    forward.install()
    return forward


def _probe(lm: nn.Module, head: Head, impl: str) -> None:
    weight, _ = head.parameters()
    ids = (torch.arange(1, 17) * 7919 % weight.shape[0]).view(2, 8).to(weight.device)
    training = lm.training
    wrapped = lm.__dict__.pop("forward", None)  # autocast in it would blur the comparison
    lm.eval()
    try:
        probe_head(lm, head, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, impl)
    finally:
        lm.train(training)
        if wrapped is not None:
            lm.forward = wrapped
