"""Heads behind adapters, quantisers and sharding: computed exactly, or refused by name."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from sppo_kernels.integrations.transformers import model_token_logps
from sppo_kernels.models import head as heads
from sppo_kernels.models.head import HeadProbeError, causal_lm, find_head
from tests.head_cases import V, assert_same_gradients, batch, eager_logps, llama


def adapted(config, tied=False):
    """A peft model whose adapter is not the identity that it starts as."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(tied), config)
    return stirred(model)


def stirred(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                p.normal_(0, 0.3)
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif "trainable_tokens_delta" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def lora(**settings):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0} | settings
    return peft.LoraConfig(**settings)


def check(model, generator):
    """Values and gradients of every trainable parameter, against the model's own logits."""
    ids, labels, mask = batch(generator)
    got = model_token_logps(model, ids, labels, mask)
    wanted = eager_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    weights = torch.randn(got.shape, generator=generator)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert_same_gradients(model, (got * weights).sum(), (wanted * weights).sum(), trained)


# What each adds to W: s B A; the same with s = alpha / sqrt(r) and a bias; a rescaled sum; a copy
# of the head; a few rows.
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 12},
    "dora": {"use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable_tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [3, 5, 50]},
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_heads_are_exact(kind, generator):
    model = adapted(lora(**ADAPTERS[kind]))
    check(model, generator)
    ids, labels, mask = batch(generator)
    with model.disable_adapter():
        plain = model_token_logps(model, ids, labels, mask)
        torch.testing.assert_close(plain, eager_logps(model, ids, labels, mask))
    moved = (model_token_logps(model, ids, labels, mask) - plain).abs().max()
    assert moved > 0.1  # the adapter counts, so ignoring it would have failed above


def test_lora_with_a_bias_and_a_biased_head(generator):
    model = llama()
    model.lm_head = nn.Linear(32, V)
    peft = pytest.importorskip("peft")
    check(stirred(peft.get_peft_model(model, lora(lora_bias=True))), generator)


def test_two_adapters_and_merged_ones(generator):
    model = adapted(lora())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    check(stirred(model), generator)
    model.merge_adapter()
    ids, labels, mask = batch(generator)
    got = model_token_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, eager_logps(model, ids, labels, mask))


def test_the_adapter_of_a_tied_head_leaves_the_embedding_alone(generator):
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning):  # peft's, of tied weights
        model = stirred(peft.get_peft_model(llama(tied=True), lora()))
    check(model, generator)


def test_parametrised_weights_are_computed(generator):
    model = llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    check(model, generator)


REFUSED_ADAPTERS = {
    "dropout": ("LoraConfig", {"lora_dropout": 0.1}, "dropout"),
    "loha": ("LoHaConfig", {}, "loha.layer.Linear"),
    "lokr": ("LoKrConfig", {}, "lokr.layer.Linear"),
    "ia3": ("IA3Config", {"feedforward_modules": []}, "ia3.layer.Linear"),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}, "oft.layer.Linear"),
    "adalora": ("AdaLoraConfig", {"total_step": 10, "tinit": 1, "tfinal": 2}, "SVDLinear"),
    "vera": ("VeraConfig", {"target_modules": ["lm_head"]}, "vera.layer.Linear"),
}


@pytest.mark.parametrize("kind", REFUSED_ADAPTERS)
def test_adapters_that_are_no_low_rank_sum_are_refused_by_name(kind, generator):
    peft = pytest.importorskip("peft")
    config, settings, reason = REFUSED_ADAPTERS[kind]
    settings = {"target_modules": ["q_proj", "lm_head"]} | settings
    model = peft.get_peft_model(llama(), getattr(peft, config)(**settings))
    ids, labels, mask = batch(generator)
    with pytest.raises(HeadProbeError, match=reason):
        model_token_logps(model, ids, labels, mask, check=False)
    # Elsewhere in the model the same adapter is the model's own affair.
    settings["target_modules"] = ["q_proj"]
    model = peft.get_peft_model(llama(), getattr(peft, config)(**settings)).eval()
    got = model_token_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, eager_logps(model, ids, labels, mask), rtol=2e-5, atol=2e-5)


