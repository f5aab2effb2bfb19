"""Pairwise objectives in SPPOTrainer: a step by hand, settings from flags, refusals."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sppo_kernels.trainer import SPPOConfig, SPPOTrainer
from tests.trainer.test_step import ETA, RATE, assert_same_weights, config, eager_logps
from tests.trainer_models import build, rows


def by_hand(kind, chosen, rejected, ref_chosen, ref_rejected, lengths):
    """Loss of one pair, from the equations."""
    a, b = chosen - ref_chosen, rejected - ref_rejected
    if kind == "simpo":
        margin = 0.4 * (chosen / lengths[0] - rejected / lengths[1]) - 0.9
        return -torch.nn.functional.logsigmoid(margin)
    if kind == "sppo_hard":  # beta = 1 / eta
        return (a - ETA / 2).square() + (b + ETA / 2).square()
    smoothing, x = 0.2, 0.3 * (a - b)
    positive, negative = (-torch.nn.functional.logsigmoid(s * x) for s in (1, -1))
    return (1 - smoothing) * positive + smoothing * negative


@pytest.mark.parametrize(
    ("kind", "head", "changes"),
    [
        ("dpo", "fused", {"beta": 0.3, "label_smoothing": 0.2}),
        ("simpo", "logits", {"beta": 0.4, "objective_settings": '{"margin": 0.9}'}),
        ("sppo_hard", "fused", {}),
    ],
)
def test_a_step_is_the_step_by_hand(kind, head, changes, generator, tmp_path):
    data = rows(generator, 3, 5)
    model = build("llama-untied").eval()
    hand = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rate = RATE / 10 if kind == "sppo_hard" else RATE  # its gradient is larger, by eta
    args = config(tmp_path, objective=kind, head=head, learning_rate=rate, **changes)
    assert args.pairs == "best_worst"
    trainer = SPPOTrainer(model, args, data)
    trainer.train()
    losses = []
    for row in data:
        logps, win = eager_logps(hand, row), row["win_rate"]
        best, worst = win.index(max(win)), win.index(min(win))
        lengths = [len(row["response_ids"][k]) for k in (best, worst)]
        pair = logps[[best, worst]]
        losses.append(by_hand(kind, *pair, *pair.detach(), lengths))  # its own start is π_ref
    loss = torch.stack(losses).mean()
    loss.backward()
    loss = float(loss.detach())
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter -= rate * parameter.grad
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert "logratio_margin" in trainer.state.log_history[0]
    assert_same_weights(model, hand.state_dict(), before)


def test_single_probability_is_the_win_rate_of_a_pair(generator, tmp_path):
    """Rows of two responses: `sppo_single` is `sppo`; rows of more are refused."""
    pairs = rows(generator, 3, 2)
    for row in pairs:
        row["win_rate"][1] = 1 - row["win_rate"][0]
    ends = []
    for kind in ("sppo", "sppo_single"):
        torch.manual_seed(0)
        model = build("llama-untied").eval()
        trainer = SPPOTrainer(model, config(tmp_path / kind, objective=kind), pairs)
        trainer.train()
        ends.append((trainer.state.log_history[0]["loss"], model.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-4, atol=1e-5)
    many = rows(generator, 2, 5)
    many[0]["win_rate"] = [0.9, 0.8, 0.7, 0.6, 0.5]
    trainer = SPPOTrainer(model, config(tmp_path / "many", objective="sppo_single"), many)
    with pytest.raises(ValueError, match="objective: 'sppo_single' needs the probability"):
        trainer.train()


def test_evaluation_reports_the_objective(generator, tmp_path):
    data = rows(generator, 2, 2)
    args = config(tmp_path, objective="hinge", beta=0.5)
    found = SPPOTrainer(build("qwen2"), args, data, data).evaluate()
    assert found["eval_loss"] == pytest.approx(1.0, rel=1e-5)  # its own reference: x = 0


def test_settings_from_flags(tmp_path):
    from transformers import HfArgumentParser

    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--objective", "alphapo"]
    flags += ["--objective_settings", '{"alpha": 0.2, "margin": 0.1}', "--beta", "2.5"]
    (args,) = HfArgumentParser(SPPOConfig).parse_args_into_dataclasses(flags)
    trainer = SPPOTrainer(build("qwen2"), args, rows(torch.Generator().manual_seed(1), 1, 2))
    assert trainer._loss_settings()["pairwise"] == {
        "kind": "alphapo", "alpha": 0.2, "margin": 0.1, "beta": 2.5, "label_smoothing": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "inpo"}, "objective: expected one of"),
        ({"objective": "kto"}, "objective: expected one of"),
        ({"objective": "rdpo"}, "alpha: kind='rdpo' needs it"),
        ({"objective": "hinge", "label_smoothing": 0.1}, "label_smoothing: kind='hinge' does not"),
        ({"objective": "dpo", "objective_settings": {"beta": 1.0}}, "beta has a setting of its"),
        ({"objective": "dpo", "objective_settings": [1]}, "objective_settings: expected names"),
        ({"objective": "dpo", "beta": -1.0}, "beta: expected a finite number above 0"),
        ({"beta": 0.1}, "beta: objective='sppo' does not take it"),
        ({"objective_settings": {"margin": 1.0}}, "objective_settings: objective='sppo'"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_every_kind_is_an_objective_or_needs_more():
    from sppo_kernels.loss.objectives import KINDS
    from sppo_kernels.trainer.config import OBJECTIVES

    assert set(KINDS) - set(OBJECTIVES) == {"inpo", "kto"}
