"""verl: its fused head, its log-probs from logits, and SPPO as a policy loss.

    import sppo_kernels.integrations.verl as sppo_verl
    sppo_verl.patch(eta=1.0)

or, without touching a script, VERL_USE_EXTERNAL_MODULES=sppo_kernels.integrations.verl_auto.

Follows verl 0.9.1: verl/utils/experimental/torch_functional.py, verl/utils/torch_functional.py,
verl/utils/kernel/linear_cross_entropy.py, verl/trainer/ppo/core_algos.py; the loss follows
recipe/sppo/dp_actor.py of verl 0.6.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import sppo_kernels as sk
from sppo_kernels import checks
from sppo_kernels.integrations._swap import Hook, Installed, IntegrationError, resolve

__all__ = [
    "compute_sppo_advantage", "compute_sppo_loss", "fused_linear_for_ppo", "linear_cross_entropy",
    "logprobs_from_logits", "patch", "patched", "sppo_policy_loss", "unpatch",
]  # fmt: skip

TESTED = "verl 0.9.1"
REDUCTIONS = ("none", "sum", "mean")
_installed = Installed("verl", TESTED)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of this name: log-probability of each label, from logits.

    Args:
        logits: [..., V], bfloat16, float16, float32 or float64.
        labels: [...], int64 or int32; −100 gives 0.
        inplace_backward: write the gradient into the memory of `logits`; autograd raises if
            another operator saved them.

    Returns:
        [...] float32 (float64 for float64), in nats. verl's own path without flash-attn returns
        the dtype of the logits, bfloat16 included.
    """
    return sk.token_logps(logits, labels, inplace_backward=inplace_backward)


