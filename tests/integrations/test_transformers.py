"""The transformers functions in the ways people call them, and the recipes of examples/."""

import copy
import gc
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import sppo_kernels as sk
from sppo_kernels.integrations.transformers import (
    model_sequence_logps,
    model_sppo_loss,
    model_token_logps,
)
from sppo_kernels.models import probe
from sppo_kernels.models.head import HeadProbeError
from tests.head_cases import V, assert_same_gradients, batch, eager_logps, llama

ROOT = Path(__file__).resolve().parents[2]


def recipe(capsys, monkeypatch, script, *arguments):
    """What a script of examples/ prints, run as users run it but without a new interpreter."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    try:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    return capsys.readouterr().out


def two_processes(script, *arguments):
    """What the first of two processes prints, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"PYTHONFAULTHANDLER": "1"}  # SIGABRT then prints where a process waits
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            env={**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    end = time.monotonic() + 600  # against a hang alone: a busy machine takes minutes
    while time.monotonic() < end and any(p.poll() is None for p in running):
        if any(p.poll() for p in running):  # one failed: the other would wait for it
            break
        time.sleep(0.2)
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(outputs)
    return outputs[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"units": "win_rate"}, {"weighted": True}, {"reduction": "none"}, {"memory_budget": 4096}],
    ids=str,
)
def test_the_loss_is_sppo_of_the_models_own_log_probs(settings, generator):
    model = llama()
    ids, labels, mask = batch(generator)
    settings = dict(settings)
    if settings.pop("weighted", False):
        settings["weights"] = torch.rand(3, generator=generator)
    ref, win = -30 * torch.rand(3, generator=generator), torch.rand(3, generator=generator)
    loss, logps = model_sppo_loss(model, ids, labels, ref, win, mask, eta=7.0, **settings)
    wanted = eager_logps(model, ids, labels, mask).sum(1)
    torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-5)
    assert not logps.requires_grad
    settings.pop("memory_budget", None)
    expected = sk.sppo_loss(wanted, ref, win, eta=7.0, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, loss.sum(), expected.sum(), model.named_parameters())
    sums = model_sequence_logps(model, ids, labels, mask)
    torch.testing.assert_close(sums.detach(), logps, rtol=1e-6, atol=1e-6)


def test_rows_without_a_label_never_reach_the_head(generator):
    """Poisoned where nothing is predicted: one such row in a GEMM would make dW NaN."""
    model = llama()
    ids, labels, mask = batch(generator)
    model_token_logps(model, ids, labels, mask)  # the probe, before the poison
    idle = torch.ones_like(ids, dtype=torch.bool)
    idle[:, :-1] = labels[:, 1:] == -100

    def poison(_module, _args, out):
        out["last_hidden_state"] = out[0].masked_fill(idle[..., None], float("nan"))
        return out

    hook = model.model.register_forward_hook(poison)
    model_token_logps(model, ids, labels, mask).sum().backward()
    hook.remove()
    got = model.lm_head.weight.grad
    assert got.isfinite().all()
    model.zero_grad()
    eager_logps(model, ids, labels, mask).sum().backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