def test_dora_beside_another_adapter_is_refused():
    model = adapted(lora(use_dora=True))
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(HeadProbeError, match="DoRA beside other"):
        find_head(causal_lm(model))


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_virtual_tokens_before_the_text_count(kind, generator):
    peft = pytest.importorskip("peft")
    settings = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    torch.manual_seed(0)
    base = llama()
    model = peft.get_peft_model(base, config).eval()
    check(model, generator)
    ids, labels, mask = batch(generator)
    moved = model_token_logps(model, ids, labels, mask) - eager_logps(base, ids, labels, mask)
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["XLORA", "POLY"])
def test_adapters_mixed_by_input_are_refused(kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), lora())
    model.active_peft_config.peft_type = f"PeftType.{kind}"
    with pytest.raises(HeadProbeError, match=f"{kind} changes what the model sees"):
        causal_lm(model)


def test_data_parallel_is_refused():
    with pytest.raises(HeadProbeError, match="DataParallel splits a batch"):
        causal_lm(nn.DataParallel(llama()))


class Packed(nn.Module):
    """As GPTQ and AWQ hold a layer: no weight, but packed integers and scales."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(32, V // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, V))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], V)


class Scaled(torch.Tensor):
    """As torchao holds a weight: a subclass that says bfloat16 and stores something else."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError


def bits8():
    layer = nn.Linear(32, V, bias=False)
    layer.weight = nn.Parameter(torch.zeros(V, 32, dtype=torch.int8), requires_grad=False)
    return layer


def float8():
    layer = nn.Linear(32, V, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def bits4():
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    return kind(32, V, bias=False)


def subclass():
    layer = nn.Linear(32, V, bias=False)
    layer.weight = nn.Parameter(Scaled(torch.zeros(V, 32)), requires_grad=False)
    return layer


def of_torch():
    from torch.ao.nn.quantized.dynamic import Linear

    return Linear(32, V)


def norm_by_hooks():
    return torch.nn.utils.weight_norm(nn.Linear(32, V, bias=False))


# bitsandbytes, torchao, gptq are stood in for by their layouts; torch.ao's layer is the real one.
REFUSED_LAYERS = {
    "int8": (bits8, "int8"),
    "float8": (float8, "float8"),
    "bitsandbytes": (bits4, "quantised Linear4bit .bitsandbytes"),
    "gptq": (Packed, "quantised Packed .qweight, scales"),
    "torchao": (subclass, "weight of type Scaled"),
    "torch.ao": (of_torch, "not one nn.Linear"),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, V)),
        "Sequential of Linear, Linear",
    ),
    "weight_norm": (norm_by_hooks, "reparametrised by hooks"),
}


