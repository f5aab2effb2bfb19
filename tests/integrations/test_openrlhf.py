"""The OpenRLHF adapter, on OpenRLHF where it is importable and on a stand-in of its interface."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("transformers")

from sppo_kernels.integrations import openrlhf as adapter
from sppo_kernels.integrations._swap import IntegrationError
from sppo_kernels.testing import assert_within_budget, relative_error
from tests import standins
from tests.standins import openrlhf as standin
from tests.trainer_models import VOCAB, build

openrlhf = standins.fixture(adapter, standin)


def actor_of(openrlhf, model, packing=False):
    actor = openrlhf("openrlhf.models.actor").Actor(model)
    actor.packing_samples = packing
    return actor


def batch(generator):
    """Three rows, one padded on the right; as DPO's collator gives them."""
    ids = torch.randint(3, VOCAB, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def gradients(model, logps, up):
    model.zero_grad()
    (logps * up).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# untied head; packed input; softcap; scale; a bias
@pytest.mark.parametrize(
    "family, packing",
    [
        ("llama-untied", False),
        ("llama-untied", True),
        ("gemma2-softcap", False),
        ("cohere-scale", False),
        ("phi-bias", False),
    ],
)
def test_actor_forward(openrlhf, generator, family, packing):
    """Log-probs and every gradient as the DPO trainer asks for them; and float64 as truth."""
    model = build(family)
    actor = actor_of(openrlhf, model, packing)
    ids, mask = batch(generator)
    asked = {"attention_mask": mask, "return_output": True, "return_logprobs": True}
    up = torch.randn(3, 7, generator=generator) * mask[:, 1:]
    eager, _ = actor(ids, **asked)
    plain = gradients(model, eager, up)
    with adapter.patched():
        logps, output = actor(ids, **asked)
        assert output["logits"] is None and logps.dtype == torch.float32
        found = gradients(model, logps, up)
    if not packing:  # packed rows attend to one another here: only flash attention keeps them apart
        truth_model = build(family, torch.float64)
        truth_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        logits = truth_model(ids, attention_mask=mask, position_ids=positions).logits
        exact = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        kept = mask[:, 1:].bool()
        assert_within_budget(logps[kept], eager[kept], exact[kept])
    torch.testing.assert_close(logps * mask[:, 1:], eager * mask[:, 1:], rtol=1e-5, atol=2e-5)
    assert relative_error(found, plain) < 1e-4


def test_actions_entropy_and_temperature(openrlhf, generator):
    """What PPO asks for: the last tokens' log-probs under a mask, the entropy, a temperature."""
    model = build("llama-untied")
    actor = actor_of(openrlhf, model)
    actor.temperature = 0.7
    ids, mask = batch(generator)
    action_mask = mask[:, -4:].bool()
    asked = {"attention_mask": mask, "return_output": True, "return_entropy": True}
    with adapter.patched():
        logps, output = actor(ids, action_mask, **asked)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits.double() / 0.7
    exact = torch.log_softmax(logits, -1)[:, :-1]
    chosen = exact.gather(-1, ids[:, 1:, None])[..., 0][:, -4:] * action_mask
    torch.testing.assert_close(logps.double(), chosen, rtol=1e-4, atol=1e-4)
    entropy = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(output.entropy.double(), entropy, rtol=1e-4, atol=1e-4)


def test_lora_reference_and_logits_requests(openrlhf, generator):
    """LoRA on the head is part of it, disabled or not; where logits are asked for, they come."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama-untied"), config)
    actor = actor_of(openrlhf, model)
    ids, mask = batch(generator)
    asked = {"attention_mask": mask, "return_logprobs": True}
    adapted = actor(ids, **asked)
    with model.disable_adapter():
        plain = actor(ids, **asked)
    with adapter.patched():
        torch.testing.assert_close(actor(ids, **asked), adapted, rtol=1e-5, atol=2e-5)
        with model.disable_adapter():
            torch.testing.assert_close(actor(ids, **asked), plain, rtol=1e-5, atol=2e-5)
        output = actor(ids, attention_mask=mask, return_output=True)
        assert output["logits"].shape == (3, 8, VOCAB)
    assert float((adapted - plain).detach().abs().max()) > 1e-2


def test_a_head_with_something_in_it_is_refused(openrlhf, generator):
    """A model whose logits are not the head's is named at its first forward, not miscomputed."""
    model = build("llama-untied")
    model.lm_head.register_forward_hook(lambda m, i, out: out * 1.5)
    actor = actor_of(openrlhf, model)
    ids, mask = batch(generator)
    with adapter.patched(), pytest.raises(IntegrationError, match="LlamaForCausalLM cannot be fus"):
        actor(ids, attention_mask=mask, return_logprobs=True)


def test_sppo_loss_in_the_place_of_dpo(openrlhf, generator):
    """Built and called as DPOTrainer does; the value and gradient are TRL's sppo_hard."""
    trainer = openrlhf("openrlhf.trainer.dpo_trainer")
    chosen, rejected, ref_c, ref_r = torch.randn(4, 5, generator=generator)
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    with adapter.patched(loss="sppo", head=False):
        assert trainer.DPOLoss is adapter.SPPOLoss
        loss_fn = trainer.DPOLoss(0.02, 0.0, False)
        loss, good, bad = loss_fn(chosen, rejected, ref_c, ref_r)
    loss.backward()
    c, r = chosen.detach().double().requires_grad_(), rejected.detach().double().requires_grad_()
    exact = ((c - ref_c - 0.5 / 0.02) ** 2 + (r - ref_r + 0.5 / 0.02) ** 2).mean()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(chosen.grad.double(), c.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rejected.grad.double(), r.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(good, 0.02 * (chosen - ref_c).detach())
    torch.testing.assert_close(bad, 0.02 * (rejected - ref_r).detach())
    win, lose = torch.rand(2, 5, generator=generator)
    soft, *_ = loss_fn(chosen, rejected, ref_c, ref_r, win, lose)
    parts = (c - ref_c - (win - 0.5) / 0.02) ** 2 + (r - ref_r - (lose - 0.5) / 0.02) ** 2
    torch.testing.assert_close(soft.double(), parts.mean() / 2, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="ipo: expected False"):
        adapter.SPPOLoss(0.1, ipo=True)
    with pytest.raises(ValueError, match="rejected_win"):
        loss_fn(chosen, rejected, ref_c, ref_r, win)


def test_log_probs_from_logits(openrlhf, generator):
    """In every module that imported it."""
    utils, actor = openrlhf("openrlhf.models.utils"), openrlhf("openrlhf.models.actor")
    logits = torch.randn(2, 5, 37, generator=generator)
    labels = torch.randint(0, 37, (2, 5), generator=generator)
    with adapter.patched(head=False):
        assert actor.log_probs_from_logits is adapter.log_probs_from_logits
        value = utils.log_probs_from_logits(logits, labels, temperature=1.7)
    exact = torch.log_softmax(logits.double() / 1.7, -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_command_runs_a_module_patched(openrlhf, monkeypatch, tmp_path):
    """`python -m sppo_kernels.integrations.openrlhf --sppo MODULE ...`, in this process."""
    (tmp_path / "a_script.py").write_text(
        "import sys, openrlhf.models.loss as m\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['--flag', '3']\n"
        "print('found', m.DPOLoss.__name__)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adapter", "--sppo", "a_script", "--flag", "3"])
    adapter.main()
    assert openrlhf("openrlhf.models.loss").DPOLoss is adapter.SPPOLoss
