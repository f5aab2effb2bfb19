"""SoftSPPOTrainer: TRL's numbers where TRL has the loss, eager numbers where it has not."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from trl import DPOTrainer

import sppo_kernels as sk
from sppo_kernels.integrations.trl import SoftSPPOConfig, SoftSPPOTrainer
from tests import trl_tools as tools
from tests.trainer.test_step import assert_same_weights
from tests.trainer_models import build

SAME = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
SAME += ("logps/chosen", "logps/rejected", "num_tokens")


@pytest.mark.parametrize("family", ["llama-untied", "gemma2-softcap"])
def test_sppo_hard_is_that_of_trl(family, generator, tmp_path):
    """Twenty steps; losses, TRL's own metrics, and weights."""
    steps, accumulate = (20, 2) if family == "llama-untied" else (4, 1)
    data = tools.pairs(generator, steps * accumulate * 2)
    model = build(family).eval()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    common = {"loss_type": "sppo_hard", "max_steps": steps}
    common["gradient_accumulation_steps"] = accumulate
    ours = tools.trainer(model, data, tmp_path / "ours", **common)
    theirs = tools.trainer(other, data, tmp_path / "trl", kind=DPOTrainer, **common)
    ours.train()
    theirs.train()
    assert len(tools.losses(ours)) == steps
    torch.testing.assert_close(tools.losses(ours), tools.losses(theirs), rtol=1e-4, atol=1e-4)
    for name in SAME:
        a, b = tools.losses(ours, name), tools.losses(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert_same_weights(model, other.state_dict(), before, tolerance=1e-3)


@pytest.mark.parametrize("kind", ["sppo", "sppo_single", "groups", "win_rate"])
@pytest.mark.parametrize("lora", [False, True])
def test_soft_losses_are_those_of_eager_code(kind, lora, generator, tmp_path):
    steps, beta, rate = 3, 0.2, 1e-3
    rows = tools.groups if kind == "groups" else tools.pairs
    changes = {"loss_type": "sppo_single" if kind == "sppo_single" else "sppo"}
    if kind == "win_rate":
        changes["loss_units"], rate = "win_rate", 0.05
    base = build("llama-tied" if kind == "sppo" else "llama-untied").eval()
    peft = None
    if lora:
        peft = pytest.importorskip("peft").LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
    hand = copy.deepcopy(base)
    trainer = tools.trainer(
        base,
        rows(generator, steps * 2),
        tmp_path,
        ref=not lora,
        peft=peft,
        max_steps=steps,
        learning_rate=rate,
        **changes,
    )
    reference = copy.deepcopy(hand)
    if lora:
        import peft as library

        hand = library.get_peft_model(hand, peft)
        hand.load_state_dict(trainer.model.state_dict())
    before = copy.deepcopy(trainer.model.state_dict())
    parameters = [p for p in hand.parameters() if p.requires_grad]
    expected = []
    for step in range(steps):
        batch = [trainer.train_dataset[2 * step + i] for i in range(2)]
        residuals = []
        for row in batch:
            with torch.no_grad():
                ref = tools.eager_logps(reference, row)
            if kind == "groups":
                win = torch.tensor(row["win_rate"])
                target = (win - 0.5) / beta
            elif kind == "sppo_single":  # uclaml/SPPO sppo/trainer.py, loss_type "sppo_single"
                target = torch.tensor([1.0, -1.0]) * (row["chosen_probs"] - 0.5) / beta
            else:  # and "sppo"
                win = torch.tensor([row["chosen_probs_win"], row["chosen_probs_lose"]])
                target = (win - 0.5) / beta
            residuals.append(tools.eager_logps(hand, row) - ref - target)
        residual = torch.cat(residuals) * (beta if kind == "win_rate" else 1.0)
        loss = residual.square().mean()
        expected.append(float(loss.detach()))
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= rate * g
    trainer.train()
    torch.testing.assert_close(tools.losses(trainer), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert_same_weights(trainer.model, hand.state_dict(), before, tolerance=1e-3)
    shown = tools.losses(trainer, "sppo/loss_win_rate")
    scale = 1.0 if kind == "win_rate" else beta**2
    torch.testing.assert_close(shown, torch.tensor(expected) * scale, rtol=1e-4, atol=1e-6)


def test_groups_are_those_of_our_own_trainer(generator, tmp_path):
    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

    steps = 3
    data = [row for row in tools.groups(generator, 8) if len(row["responses"]) > 2]
    model = build("llama-untied").eval()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    ours = tools.trainer(model, data, tmp_path / "trl", max_steps=steps)
    ids = [
        {k: row[k] for k in ("prompt_ids", "response_ids", "win_rate")}
        for row in ours.train_dataset
    ]
    changes = {"max_steps": steps, "eta": 5.0, "loss_units": "log_ratio"}
    own = tools.settings(tmp_path / "own") | changes
    own.pop("beta")
    theirs = SPPOTrainer(other, SPPOConfig(**own), ids)
    ours.train()
    theirs.train()
    torch.testing.assert_close(tools.losses(ours), tools.losses(theirs), rtol=1e-4, atol=1e-4)
    assert_same_weights(model, other.state_dict(), before, tolerance=1e-3)


@pytest.mark.parametrize("layout", ["pairs", "groups"])
def test_cached_and_online_reference_agree(layout, generator, tmp_path):
    data = getattr(tools, layout)(generator, 6)
    model = build("llama-untied").eval()
    found = []
    for cached in (False, True):
        trainer = tools.trainer(
            copy.deepcopy(model),
            data,
            tmp_path / "out",
            ref=not cached,
            evaluation=data,
            max_steps=3,
            precompute_ref_log_probs=cached,
            precompute_ref_batch_size=3,
        )
        assert ("ref_logps" in trainer.train_dataset.column_names) == cached
        trainer.train()
        found.append((tools.losses(trainer), trainer.evaluate()["eval_loss"]))
    online, cached = found
    torch.testing.assert_close(cached[0], online[0], rtol=1e-5, atol=1e-5)
    assert cached[1] == pytest.approx(online[1], rel=1e-5)


def test_the_cached_reference_is_read_again(generator, tmp_path, monkeypatch):
    from datasets import Dataset, load_from_disk

    from sppo_kernels.trainer import reference

    Dataset.from_list(tools.groups(generator, 5)).save_to_disk(str(tmp_path / "data"))
    model = build("llama-untied").eval()

    def made(**changes):
        args = tools.settings(tmp_path / "out", precompute_ref_log_probs=True, **changes)
        return SoftSPPOTrainer(
            copy.deepcopy(model),
            args=SoftSPPOConfig(**args),
            train_dataset=load_from_disk(str(tmp_path / "data")),
            processing_class=tools.tokenizer(),
        )

    first = made()
    calls = []
    compute = reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *a: calls.append(1) or compute(*a))
    again = made()
    assert again.train_dataset["ref_logps"] == first.train_dataset["ref_logps"] and not calls
    made(max_length=8)  # other tokens
    assert len(calls) == 1
    with torch.no_grad():
        model.lm_head.weight += 1e-3  # another reference
    made()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "case", ["fp32", "bf16", "checkpointing", "budget", "lora", "lora-checkpointing", "adapter"]
)
def test_first_loss_is_exact(case, generator, tmp_path):
    """Policy and reference are equal, so the log-ratios are exactly 0."""
    data = tools.groups(generator, 4)
    changes = {"bf16": case == "bf16", "max_steps": 1}
    changes["gradient_checkpointing"] = case.endswith("checkpointing")
    if case == "budget":
        changes["memory_budget"] = 4 * 211 * 20  # logits of 20 rows
    peft = None
    model = build("llama-untied")
    if case.startswith("lora") or case == "adapter":
        library = pytest.importorskip("peft")
        peft = library.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        if case == "adapter":  # trained before: TRL keeps a copy of it as the reference
            peft.init_lora_weights = False
            model, peft = library.get_peft_model(model, peft), None
    full = peft is None and case != "adapter"
    trainer = tools.trainer(model, data, tmp_path, ref=full, peft=peft, **changes)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and (full or all("lora_" in n and ".ref." not in n for n in moved))
    win = torch.tensor([w for row in data[:2] for w in row["win_rate"]])
    expected = sk.sppo_loss(torch.zeros_like(win), torch.zeros_like(win), win, eta=5.0)
    assert tools.losses(trainer)[0] == pytest.approx(float(expected), rel=1e-7)
    assert tools.losses(trainer, "sppo/kl")[0] == 0.0


