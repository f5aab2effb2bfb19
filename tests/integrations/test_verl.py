"""The verl adapter, on verl itself where it is importable and on a stand-in of its interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sppo_kernels.integrations import verl as adapter
from sppo_kernels.integrations._swap import IntegrationError
from sppo_kernels.testing import assert_within_budget
from tests import standins
from tests.standins import verl as standin

T, D, V = (2, 9), 24, 131  # odd sizes, so that nothing depends on a multiple


verl = standins.fixture(adapter, standin)


def case(generator, dtype=torch.float32):
    hidden = torch.randn(*T, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) / 2).to(dtype)
    labels = torch.randint(0, V, T, generator=generator)
    up = torch.randn(2, *T, generator=generator)  # gradients of log-probs and entropies
    return hidden, weight, labels, up


def run(function, hidden, weight, up, dtype=None):
    hidden = hidden.to(dtype or hidden.dtype, copy=True).requires_grad_()
    weight = weight.to(dtype or weight.dtype, copy=True).requires_grad_()
    logps, entropy = function(hidden, weight)
    up = up.to(logps.dtype).view(2, *logps.shape)
    torch.autograd.backward([logps, entropy], [up[0], up[1].to(entropy.dtype)])
    return [logps.detach(), entropy.detach(), hidden.grad, weight.grad]


def eager(labels, temperature):
    def function(hidden, weight):
        logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
        chosen = logp.gather(-1, labels[..., None])[..., 0]
        return chosen, -(logp.exp() * logp).sum(-1)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_for_ppo(verl, generator, dtype):
    """As verl's models call it, values and gradients of both outputs, against float64."""
    hidden, weight, labels, up = case(generator, dtype)
    module = verl("verl.utils.experimental.torch_functional")
    with adapter.patched():
        head = module.FusedLinearForPPO(impl_backend="torch")
        fused = run(
            lambda h, w: head.forward(
                hidden_states=h, vocab_weights=w, input_ids=labels, temperature=0.7
            ),
            hidden,
            weight,
            up,
        )
    truth = run(eager(labels, 0.7), hidden, weight, up, torch.float64)
    plain = run(eager(labels, 0.7), hidden, weight, up)
    assert fused[0].dtype == fused[1].dtype == torch.float32 and (fused[0] <= 0).all()
    for value, exact, same in zip(fused, truth, plain, strict=True):
        assert_within_budget(value, same, exact)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy(verl, generator, reduction):
    """Flattened outputs, reduced log-probs, and entropies that are not."""
    hidden, weight, labels, _ = case(generator)
    module = verl("verl.utils.kernel.linear_cross_entropy")
    with adapter.patched():
        logps, entropy = module.linear_cross_entropy(hidden, weight, labels, 1.3, reduction)
    exact, exact_entropy = eager(labels, 1.3)(hidden.double(), weight.double())
    exact = {"none": exact.flatten(), "sum": exact.sum(), "mean": exact.mean()}[reduction]
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy.flatten(), rtol=1e-5, atol=1e-5)


def test_what_is_not_supported_is_refused_by_name(generator):
    hidden, weight, labels, _ = case(generator)
    with pytest.raises(IntegrationError, match="dist_process_group: expected None"):
        adapter.linear_cross_entropy(hidden, weight, labels, dist_process_group=object())
    with pytest.raises(TypeError, match="temperature: expected a number"):
        adapter.fused_linear_for_ppo(hidden, weight, labels, torch.ones(2))
    with pytest.raises(ValueError, match="loss_agg_mode"):
        ones = torch.ones(2, 3)
        adapter.compute_sppo_loss(ones, ones, ones[:, 0], ones, 1.0, "seq-mean-token-sum")


