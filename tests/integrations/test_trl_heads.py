"""The guard of TRL's fused head: what it refuses, what it merges, and what it leaves alone."""

import copy
import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

import transformers
from trl.trainer import utils

from sppo_kernels.integrations.trl import (
    HeadProbeError,
    heads,
    patch,
    patched,
    unpatch,
)
from tests.trainer_models import FAMILIES, VOCAB, build


@pytest.fixture(autouse=True)
def in_and_out():
    patch()
    yield
    unpatch()


def batch(generator, rows: int = 3, length: int = 9) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def own_logps(model, inputs: dict) -> torch.Tensor:
    """What the model itself says, through all its logits."""
    logits = (
        type(model)
        .forward(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        .logits[:, :-1]
    )
    labels = inputs["labels"][:, 1:]
    logp = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return logp.masked_fill(labels == -100, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, generator):
    """Tied, scaled, capped and biased heads: equal to the model's own logits."""
    model, inputs = build(family).eval(), batch(generator)
    utils.add_fused_lm_head(model)
    fused = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(fused.log_probs, own_logps(model, inputs), rtol=1e-4, atol=1e-4)


def small(name: str, **extra):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }
    config = getattr(transformers, name)(**values)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_recurrent_gemma_is_refused_where_trl_is_silently_wrong():
    with pytest.raises(HeadProbeError, match="logits_soft_cap"):
        utils.add_fused_lm_head(small("RecurrentGemmaConfig", num_key_value_heads=1, lru_width=32))


def test_a_cap_that_no_list_names_is_found_by_the_probe(generator, monkeypatch):
    monkeypatch.setattr(heads, "UNREAD", ())
    model = small("RecurrentGemmaConfig", num_key_value_heads=1, lru_width=32, logits_soft_cap=3.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    utils.add_fused_lm_head(model)
    with pytest.raises(HeadProbeError, match="nats"):
        model(**batch(generator), fused_lm_head=True)


def test_a_head_with_an_extra_layer_is_refused(generator):
    """Electra's generator has a layer between its base model and its head."""
    model = small("ElectraConfig", embedding_size=32, is_decoder=True)
    utils.add_fused_lm_head(model)
    with pytest.raises(HeadProbeError, match=r"Electra.*generator_predictions"):
        model(**batch(generator), fused_lm_head=True)
    with patched(probe=False):  # what TRL makes of it
        model(**batch(generator), fused_lm_head=True)


def test_a_layer_added_later_is_found_at_the_next_probe(generator):
    """PEFT and others replace the head after TRL has patched the model."""
    model, inputs = build("llama-untied").eval(), batch(generator)
    utils.add_fused_lm_head(model)
    model(**inputs, fused_lm_head=True)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 1.5 * super().forward(x)

    head = Scaled(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(HeadProbeError, match="nats"):
        model(**inputs, fused_lm_head=True)


def quantised(model):
    """A head as bitsandbytes has it: packed integers for a weight."""
    model.lm_head.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)


def packed(model):
    """A head as GPTQ has it: no weight at all."""
    model.lm_head = nn.Module()
    model.lm_head.qweight = torch.zeros(8, 8, dtype=torch.int32)


def headless(model):
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, "quantised"),
        (packed, r"quantised Module \(qweight\)"),
        (headless, "no linear output embedding"),
    ],
)
def test_heads_that_are_no_float_matrix(change, message):
    model = build("llama-untied")
    change(model)
    with pytest.raises(HeadProbeError, match=message):
        utils.add_fused_lm_head(model)


# --- adapters -------------------------------------------------------------------------------------