def test_other_losses_are_the_parents(generator, tmp_path):
    data = tools.pairs(generator, 6)
    model = build("llama-untied").eval()
    runs = []
    for kind in (None, DPOTrainer):
        trainer = tools.trainer(
            copy.deepcopy(model), data, tmp_path, kind=kind, loss_type=["sigmoid"], max_steps=3
        )
        trainer.train()
        runs.append((tools.losses(trainer), tools.losses(trainer, "entropy")))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    config = SoftSPPOConfig(**tools.settings(tmp_path, beta=None, loss_type=["sigmoid"]))
    assert config.beta == 0.1 and config.soft is None
    config = SoftSPPOConfig(**tools.settings(tmp_path, beta=None))
    assert config.eta == 1000.0 and config.soft == "sppo"


def test_mixture_of_experts_keeps_its_balancing_loss(generator, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.trainer_models import GQA

    config = MixtralConfig(**GQA, num_local_experts=4, router_aux_loss_coef=0.5)
    model = MixtralForCausalLM(config).eval()
    data = tools.pairs(generator, 4)
    runs = []
    for kind in (None, DPOTrainer):
        trainer = tools.trainer(
            copy.deepcopy(model), data, tmp_path, kind=kind, loss_type="sppo_hard", max_steps=2
        )
        trainer.train()
        runs.append((tools.losses(trainer), tools.losses(trainer, "aux_loss")))
    assert float(runs[0][1].min()) > 0
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-5)