def test_left_padding_and_positions(generator):
    model = llama()
    ids, labels, mask = batch(generator)
    mask[:2, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = model_token_logps(model, ids, labels, mask, position_ids=positions)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    wanted = torch.log_softmax(logits[:, :-1].float(), -1)
    wanted = wanted.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(got, wanted.masked_fill(labels[:, 1:] == -100, 0))
    bare = model_token_logps(model, ids, labels)
    assert (bare - got).abs().max() > 1e-3  # so mask and positions were used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, generator):
    model = llama().to(dtype)
    ids, labels, mask = batch(generator)
    got = model_token_logps(model, ids, labels, mask)
    assert got.dtype == torch.float32
    wanted = eager_logps(model, ids, labels, mask)
    exact = eager_logps(copy.deepcopy(model).float(), ids, labels, mask)
    # No further from the same weights in float32 than the model's own rounded logits.
    assert (got - exact).norm() <= 2 * (wanted - exact).norm()


def test_autocast_and_accelerates_mixed_precision(generator):
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    ids, labels, mask = batch(generator)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model_token_logps(model, ids, labels, mask)
    plain = model_token_logps(model, ids, labels, mask)
    assert 1e-4 < (cast - plain).abs().max() < 0.3  # it ran in bfloat16
    accelerate.state.AcceleratorState._reset_state(True)  # what another test may have left
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare_model(copy.deepcopy(model))
        assert torch.equal(model_token_logps(prepared, ids, labels, mask), cast)
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear")
        )
        prepared = accelerator.prepare_model(wrapped)
        got = model_token_logps(prepared, ids, labels, mask)
        assert (got - cast).abs().max() < 0.3
        assert (got - plain).abs().max() > 1e-4
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_gradient_checkpointing(generator):
    model = llama().train()
    ids, labels, mask = batch(generator)
    wanted = model_token_logps(model, ids, labels, mask).sum()
    grads = torch.autograd.grad(wanted, list(model.parameters()))
    model.gradient_checkpointing_enable()
    again = model_token_logps(model, ids, labels, mask).sum()
    for got, want in zip(torch.autograd.grad(again, list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapper", "in place"])
def test_compiled_models_stay_one_graph_and_follow_the_weights(in_place, generator):
    torch._dynamo.reset()
    model = llama()
    ids, labels, mask = batch(generator)
    plain = copy.deepcopy(model)
    compiled = model
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=ids, attention_mask=mask)  # a graph that knows nothing of us
    torch._dynamo.utils.counters.clear()
    got = model_token_logps(compiled, ids, labels, mask)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(got, model_token_logps(plain, ids, labels, mask))
    with torch.no_grad():
        for m in (model, plain):
            m.lm_head.weight.mul_(1.5)
    got = model_token_logps(compiled, ids, labels, mask)
    wanted = model_token_logps(plain, ids, labels, mask)
    torch.testing.assert_close(got, wanted)
    mine = torch.autograd.grad(got.sum(), model.lm_head.weight)[0]
    theirs = torch.autograd.grad(wanted.sum(), plain.lm_head.weight)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_routers_loss_is_not_part_of_it(generator):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    ids, labels, mask = batch(generator)
    got = model_token_logps(model, ids, labels, mask).sum()
    wanted = eager_logps(model, ids, labels, mask).sum()
    assert_same_gradients(model, got, wanted, [("lm_head", model.lm_head.weight)])
    assert model(input_ids=ids, attention_mask=mask, labels=labels).aux_loss > 0  # theirs has it


# --- the check ------------------------------------------------------------------------------------


class Twisted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True) * torch.linspace(0, 1, V)


def test_checked_once_and_again_when_the_head_changes(generator, monkeypatch):
    calls = []
    real = probe.probe_head
    monkeypatch.setattr(probe, "probe_head", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    model = llama()
    model.model.layers[0].eval()  # a mode the user set, which the check must leave alone
    modes = [m.training for m in model.modules()]
    ids, labels, mask = batch(generator)
    for _ in range(3):
        model_token_logps(model, ids, labels, mask)
    assert len(calls) == 1
    assert [m.training for m in model.modules()] == modes
    model.config.logit_scale = 2.0  # this Llama does not scale
    with pytest.raises(HeadProbeError, match="logit_scale=2"):
        model_token_logps(model, ids, labels, mask)
    del model.config.logit_scale
    model.lm_head = Twisted(32, V, bias=False)
    with pytest.raises(HeadProbeError, match=r"LlamaForCausalLM.lm_head is Twisted with a forward"):
        model_token_logps(model, ids, labels, mask)
    assert len(calls) == 3
    assert "forward" not in vars(model.lm_head)  # errors leave the head as it was


def doubled(_module, _args, out):
    return 2 * out


def test_a_hook_added_to_the_head_later_is_noticed(generator):
    model = llama()
    ids, labels, mask = batch(generator)
    before = model_token_logps(model, ids, labels, mask)
    hook = model.lm_head.register_forward_hook(doubled)
    with pytest.raises(HeadProbeError, match="changes the logits after"):
        model_token_logps(model, ids, labels, mask)
    hook.remove()
    assert torch.equal(model_token_logps(model, ids, labels, mask), before)
    # One on the head's input is part of the model, and of what is computed.
    model.lm_head.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    got = model_token_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, eager_logps(model, ids, labels, mask), rtol=2e-5, atol=2e-5)
    assert (got - before).abs().max() > 0.1


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_check_looks_at_a_small_part_with_text_in_it(left, generator, monkeypatch):
    seen = []
    observe = probe._observe
    monkeypatch.setattr(
        probe,
        "_observe",
        lambda m, h, inputs, *a: (seen.append(inputs), observe(m, h, inputs, *a))[1],
    )
    model, (ids, labels, _) = llama(), batch(generator, rows=5, length=90)
    mask = torch.ones_like(ids)
    mask[:, slice(0, 20) if left else slice(70, 90)] = 0
    positions = torch.arange(90)[None]
    model_token_logps(model, ids, labels, mask, position_ids=positions)
    part = slice(26, 90) if left else slice(0, 64)
    assert torch.equal(seen[0]["input_ids"], ids[:2, part])
    assert torch.equal(seen[0]["attention_mask"], mask[:2, part])
    assert torch.equal(seen[0]["position_ids"], positions[:, part])