def fused_linear_for_ppo(
    hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What verl's `FusedLinearForPPO.forward` returns: log-probabilities and entropies.

    Args:
        hidden_states: [T, D] or [B, T, D]; vocab_weights: [V, D].
        input_ids: [T] or [B, T], the token that each row predicts (rolled already).
        temperature: divides the logits, above 0.

    Returns:
        Both of the shape of `input_ids`, float32, in nats, and differentiable. verl's torch
        backend rounds the entropy to the dtype of `hidden_states`; this does not.

    Raises:
        IntegrationError: vocab_weights is a DTensor. TypeError, ValueError: as
            `sk.linear_token_stats`.
    """
    if hasattr(vocab_weights, "full_tensor"):
        raise IntegrationError(
            "vocab_weights: expected a plain tensor, got a DTensor; gather it with full_tensor()"
        )
    if isinstance(temperature, Tensor):
        raise TypeError("temperature: expected a number, got a tensor (one for each sample?)")
    stats = sk.linear_token_stats(
        hidden_states,
        vocab_weights.to(hidden_states.dtype),
        input_ids,
        outputs=("entropy",),
        logit_scale=1.0 / checks.positive("temperature", temperature),
    )
    return stats.logps, stats.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`, on any device.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...].
        reduction: of the log-probabilities, "none", "sum" or "mean".
        dist_process_group: must be None; a vocabulary split over ranks is refused.

    Returns:
        Log-probabilities, [N] of the flattened labels or [] when reduced, and entropies [N];
        float32, in nats, both differentiable.

    Raises:
        IntegrationError: a process group was given. ValueError: an unknown reduction.
    """
    if dist_process_group is not None:
        raise IntegrationError(
            "dist_process_group: expected None, got a process group; a vocabulary split over "
            "ranks (tensor parallelism) is not supported, keep verl's own kernel for it"
        )
    checks.choice("reduction", reduction.lower(), REDUCTIONS)
    logps, entropy = fused_linear_for_ppo(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature
    )
    if reduction.lower() != "none":
        logps = logps.sum() if reduction.lower() == "sum" else logps.mean()
    return logps, entropy


def compute_sppo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    rewards: Tensor,
    response_mask: Tensor,
    eta: float = 1.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of verl's SPPO recipe: mean of (Σ log π − Σ log π_old − η r)².

    Args:
        old_log_prob, log_prob: [B, T], in nats.
        rewards: [B], what the recipe calls preference: win rate − ½, or a centred reward.
        response_mask: [B, T]; a row without a token is left out of the mean.
        loss_agg_mode: "token-mean"; the recipe has no other (there it is an unbound variable).

    Returns:
        loss [], log-ratios [B], η r [B], as the recipe returns them.

    Raises:
        ValueError: another loss_agg_mode, or shapes that disagree.
    """
    checks.choice("loss_agg_mode", loss_agg_mode, ("token-mean",))
    checks.shape("old_log_prob", old_log_prob, log_prob.shape, "that of log_prob")
    checks.shape("response_mask", response_mask, log_prob.shape, "that of log_prob")
    checks.shape("rewards", rewards, log_prob.shape[:1], "one for each response")
    mask = response_mask.to(torch.float32)
    policy = (log_prob * mask).sum(1)
    old = (old_log_prob * mask).sum(1)
    scaled = eta * rewards
    # η r need not come from a win rate in [0, 1], so it goes into the reference: r − ½ = 0 there.
    even = torch.full_like(policy, 0.5)
    counted = response_mask.bool().any(1).to(policy.dtype)
    loss = sk.sppo_loss(policy, (old + scaled).detach(), even.detach(), eta=1.0, weights=counted)
    return loss, policy - old, scaled


def sppo_policy_loss(eta: float) -> Any:
    """A policy loss for verl's registry (`actor.policy_loss.loss_mode=sppo`).

    Every token of a response carries the same advantage, win rate − ½ (as
    `algorithm.adv_estimator=sppo` gives it). The function returned takes what verl passes
    (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
    rollout_is_weights) and returns the loss and its metrics. The loss is the mean over responses;
    with `global_batch_size` in `config.global_batch_info` a micro-batch gives its share of the mean
    over the global batch, times `dp_size`, as verl's own losses do.
    """
    eta = checks.positive("eta", eta)

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if rollout_is_weights is not None:
            raise IntegrationError("rollout_is_weights: expected None; SPPO has no ratio to weigh")
        mask = response_mask.to(torch.float32)
        rewards = (advantages * mask).sum(1) / mask.sum(1).clamp_min(1)
        loss, ratio, scaled = compute_sppo_loss(
            old_log_prob, log_prob, rewards, response_mask, eta, loss_agg_mode
        )
        loss = loss * _share(config, int(response_mask.bool().any(1).sum()))
        metrics = {
            "actor/log_ratio_mean": float(ratio.detach().mean()),
            "actor/preference_mean": float(scaled.detach().mean()),
        }
        return loss, metrics

    return loss


def _share(config: Any, counted: int) -> float:
    """What the mean over `counted` responses weighs in the mean over verl's global batch."""
    info = getattr(config, "global_batch_info", None) or {}
    ranks, total = info.get("dp_size") or 1, info.get("global_batch_size")
    if total is None:
        if ranks > 1:
            raise ValueError(f"global_batch_size: needed with dp_size={ranks}, got none")
        return 1.0
    return counted / float(total) * ranks


def compute_sppo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """An advantage estimator for verl (`algorithm.adv_estimator=sppo`): win rate − ½.

    Within a prompt's responses P_ij = σ(r_i − r_j), r the summed reward, and the win rate is the
    mean over the others (arXiv 2405.00675, section 4.2, with Bradley–Terry for the judge).

    Args:
        token_level_rewards, response_mask: [B, T].
        index: [B], the prompt of each response; every prompt needs at least two.

    Returns:
        advantages and returns, both [B, T]: win rate − ½ on the response's tokens, else 0.

    Raises:
        ValueError: a prompt with a single response.
    """
    scores = token_level_rewards.sum(-1).to(torch.float32)
    groups: dict[Any, list[int]] = {}
    for row, prompt in enumerate(index):
        groups.setdefault(prompt, []).append(row)
    centred = torch.empty_like(scores)
    for prompt, members in groups.items():
        if len(members) < 2:
            raise ValueError(f"index: expected at least 2 responses to a prompt, {prompt!r} has 1")
        rows = torch.tensor(members, device=scores.device)
        chosen = scores[rows]
        matrix = torch.sigmoid(chosen[:, None] - chosen[None, :])
        centred[rows] = sk.win_rates(matrix) - 0.5
    advantages = centred[:, None] * response_mask.to(centred.dtype)
    return advantages, advantages


_HEAD = (
    Hook(
        "verl.utils.torch_functional", "logprobs_from_logits", "logits, labels, inplace_backward",
        lambda _: logprobs_from_logits,
    ),
    Hook("verl.utils.experimental.torch_functional", "FusedLinearForPPO", "chunk_size"),
    Hook(
        "verl.utils.experimental.torch_functional:FusedLinearForPPO", "forward",
        "self, hidden_states, vocab_weights, input_ids, temperature",
        lambda _: lambda self, *args, **kwargs: fused_linear_for_ppo(*args, **kwargs),
    ),
    Hook(
        "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy", "forward",
        "ctx, hidden, weight, labels, temperature, reduction",
    ),
    Hook(
        "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", None,
        lambda _: linear_cross_entropy,
    ),
)  # fmt: skip


def _hooks(eta: float | None, head: bool) -> Iterator[Hook]:
    if head:
        yield from _HEAD
    if eta is not None:
        algorithms = "verl.trainer.ppo.core_algos"
        yield Hook(
            algorithms,
            "compute_policy_loss_vanilla",
            "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode",
        )
        for name, value in (
            ("POLICY_LOSS_REGISTRY", sppo_policy_loss(eta)),
            ("ADV_ESTIMATOR_REGISTRY", compute_sppo_advantage),
        ):
            registry = f"{algorithms}:{name}"
            resolve(registry, TESTED, dict)
            yield Hook(registry, "sppo", None, lambda _, value=value: value)


def patch(*, eta: float | None = None, head: bool = True) -> None:
    """Put our operators behind verl's names.

    Args:
        eta: also register SPPO: `actor.policy_loss.loss_mode=sppo` with this η, and
            `algorithm.adv_estimator=sppo`. None registers nothing.
        head: replace `logprobs_from_logits`, `FusedLinearForPPO.forward` (backends "torch" and
            "liger" alike) and `linear_cross_entropy`, also where verl's modules imported them.

    Raises:
        ImportError: verl, or a package that it needs, is not installed. IntegrationError: it is
            laid out otherwise than in the version tested, or patched already; nothing is changed
            then.
    """
    _installed.install(_hooks(eta, head))


unpatch = _installed.uninstall
patched = _installed.scoped(patch)