def test_logprobs_from_logits_everywhere(verl, generator):
    """Also where a module of verl imported the function by name."""
    functional = verl("verl.utils.torch_functional")
    user = verl("verl.workers.engine.fsdp.transformer_impl")
    logits = torch.randn(*T, V, generator=generator)
    labels = torch.randint(0, V, T, generator=generator)
    up = torch.randn(T, generator=generator)
    theirs = functional.logprobs_from_logits(logits, labels)
    with adapter.patched():
        assert user.logprobs_from_logits is functional.logprobs_from_logits
        assert functional.logprobs_from_logits is adapter.logprobs_from_logits
        leaf = logits.clone().requires_grad_()
        ours = user.logprobs_from_logits(leaf * 1.0, labels)
        ours.backward(up)
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)
    exact = logits.double().requires_grad_()
    torch.log_softmax(exact, -1).gather(-1, labels[..., None])[..., 0].backward(up.double())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def recipe_loss(old, new, rewards, mask, eta):
    """verl's SPPO recipe, from its formula."""
    ratio = ((new - old) * mask).sum(1)
    kept = mask.bool().any(1)
    return ((ratio - eta * rewards) ** 2)[kept].mean(), ratio, eta * rewards


def test_recipe_loss(generator):
    """Same numbers and gradient as the recipe's, rewards beyond ±½ and an empty row included."""
    new = torch.randn(5, 7, generator=generator).requires_grad_()
    old, rewards = torch.randn(5, 7, generator=generator), 3 * torch.randn(5, generator=generator)
    mask = torch.randint(0, 2, (5, 7), generator=generator)
    mask[0], mask[1, 0] = 0, 1
    loss, ratio, scaled = adapter.compute_sppo_loss(old, new, rewards, mask, eta=2.5)
    loss.backward()
    exact = new.detach().double().requires_grad_()
    truth = recipe_loss(old.double(), exact, rewards.double(), mask, 2.5)
    truth[0].backward()
    for value, right in ((loss, truth[0]), (ratio, truth[1]), (scaled, truth[2])):
        torch.testing.assert_close(value.detach().double(), right.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_registered_loss_and_advantage(verl, generator):
    """The two entries of verl's registries, called with the keywords that verl uses."""
    algorithms = verl("verl.trainer.ppo.core_algos")
    rewards = torch.randn(6, 4, generator=generator)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2, 2:] = False
    with adapter.patched(eta=2.0, head=False):
        estimate = algorithms.get_adv_estimator_fn("sppo")
        advantages, _ = estimate(
            token_level_rewards=rewards, response_mask=mask, config=None, index=list("aababb")
        )
        old, new = torch.randn(2, 6, 4, generator=generator)
        loss, metrics = algorithms.get_policy_loss_fn("sppo")(
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
            loss_agg_mode="token-mean", config=None, rollout_is_weights=None,
        )  # fmt: skip
        parts = []
        for rows in (slice(0, 2), slice(2, 6)):  # micro-batches of one global batch, on 4 ranks
            config = SimpleNamespace(global_batch_info={"dp_size": 4, "global_batch_size": 6})
            part, _ = algorithms.get_policy_loss_fn("sppo")(
                old_log_prob=old[rows], log_prob=new[rows], advantages=advantages[rows],
                response_mask=mask[rows], loss_agg_mode="token-mean", config=config,
            )  # fmt: skip
            parts.append(part)
    torch.testing.assert_close(sum(parts), 4 * loss, rtol=1e-5, atol=1e-5)
    score = rewards.double().sum(1)
    prompt = torch.tensor([0, 0, 1, 0, 1, 1])
    beats = torch.sigmoid(score[:, None] - score[None])
    others = (prompt[:, None] == prompt[None]) & ~torch.eye(6, dtype=torch.bool)
    centred = (beats * others).sum(1) / others.sum(1) - 0.5
    torch.testing.assert_close(advantages.double(), centred[:, None] * mask)
    truth = recipe_loss(old.double(), new.double(), centred, mask, 2.0)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-5)
    assert metrics["actor/log_ratio_mean"] == pytest.approx(float(truth[1].mean()), rel=1e-4)
    with pytest.raises(ValueError, match="at least 2 responses"):
        adapter.compute_sppo_advantage(rewards, mask, list("aababc"))


def test_external_modules_patch_verl_itself():
    """The variable of the documentation, in a process of its own."""
    pytest.importorskip("verl")
    code = (
        "import verl.utils.torch_functional as f, verl.trainer.ppo.core_algos as c;"
        "print(f.logprobs_from_logits.__module__, c.get_policy_loss_fn('sppo').__module__)"
    )
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": "sppo_kernels.integrations.verl_auto",
        "SPPO_KERNELS_ETA": "2.5",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["sppo_kernels.integrations.verl"] * 2
