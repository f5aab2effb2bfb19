"""OpenRLHF: its actor's log-probs without logits, its function of logits, and SPPO for its DPO.

    import sppo_kernels.integrations.openrlhf as sppo_openrlhf
    sppo_openrlhf.patch(loss="sppo")

or `python -m sppo_kernels.integrations.openrlhf openrlhf.cli.train_dpo ...` instead of
`python -m openrlhf.cli.train_dpo ...`.

Follows OpenRLHF 0.11.2: openrlhf/models/{actor,utils,loss}.py, openrlhf/trainer/dpo_trainer.py.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sppo_kernels as sk
from sppo_kernels import checks
from sppo_kernels.integrations._capture import forget_heads, fused_head
from sppo_kernels.integrations._pairs import pair_loss, pair_rewards
from sppo_kernels.integrations._swap import Hook, Installed, IntegrationError, require_module

__all__ = ["SPPOLoss", "actor_forward", "log_probs_from_logits", "patch", "patched", "unpatch"]

TESTED = "OpenRLHF 0.11.2"
_installed = Installed("openrlhf", TESTED, after=forget_heads)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's function of this name: log-probability of each label, from logits.

    Args:
        logits: [..., V], bfloat16, float16, float32 or float64; not changed.
        labels: [...], int64 or int32.
        temperature: divides the logits, above 0.

    Returns:
        [...] float32 (float64 for float64), in nats. OpenRLHF returns the dtype of the logits and
        divides them in place.
    """
    temperature = checks.positive("temperature", temperature)
    return sk.token_logps(logits if temperature == 1.0 else logits / temperature, labels)


class SPPOLoss(nn.Module):
    """SPPO in the place of OpenRLHF's `DPOLoss`: same constructor, same call, η = 1/beta.

    `sk.pairwise_loss` of kind "sppo_hard" (arXiv 2405.00675, eq. (4.7) with P = 1 and 0; TRL's), or
    of kind "sppo" (eq. (4.4)) when the call gives win rates.

    Args:
        beta: 1/η, above 0. label_smoothing: must be 0. ipo: must be False.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        if ipo:
            raise ValueError("ipo: expected False, got True; SPPO is another loss")
        if label_smoothing:
            raise ValueError(f"label_smoothing: expected 0, got {label_smoothing}; give win rates")
        self.beta = checks.positive("beta", beta)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_win_rate: Tensor | None = None,
        rejected_win_rate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [], a mean over pairs, and the detached rewards [B], from log-probs [B].

        `chosen_win_rate`, `rejected_win_rate`: [B] soft win rates, both or neither.
        """
        policy = (policy_chosen_logps, policy_rejected_logps)
        ref = (reference_chosen_logps.detach(), reference_rejected_logps.detach())
        wins = (chosen_win_rate, rejected_win_rate)
        hard = all(rate is None for rate in wins)
        loss = pair_loss(policy, ref, None if hard else wins, beta=self.beta)
        return loss, *pair_rewards(policy, ref, self.beta)


def actor_forward(original: Any, helpers: Any) -> Any:
    """`Actor.forward` that computes log-probs inside the head; with the arguments of OpenRLHF.

    Where logits are what is asked for (neither action_mask nor return_logprobs), `original` runs.

    Args:
        original: OpenRLHF's `Actor.forward`.
        helpers: the module with `unpad_and_slice_tensor` and `gather_and_pad_tensor`.
    """

    def forward(
        self: nn.Module,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        if action_mask is None and not return_logprobs:
            return original(
                self, sequences, action_mask, attention_mask, return_output, allgather_logits,
                return_logprobs, ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs,
            )  # fmt: skip
        if getattr(self, "is_vlm", False) or mm_inputs:
            raise IntegrationError(
                f"mm_inputs: expected none, got {sorted(mm_inputs)}; models with images keep "
                "OpenRLHF's own logits, patch(head=False)"
            )
        batch, length = sequences.shape
        if getattr(self, "packing_samples", False):
            sequences, positions, labels, pad, indices = helpers.unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            mask = None

            def spread(values: Tensor) -> Tensor:
                return helpers.gather_and_pad_tensor(
                    values, ring_attn_group, pad, indices, batch, length
                )
        else:
            labels = torch.roll(sequences, shifts=-1, dims=1)
            mask = attention_mask
            positions = attention_mask.long().cumsum(-1) - 1
            positions.masked_fill_(attention_mask == 0, 1)

            def spread(values: Tensor) -> Tensor:
                return values

        temperature = float(getattr(self, "temperature", 1.0))
        with fused_head(self.model, labels, temperature=temperature, entropy=return_entropy) as got:
            output = self.model(sequences, attention_mask=mask, position_ids=positions)
        output["logits"] = None
        if return_entropy:
            output.entropy = spread(got["entropy"])[:, :-1]
        logps = spread(got["logps"])[:, :-1]
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
        return (logps, output) if return_output else logps

    return forward


def _hooks(head: bool, logits: bool, loss: str) -> Iterator[Hook]:
    checks.choice("loss", loss, ("dpo", "sppo"))
    actor = require_module("openrlhf.models.actor", TESTED)
    if logits:
        yield Hook(
            "openrlhf.models.utils", "log_probs_from_logits", "logits, labels, temperature",
            lambda _: log_probs_from_logits,
        )  # fmt: skip
    if head:
        yield Hook(actor, "unpad_and_slice_tensor", "sequences, attention_mask, ring_attn_group")
        yield Hook(
            actor, "gather_and_pad_tensor",
            "tensor, ring_attn_group, ring_attn_pad_len, indices, batch, seqlen",
        )  # fmt: skip
        yield Hook(
            "openrlhf.models.actor:Actor", "forward",
            "self, sequences, action_mask, attention_mask, return_output, allgather_logits, "
            "return_logprobs, ring_attn_group, packed_seq_lens, return_entropy",
            lambda original: actor_forward(original, actor),
        )  # fmt: skip
    if loss == "sppo":
        sides = "policy_chosen_logps, policy_rejected_logps"
        sides += ", " + sides.replace("policy", "reference")
        yield Hook(
            "openrlhf.models.loss", "DPOLoss", "beta, label_smoothing, ipo", lambda _: SPPOLoss
        )
        yield Hook("openrlhf.models.loss:DPOLoss", "forward", f"self, {sides}")


def patch(*, loss: str = "dpo", head: bool = True, logits: bool = True) -> None:
    """Put our operators behind OpenRLHF's names.

    Args:
        loss: "sppo" puts `SPPOLoss` in the place of `DPOLoss`; "dpo" keeps OpenRLHF's.
        head: `Actor.forward` computes log-probs (and entropies) from hidden states. A model whose
            head cannot be fused is refused by name at its first forward.
        logits: replace `log_probs_from_logits`, which is what is left where logits are used.

    Raises:
        ImportError: openrlhf, or a package that it needs, is not installed. IntegrationError: it is
            laid out otherwise than in the version tested, or patched already; nothing is changed
            then.
    """
    _installed.install(_hooks(head, logits, loss))


unpatch = _installed.uninstall
patched = _installed.scoped(patch)


def main() -> None:
    """Run a module of OpenRLHF patched: [--sppo] MODULE its arguments."""
    arguments = sys.argv[1:]
    loss = "dpo"
    if arguments[:1] == ["--sppo"]:
        loss, arguments = "sppo", arguments[1:]
    if not arguments:
        sys.exit(
            "usage: python -m sppo_kernels.integrations.openrlhf [--sppo] MODULE [ARGUMENT...]"
        )
    patch(loss=loss)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