def test_the_cache_keeps_no_model_alive(generator):
    model = llama()
    model_token_logps(model, *batch(generator))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_base_model_that_is_called_differently_is_followed(generator):
    """Same head, but forward feeds its base model something else than the caller gave."""
    from transformers import LlamaForCausalLM

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=(input_ids + 1) % V, **kwargs)

    model = Shifted(llama().config)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    ids, labels, mask = batch(generator)
    got = model_token_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, eager_logps(model, ids, labels, mask))
    assert (got - model_token_logps(plain, ids, labels, mask)).abs().max() > 1e-3


def test_arguments_are_named_in_errors(generator):
    model = llama()
    ids, labels, mask = batch(generator)
    for call, name in (
        (lambda: model_token_logps(model, ids, labels[:, 1:], mask), "labels"),
        (lambda: model_token_logps(model, ids[0], labels[0]), "input_ids"),
        (lambda: model_token_logps(model, ids, labels, mask, logits_to_keep=1), "logits_to_keep"),
        (lambda: model_token_logps(model, ids, labels.where(labels < 0, V), mask), "labels"),
        (
            lambda: model_sppo_loss(model, ids, labels, torch.zeros(2), torch.zeros(3), mask),
            "ref_logps",
        ),
        (
            lambda: model_sppo_loss(model, ids, labels, torch.zeros(3), torch.full((3,), 2.0)),
            "win_rate",
        ),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(HeadProbeError, match="Linear is not a transformers language model"):
        model_token_logps(nn.Linear(3, 3), ids, labels)


# --- the recipes, and several processes -----------------------------------------------------------


def losses(output: str, pattern: str = r"loss (\d+\.\d+)") -> list[float]:
    return [float(x) for x in re.findall(pattern, output)]


def test_plain_pytorch_recipe(capsys, monkeypatch):
    found = losses(recipe(capsys, monkeypatch, "plain_pytorch.py", "--epochs", 6))
    assert len(found) == 6
    assert found[-1] < 0.3 * found[0]


def test_trainer_recipe(capsys, monkeypatch, tmp_path):
    arguments = ("--steps", 10, "--output_dir", tmp_path)
    output = recipe(capsys, monkeypatch, "transformers_trainer.py", *arguments)
    found = losses(output, r"'loss': '([\d.e-]+)'")
    assert len(found) == 2
    assert found[-1] < 0.5 * found[0]
    assert losses(output, r"held out: (\d+\.\d+)")[0] > 0


def test_trainer_recipe_weighs_accumulated_batches_as_one(monkeypatch, tmp_path):
    """Two batches of 4 accumulated are one of 8: equal weights, so no factor was lost."""
    from transformers import TrainingArguments, default_data_collator

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = runpy.run_path(str(ROOT / "examples" / "transformers_trainer.py"))
    torch.manual_seed(5)
    start = module["build"]().eval()
    data = module["rows"](module["play"](start, 4))
    ends = []
    for size, accumulate in ((8, 1), (4, 2)):
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.05,
            max_grad_norm=0.0, remove_unused_columns=False, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        model = copy.deepcopy(start)
        common = {"train_dataset": data, "data_collator": default_data_collator, "eta": 20.0}
        module["SPPO"](model, settings, **common).train()
        ends.append(model)
    moved = 0.0
    for first, one, two in zip(start.parameters(), *(m.parameters() for m in ends), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((one - first).detach().abs().max()))
    assert moved > 1e-4


def test_accelerate_recipe_is_the_same_on_two_processes(capsys, monkeypatch, tmp_path):
    """One process with batches of 4 and two with 2 see the same rows a step, accumulated by 2."""
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    alone = recipe(capsys, monkeypatch, "accelerate_loop.py", "--epochs", 2, "--save", one)
    both = two_processes("examples/accelerate_loop.py", "--epochs", 2, "--batch", 2, "--save", two)
    assert losses(alone) == losses(both)
    first, second = torch.load(one), torch.load(two)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_ddp_fsdp2_and_tensor_parallel_heads_on_two_processes():
    assert "rank 0: ok" in two_processes("tests/distributed_models.py")
