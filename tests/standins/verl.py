"""The shape of verl 0.9.1: verl/utils/torch_functional.py, verl/utils/experimental/
torch_functional.py, verl/utils/kernel/linear_cross_entropy.py and verl/trainer/ppo/core_algos.py.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.standins import module


def logprobs_from_logits(logits, labels, inplace_backward=True):
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def _head(hidden, weight, labels, temperature):
    logits = (hidden @ weight.T).float() / temperature
    logp = torch.log_softmax(logits, -1)
    return logprobs_from_logits(logits, labels), -(logp.exp() * logp).sum(-1)


class FusedLinearForPPO(nn.Module):
    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        return _head(hidden_states, vocab_weights, input_ids, temperature)


class LinearCrossEntropy:
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        raise NotImplementedError("verl's kernel needs CUDA")

    @classmethod
    def apply(cls, *arguments):
        return cls.forward(None, *arguments)


def compute_policy_loss_vanilla(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    raise NotImplementedError


def modules():
    """Fresh modules, as `import` would find them; one of them imported a function by name."""
    policies, estimators = {"vanilla": compute_policy_loss_vanilla}, {}
    return {
        "verl": module("verl", __version__="0.9.1"),
        "verl.utils.torch_functional": module(
            "verl.utils.torch_functional", logprobs_from_logits=logprobs_from_logits
        ),
        "verl.utils.experimental.torch_functional": module(
            "verl.utils.experimental.torch_functional", FusedLinearForPPO=FusedLinearForPPO
        ),
        "verl.utils.kernel.linear_cross_entropy": module(
            "verl.utils.kernel.linear_cross_entropy",
            LinearCrossEntropy=LinearCrossEntropy,
            linear_cross_entropy=LinearCrossEntropy.apply,
        ),
        "verl.trainer.ppo.core_algos": module(
            "verl.trainer.ppo.core_algos",
            compute_policy_loss_vanilla=compute_policy_loss_vanilla,
            POLICY_LOSS_REGISTRY=policies,
            ADV_ESTIMATOR_REGISTRY=estimators,
            get_policy_loss_fn=policies.__getitem__,
            get_adv_estimator_fn=estimators.__getitem__,
        ),
        "verl.workers.engine.fsdp.transformer_impl": module(
            "verl.workers.engine.fsdp.transformer_impl", logprobs_from_logits=logprobs_from_logits
        ),
    }
