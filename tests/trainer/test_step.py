"""A step of SPPOTrainer equals a step written by hand with the model's own logits."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sppo_kernels.trainer import SPPOConfig, SPPOTrainer
from tests.trainer_models import FAMILIES, build, rows

ETA, RATE = 7.0, 0.02


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "eta": ETA,
        "loss_units": "log_ratio",
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "train_sampling_strategy": "sequential",
    }
    return SPPOConfig(**(settings | changes))


def eager_logps(model, row):
    """log π(y|x) of each response, one unpadded forward at a time, in fp32."""
    found = []
    for response in row["response_ids"]:
        ids = torch.tensor([row["prompt_ids"] + response])
        logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
        start = len(row["prompt_ids"])
        tokens = torch.tensor(response)
        found.append(logp[0, start - 1 : -1].gather(-1, tokens[:, None]).sum())
    return torch.stack(found)


def eager_step(model, ref, batch, rate=RATE):
    """One step of plain gradient descent on the mean of the paper's loss; returns the loss."""
    logps = torch.cat([eager_logps(model, row) for row in batch])
    win = torch.tensor([w for row in batch for w in row["win_rate"]])
    loss = (logps - ref - ETA * (win - 0.5)).square().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter, grad in zip(
        parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
    ):
        if grad is not None:
            with torch.no_grad():
                parameter -= rate * grad
    return float(loss.detach())


def assert_same_weights(model, expected, before, tolerance=1e-4):
    """Updated weights agree to within `tolerance` of the largest update."""
    largest = max(
        float((expected[name] - before[name]).abs().max())
        for name in expected
        if expected[name].is_floating_point()
    )
    assert largest > 0
    for name, value in model.state_dict().items():
        gap = float((value - expected[name]).abs().max())
        assert gap <= tolerance * largest, f"{name}: {gap} of {largest}"


def run_both(family, packing, responses, generator, tmp_path, *, lora=False, rate=RATE, **changes):
    """Losses and models of the trainer and of the hand-written step, from one start."""
    model = build(family).eval()
    if lora:
        peft = pytest.importorskip("peft")
        from transformers.pytorch_utils import Conv1D

        linear = (torch.nn.Linear, Conv1D)
        head = model.get_output_embeddings()
        names = {
            n.split(".")[-1]
            for n, m in model.named_modules()
            if isinstance(m, linear) and m != head
        }
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
        )
    data = rows(generator, 3, responses, hard=responses == 2)
    hand = copy.deepcopy(model)
    with torch.no_grad():
        if lora:
            with hand.disable_adapter():
                ref = torch.cat([eager_logps(hand, row) for row in data])
        else:
            ref = torch.cat([eager_logps(hand, row) for row in data])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = config(tmp_path, packing=packing, learning_rate=rate, **changes)
    trainer = SPPOTrainer(model, args, data)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    expected = eager_step(hand, ref, data, rate)
    return loss, expected, trainer, hand.state_dict(), before


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_step(family, packing, generator, tmp_path):
    # K alternates over the cases: each family sees 2 (hard labels) and 5 (soft ones).
    responses = 2 if (len(family) + len(packing)) % 2 else 5
    loss, expected, trainer, weights, before = run_both(
        family, packing, responses, generator, tmp_path, head="fused"
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_weights(trainer.model, weights, before)


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma2-softcap", "phi-bias"])
def test_lora_step_keeps_the_head_frozen(family, packing, generator, tmp_path):
    loss, expected, trainer, weights, before = run_both(
        family, packing, 5, generator, tmp_path, lora=True, head="fused"
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_weights(trainer.model, weights, before)
    changed = [n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_lora_on_the_head(generator, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build("llama-untied").eval(),
        peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    data = rows(generator, 3)
    hand = copy.deepcopy(model)
    with torch.no_grad(), hand.disable_adapter():
        ref = torch.cat([eager_logps(hand, row) for row in data])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = SPPOTrainer(model, config(tmp_path, head="fused", learning_rate=RATE), data)
    trainer.train()
    expected = eager_step(hand, ref, data)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert_same_weights(model, hand.state_dict(), before)
    assert not torch.equal(
        model.state_dict()["base_model.model.lm_head.lora_A.default.weight"],
        before["base_model.model.lm_head.lora_A.default.weight"],
    )


def test_logits_in_step(generator, tmp_path):
    loss, expected, trainer, weights, before = run_both(
        "llama-untied", "shared", 5, generator, tmp_path, head="logits"
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_weights(trainer.model, weights, before)


def test_gradient_checkpointing_and_long_groups(generator, tmp_path, monkeypatch):
    # Units of 16 tokens force the path of long prompts: prompt and responses apart.
    monkeypatch.setattr("sppo_kernels.data.layout.UNIT_TOKENS", 16)
    loss, expected, trainer, weights, before = run_both(
        "mistral-window", "shared", 5, generator, tmp_path, gradient_checkpointing=True
    )
    assert trainer.model.is_gradient_checkpointing
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_weights(trainer.model, weights, before)


def test_accumulated_steps_weigh_by_responses(generator, tmp_path):
    # Prompts with 2, 5 and 3 responses in batches of one: the same step as all at once.
    data = [rows(generator, 1, k)[0] for k in (2, 5, 3)]
    model = build("llama-tied").eval()
    hand, before = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        ref = torch.cat([eager_logps(hand, row) for row in data])
    args = config(
        tmp_path,
        learning_rate=RATE,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    trainer = SPPOTrainer(model, args, data)
    trainer.train()
    expected = eager_step(hand, ref, data)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert_same_weights(model, hand.state_dict(), before)


def test_bf16_autocast_stays_close(generator, tmp_path):
    data = rows(generator, 3)
    model = build("llama-untied").eval()
    with torch.no_grad():
        ref = [eager_logps(model, row) for row in data]
    win = torch.tensor([w for row in data for w in row["win_rate"]])
    trainer = SPPOTrainer(model, config(tmp_path, bf16=True, learning_rate=RATE), data)
    trainer.train()
    # Policy and reference run in the same precision: the closed form, up to the rounding of batches
    # of other shapes (a reference in fp32 would be off by more).
    expected = float((ETA * (win - 0.5)).square().mean())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-2)
    stored = torch.tensor([x for r in trainer.train_dataset["ref_logps"] for x in r])
    assert (stored - torch.cat(ref)).abs().max() < 1.0
    assert (stored - torch.cat(ref)).abs().max() > 0  # it did run in bfloat16


def test_step_zero_is_the_closed_form(generator, tmp_path):
    data = rows(generator, 1)
    trainer = SPPOTrainer(build("qwen2"), config(tmp_path), data)
    trainer.prepare()
    win = torch.tensor(data[0]["win_rate"])
    expected = float((ETA * (win - 0.5)).square().mean())
    assert trainer.step_zero_check() == pytest.approx(expected, rel=1e-6)


def test_dpo_objective_on_the_best_and_worst_response(generator, tmp_path):
    data = rows(generator, 3, 5)
    model = build("llama-untied").eval()
    hand = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = config(tmp_path, objective="dpo", dpo_beta=0.5, head="fused")
    trainer = SPPOTrainer(model, args, data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    margins = []
    for row in data:
        logps, win = eager_logps(hand, row), row["win_rate"]
        margin = logps[win.index(max(win))] - logps[win.index(min(win))]
        margins.append(margin - margin.detach())  # the reference is the start itself
    loss = -torch.nn.functional.logsigmoid(0.5 * torch.stack(margins)).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter -= RATE * parameter.grad
    assert_same_weights(model, hand.state_dict(), before)