def with_adapter(model, generator, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, **{"target_modules": ["q_proj", "lm_head"], **settings})
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if any(x in name for x in ("lora_B", "modules_to_save", "magnitude", "delta")):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return wrapped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": list(range(3, 60))},
    ],
    ids=["lora", "dora", "bias", "modules_to_save", "trainable_tokens"],
)
def test_an_adapted_head_is_merged(settings, generator):
    tokens = "trainable_token_indices" in settings  # of the embedding and the head tied to it
    model, inputs = build("llama-tied" if tokens else "llama-untied").eval(), batch(generator)
    utils.add_fused_lm_head(model)
    before = model(**inputs, fused_lm_head=True).log_probs.detach()
    wrapped = with_adapter(model, generator, **settings).eval()
    fused = wrapped(**inputs, fused_lm_head=True).log_probs
    expected = own_logps(model, inputs)
    assert (expected - before).abs().max() > 0.05  # the adapter matters
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any(("embed_tokens" if tokens else "lm_head") in n for n in trained)
    ours = torch.autograd.grad(fused.square().sum(), list(trained.values()))
    theirs = torch.autograd.grad(expected.square().sum(), list(trained.values()))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    with wrapped.disable_adapter():
        fused = wrapped(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(fused, before)
    assert "get_output_embeddings" not in vars(model)


def test_dropout_on_the_head_is_refused(generator):
    model = build("llama-untied")
    utils.add_fused_lm_head(model)
    wrapped = with_adapter(model, generator, lora_dropout=0.1)
    with pytest.raises(HeadProbeError, match="lora_dropout"):
        wrapped(**batch(generator), fused_lm_head=True)


# --- sharded --------------------------------------------------------------------------------------


def test_a_dtensor_head_is_gathered(generator, tmp_path):
    """As under FSDP2, here on one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, inputs = build("llama-untied").eval(), batch(generator)
    expected = own_logps(model, inputs)
    utils.add_fused_lm_head(model)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        full = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
        with patched(probe=False):  # the model's own forward cannot mix a DTensor with a tensor
            fused = model(**inputs, fused_lm_head=True).log_probs
            fused.sum().backward()
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
        assert model.lm_head.weight.grad.full_tensor().abs().sum() > 0
        with pytest.raises(TypeError, match="DTensor"):
            utils._ChunkedLogProbFunction.apply(
                torch.zeros(1, 32), model.lm_head.weight, None, torch.zeros(1).long(), 1.0, 8
            )
    finally:
        dist.destroy_process_group()


# --- what the guard leaves alone ------------------------------------------------------------------


def test_models_made_before_the_patch_and_used_after_it(generator):
    """TRL looks the function up at every call, so a model needs not be made anew."""
    inputs = batch(generator)
    unpatch()
    model = build("gemma2-softcap").eval()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    expected = model(**inputs, fused_lm_head=True)
    calls = []
    with patched():
        function = utils._ChunkedLogProbFunction
        real = function.apply
        function.apply = lambda *args: calls.append(args[0].shape) or real(*args)
        got = model(**inputs, fused_lm_head=True)
    labels = inputs["labels"][:, 1:]
    assert calls == [(int((labels != -100).sum()), 32)]  # only the positions that count
    torch.testing.assert_close(got.log_probs, expected.log_probs)
    torch.testing.assert_close(got.entropy, expected.entropy)
    torch.testing.assert_close(got.loss, expected.loss)
    again = model(**inputs, fused_lm_head=True)
    assert len(calls) == 1 and torch.equal(again.log_probs, expected.log_probs)


def test_a_guarded_model_after_unpatch_is_trl_again(generator):
    model, inputs = build("llama-untied").eval(), batch(generator)
    plain = copy.deepcopy(model)
    utils.add_fused_lm_head(model)
    unpatch()
    utils.add_fused_lm_head(plain)
    a, b = (m(**inputs, fused_lm_head=True) for m in (model, plain))
    assert torch.equal(a.log_probs, b.log_probs)
    assert torch.equal(
        model(input_ids=inputs["input_ids"]).logits, plain(input_ids=inputs["input_ids"]).logits
    )


def test_each_head_is_probed_once_by_the_patch_of_the_day(generator, monkeypatch):
    model, inputs = build("llama-untied").eval(), batch(generator)
    utils.add_fused_lm_head(model)
    other, probed = copy.deepcopy(model), []
    real = heads._probe
    monkeypatch.setattr(heads, "_probe", lambda m, *rest: probed.append(m) or real(m, *rest))
    unpatch()
    patch(probe=False)
    model(**inputs, fused_lm_head=True)
    assert not probed
    patch(probe=True)
    for _ in range(2):  # policy and reference in turn, as DPO calls them
        for m in (model, other):
            model_logps = m(**inputs, fused_lm_head=True).log_probs
    assert [m is model for m in probed] == [True, False]
    assert model_logps.isfinite().all()


def test_a_deep_copy_runs_itself(generator):
    """Trainers copy the policy to make the reference."""
    model, inputs = build("llama-untied").eval(), batch(generator)
    utils.add_fused_lm_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    fused = other(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(fused, own_logps(other, inputs), rtol=1e-4, atol=1e-4)


def draw(*_) -> None:
    """A model that takes random numbers in every mode, as some routers do."""
    torch.rand(1)


def test_the_probe_leaves_random_numbers_and_modes_alone(generator):
    model = small("LlamaConfig", attention_dropout=0.5, num_key_value_heads=4)
    utils.add_fused_lm_head(model)
    model.train()
    model.model.layers[0].eval()  # a frozen part keeps its mode
    model.model.register_forward_pre_hook(draw)
    modes = [m.training for m in model.modules()]
    inputs, results = batch(generator), []
    for probe in (False, True):
        torch.manual_seed(5)
        with patched(probe=probe):
            results.append(model(**inputs, fused_lm_head=True).log_probs)
    assert torch.equal(*results)
    assert [m.training for m in model.modules()] == modes


def test_temperature_and_float32_heads_in_bfloat16(generator):
    """As AsyncGRPO and GRPO ask for them; the probe must bear a bfloat16 model."""
    model, inputs = build("llama-untied", torch.bfloat16).eval(), batch(generator)
    utils.add_fused_lm_head(model, 0.7, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    fused = model(**inputs, fused_lm_head=True)
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, :-1]
    logp = (hidden.float() @ model.lm_head.weight.float().t() / 0.7).log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    expected = logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels < 0, 0)
    torch.testing.assert_close(fused.log_probs, expected, rtol=1e-4, atol=1e-3)
    fused.log_probs.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_a_batch_without_labels_is_a_differentiable_zero(generator):
    model, inputs = build("llama-untied"), batch(generator)
    utils.add_fused_lm_head(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs, fused_lm_head=True)
    assert out.loss == 0
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_signature_that_generate_reads_is_kept():
    import inspect

    model = build("llama-untied")
    before = inspect.signature(type(model).forward)
    utils.add_fused_lm_head(model)
    assert isinstance(model.forward, types.MethodType)
    assert inspect.signature(model.forward.__func__) == before
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