@pytest.mark.parametrize("kind", REFUSED_LAYERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_layers_without_one_float_matrix_are_refused_by_name(kind, generator):
    make, reason = REFUSED_LAYERS[kind]
    model = llama()
    model.lm_head = make()
    ids, labels, mask = batch(generator)
    with pytest.raises(HeadProbeError, match=reason) as raised:
        model_token_logps(model, ids, labels, mask, check=False)
    assert "LlamaForCausalLM.lm_head" in str(raised.value)


def test_a_partitioned_weight_is_refused_until_gathered(generator):
    """ZeRO-3 leaves an empty tensor with `ds_id` behind, and fills it while gathered."""
    model = llama()
    whole = model.lm_head.weight.data
    weight = model.lm_head.weight
    weight.ds_id = 7
    weight.data = torch.empty(0)
    ids, labels, mask = batch(generator)
    with pytest.raises(HeadProbeError, match=r"ZeRO-3 and not gathered.*GatheredParameters"):
        model_token_logps(model, ids, labels, mask, check=False)
    weight.data = whole
    got = model_token_logps(model, ids, labels, mask)
    torch.testing.assert_close(got, eager_logps(model, ids, labels, mask))


def test_a_shard_is_refused(generator):
    """What FSDP1 leaves outside of the wrapped forward: a flat piece."""
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(V * 32 // 2))
    ids, labels, mask = batch(generator)
    with pytest.raises(HeadProbeError, match="a shard or flat parameter"):
        model_token_logps(model, ids, labels, mask, check=False)


class FSDPModule:
    """What torch's fully_shard puts among the bases of a layer's class."""


def test_an_fsdp_unit_that_is_not_the_whole_head_is_refused(generator):
    """An adapter's layer runs as its own; the unit below it is whole only in another forward."""
    model = adapted(lora())
    layer = causal_lm(model).lm_head.base_layer
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    with pytest.raises(HeadProbeError, match="FSDP unit of its own"):
        find_head(causal_lm(model))
    fsdp1 = llama()
    fsdp1.lm_head = type("FullyShardedDataParallel", (nn.Linear,), {})(32, V, bias=False)
    with pytest.raises(HeadProbeError, match="FSDP unit of its own"):
        find_head(fsdp1)
    fsdp2 = llama()  # its hooks make the weight whole for the head's forward
    fsdp2.lm_head.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    check(fsdp2, generator)


def test_a_tie_that_fsdp_broke_is_refused():
    """FSDP1's views inside forward: of one flat parameter they share memory, of two they do not."""
    model = llama(tied=True)
    flat = model.lm_head.weight.detach().clone()
    embedding = model.model.embed_tokens
    for layer in (model.lm_head, embedding):
        del layer._parameters["weight"]
        layer.weight = flat.view(V, 32)
    weight, _ = find_head(model).parameters()
    assert weight.data_ptr() == flat.data_ptr()
    embedding.weight = flat.clone().view(V, 32)
    with pytest.raises(HeadProbeError, match=r"tied to the input embedding.*different units"):
        find_head(model).parameters()


def test_meta_weights_are_refused_and_offloaded_ones_loaded(generator):
    accelerate = pytest.importorskip("accelerate")
    ids, labels, mask = batch(generator)
    model = llama()
    model.lm_head = nn.Linear(32, V, bias=False, device="meta")
    with pytest.raises(HeadProbeError, match=r"meta device .never loaded"):
        model_token_logps(model, ids, labels, mask, check=False)
    model = llama()
    accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
    wanted = eager_logps(model, ids, labels, mask)
    torch.testing.assert_close(model_token_logps(model, ids, labels, mask), wanted)
    assert model.lm_head.weight.is_meta  # freed again
    with pytest.raises(HeadProbeError, match="offloaded by accelerate"):  # out of its forward
        find_head(model).parameters()


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_dtensor_is_gathered_with_its_gradient(one_process, generator):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    plain, model = llama(), None
    model = copy.deepcopy(plain)
    model.lm_head.weight = nn.Parameter(distribute_tensor(plain.lm_head.weight, mesh, [Shard(0)]))
    assert isinstance(model.lm_head.weight, DTensor)
    ids, labels, mask = batch(generator)
    # A bare DTensor meets no plain hidden states in the model's own forward: nothing to probe.
    got = model_token_logps(model, ids, labels, mask, check=False)
    wanted = eager_logps(plain, ids, labels, mask)
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    grad = model.lm_head.weight.grad
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), plain.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


# --- what the config says, and what it does not ---------------------------------------------------


def test_a_softcap_that_no_config_name_tells_is_found_at_any_initialisation(generator, monkeypatch):
    """With tiny logits a cap changes nothing; the second, loud probe shows it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=30.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    ids, labels, mask = batch(generator)
    assert eager_logps(model, ids, labels, mask).isfinite().all()
    model_token_logps(model, ids, labels, mask)
    fresh = copy.deepcopy(model)
    monkeypatch.setattr(heads, "SOFTCAPS", ())
    with pytest.raises(HeadProbeError, match="changes the logits after"):
        model_token_logps(fresh, ids, labels, mask)


def test_a_scale_that_is_not_positive_is_refused():
    model = llama()
    model.config.logit_scale = -0.5
    with pytest.raises(HeadProbeError, match=r"scales its logits by -0\.5"):
        find_head(model)


def test_a_padded_vocabulary_is_cut(generator):
    """Inkling gives the logits of the first `unpadded_vocab_size` rows only."""
    model = llama()
    model.config.unpadded_vocab_size = 90
    weight, bias = find_head(model).parameters()
    assert weight.shape == (90, 32)
    assert bias is None
    ids, labels, mask = batch(generator)
    with pytest.raises(HeadProbeError, match="90"):  # this Llama does not cut
        model_token_logps(model, ids, labels, mask)