def test_prompt_learning(generator, tmp_path):
    """Virtual tokens before the real ones shift the rows that predict the responses."""
    peft = pytest.importorskip("peft")
    data = tools.pairs(generator, 2)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = tools.trainer(
        build("llama-untied").eval(), data, tmp_path, ref=False, peft=config, max_steps=1
    )
    rows = [trainer.train_dataset[i] for i in range(2)]
    batch = trainer.data_collator(rows)
    host = batch["sppo"]
    with torch.no_grad():
        tensors = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logps = trainer._forward.loss(trainer.model, host, **tensors)[1]
        expected = torch.cat([tools.eager_logps(trainer.model, row) for row in rows])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    assert (expected - torch.cat([tools.eager_logps(build("llama-untied"), r) for r in rows])).any()
    trainer.train()
    assert torch.isfinite(tools.losses(trainer)).all()


def test_evaluation(generator, tmp_path):
    data, held = tools.groups(generator, 2), tools.groups(generator, 4)
    model = build("llama-untied").eval()
    reference = build("llama-untied").eval()
    trainer = tools.trainer(model, data, tmp_path, evaluation=held, max_steps=1)
    trainer.ref_model.load_state_dict(reference.state_dict())
    found = trainer.evaluate()
    with torch.no_grad():
        parts = []
        for row in trainer.eval_dataset:
            ratio = tools.eager_logps(model, row) - tools.eager_logps(reference, row)
            parts.append((ratio - (torch.tensor(row["win_rate"]) - 0.5) / 0.2).square())
    batches = [torch.cat(parts[i : i + 2]).mean() for i in (0, 2)]
    assert found["eval_loss"] == pytest.approx(float(sum(batches)) / 2, rel=1e-5)
    assert found["eval_sppo/loss_win_rate"] == pytest.approx(
        float(torch.cat(parts).mean()) * 0.2**2, rel=1e-5
    )
    from datasets import Dataset

    given = trainer.evaluate({"held": Dataset.from_list(held)})  # raw rows, by the parent's rules
    assert given["eval_held_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)


def test_compute_metrics_sees_logits(generator, tmp_path):
    data = tools.pairs(generator, 2)
    trainer = tools.trainer(build("llama-untied"), data, tmp_path, evaluation=data)
    seen = []
    trainer.compute_metrics = lambda p: seen.append(p.predictions.shape) or {"one": 1.0}
    assert trainer.evaluate()["eval_one"] == 1.0
    assert seen[0][0] == 4 and seen[0][-1] == 211


def test_resume_from_a_checkpoint(generator, tmp_path):
    data = tools.groups(generator, 12)
    model = build("llama-untied").eval()
    changes = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = tools.trainer(copy.deepcopy(model), data, tmp_path, **changes)
    whole.train()
    resumed = tools.trainer(model, data, tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(tools.losses(resumed), tools.losses(whole))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    card = (tmp_path / "README.md").read_text()
    assert "Self-Play Preference Optimization" in card


def test_streams(generator, tmp_path):
    from datasets import Dataset

    data = tools.groups(generator, 4)
    model = build("llama-untied").eval()
    mapped = tools.trainer(copy.deepcopy(model), data, tmp_path, max_steps=2)
    mapped.train()
    args = SoftSPPOConfig(**tools.settings(tmp_path, max_steps=2))
    streamed = SoftSPPOTrainer(
        model,
        copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list(data).to_iterable_dataset(),
        processing_class=tools.tokenizer(),
    )
    streamed.train()
    assert torch.equal(tools.losses(streamed), tools.losses(mapped))


@pytest.mark.parametrize("kind", ["sppo", "sigmoid"])
def test_with_trl_patched(kind, generator, tmp_path):
    """`patched()` replaces TRL's function, which a loss of TRL's calls and ours does not."""
    from sppo_kernels.integrations import trl

    data = tools.pairs(generator, 4)
    model = build("llama-untied").eval()
    plain = tools.trainer(copy.deepcopy(model), data, tmp_path, loss_type=kind, max_steps=2)
    plain.train()
    with trl.patched():
        trainer = tools.trainer(copy.deepcopy(model), data, tmp_path, loss_type=kind, max_steps=2)
        trainer.train()
    torch.testing.assert_close(tools.losses(trainer), tools.losses(plain), rtol=1e-5, atol=1e-5)
