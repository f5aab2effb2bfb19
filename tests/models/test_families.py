"""The matrix of model families: our log-probs are those of model(...).logits, or a named refusal.

python -m tests.models.test_families     writes the table of docs/models.md anew
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from sppo_kernels.integrations.transformers import model_token_logps  # noqa: E402
from sppo_kernels.models.head import SCALES, SOFTCAPS, HeadProbeError, find_head  # noqa: E402
from sppo_kernels.testing import assert_within_budget, sensitivity  # noqa: E402
from tests.head_cases import DOCS, V, write_table  # noqa: E402

BASE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
GQA = dict(BASE, num_key_value_heads=2)
MOE = dict(GQA, num_local_experts=4, num_experts_per_tok=2)
GPT = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# family -> (config class, arguments, what its head does)
SUPPORTED = {
    "Llama": ("LlamaConfig", dict(GQA, tie_word_embeddings=False), "weight"),
    "Llama, tied": ("LlamaConfig", dict(GQA, tie_word_embeddings=True), "tied"),
    "Mistral": ("MistralConfig", dict(GQA, sliding_window=4), "weight"),
    "Mixtral": ("MixtralConfig", MOE, "weight, experts"),
    "Qwen 2": ("Qwen2Config", GQA, "weight"),
    "Qwen 3": ("Qwen3Config", dict(GQA, head_dim=8), "weight"),
    "Gemma 2": (
        "Gemma2Config",
        dict(GQA, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
        "tied, softcap",
    ),
    "Gemma 3 (text)": (
        "Gemma3TextConfig",
        dict(GQA, head_dim=8, sliding_window=4, final_logit_softcapping=3.0),
        "tied, softcap",
    ),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        dict(
            GQA, head_dim=8, lru_width=32, logits_soft_cap=2.0, attention_window_size=16,
            num_hidden_layers=3, conv1d_width=4,
        ),
        "tied, softcap (`logits_soft_cap`)",
    ),
    "Cohere": ("CohereConfig", dict(GQA, logit_scale=0.25), "tied, scale"),
    "Cohere 2": ("Cohere2Config", dict(GQA, head_dim=8, logit_scale=0.3), "tied, scale"),
    "Granite": ("GraniteConfig", dict(GQA, logits_scaling=8.0), "divisor"),
    "GraniteMoe": ("GraniteMoeConfig", dict(MOE, logits_scaling=6.0), "divisor, experts"),
    "HyperCLOVA X": (
        "HyperCLOVAXConfig",
        dict(GQA, logits_scaling=0.5),
        "scale (`logits_scaling` multiplies)",
    ),
    "Falcon-H1": (
        "FalconH1Config",
        dict(
            GQA, head_dim=8, lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4,
            mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8,
        ),
        "scale (`lm_head_multiplier`)",
    ),
    "OLMo 2": ("Olmo2Config", GQA, "weight"),
    "StableLM": ("StableLmConfig", dict(GQA, tie_word_embeddings=False), "weight"),
    "Phi": ("PhiConfig", dict(BASE), "weight, bias"),
    "Phi 3": ("Phi3Config", dict(GQA), "weight"),
    "GPT-2": ("GPT2Config", GPT, "tied"),
    "GPT-J": ("GPTJConfig", dict(GPT, rotary_dim=4), "weight, bias"),
    "GPT-NeoX": ("GPTNeoXConfig", BASE, "weight"),
    "OPT": (
        "OPTConfig",
        dict(BASE, ffn_dim=40, word_embed_proj_dim=32, intermediate_size=None),
        "tied, in the decoder",
    ),
    "BLOOM": (
        "BloomConfig",
        {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "tied",
    ),
    "MPT": (
        "MptConfig",
        {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": 0.5},
        "tied; `logit_scale` read by nothing",
    ),
    "MiniCPM 3": (
        "MiniCPM3Config",
        dict(
            BASE, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, dim_model_base=8,
        ),
        "tied, divisor, before the head",
    ),
    "NanoChat": ("NanoChatConfig", dict(GQA, final_logit_softcapping=2.5), "softcap"),
    "xLSTM": (
        "xLSTMConfig",
        {"vocab_size": V, "hidden_size": 32, "num_heads": 4, "num_blocks": 2,
         "output_logit_soft_cap": 2.0},
        "softcap (`output_logit_soft_cap`)",
    ),
    "Inkling": (
        "InklingTextConfig",
        dict(
            GQA, head_dim=8, unpadded_vocab_size=90, logits_mup_width_multiplier=3.0, d_rel=4,
            mlp_layer_types=["dense", "dense"], swa_num_attention_heads=4,
            swa_num_key_value_heads=2, swa_head_dim=8,
        ),
        "divisor, before the head; padded vocabulary",
    ),
    "Mamba": (
        "MambaConfig",
        {"vocab_size": V, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        "tied, no attention",
    ),
    "BertGeneration": (
        "BertGenerationConfig",
        dict(BASE, is_decoder=True),
        "tied, bias, in a box of its own",
    ),
    "Electra": (
        "ElectraConfig",
        dict(BASE, embedding_size=32, is_decoder=True),
        "tied, bias, after layers of its own",
    ),
    "BERT": ("BertConfig", dict(BASE, is_decoder=True), "tied, bias, after layers of its own"),
    "RoBERTa": (
        "RobertaConfig",
        dict(BASE, is_decoder=True),
        "tied, bias, after layers of its own",
    ),
    "ModernBERT decoder": (
        "ModernBertDecoderConfig",
        dict(BASE, cls_token_id=1, sep_token_id=2, local_attention=8),
        "tied, bias, after layers of its own",
    ),
}  # fmt: skip

# family -> (config class, arguments, class, what the refusal says)
REFUSED = {
    "T5": (
        "T5Config",
        {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4},
        "T5ForConditionalGeneration",
        "encoder-decoder",
    ),
    "BART": (
        "BartConfig",
        {"vocab_size": V, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
         "decoder_ffn_dim": 40},
        "BartForConditionalGeneration",
        "encoder-decoder",
    ),
}  # fmt: skip


def build(config: str, arguments: dict, cls: str | None = None):
    """A random model whose weights, biases and logits are large enough for every term to count."""
    made = getattr(transformers, config)(**arguments)
    made._attn_implementation = made._experts_implementation = "eager"  # also in float64
    if cls is None:
        model = transformers.AutoModelForCausalLM.from_config(made)
    else:
        model = getattr(transformers, cls)(made)
    with torch.no_grad():
        head = model.get_output_embeddings()
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(4.0 if p is not head.weight else 1.0)
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape))
        head.weight.copy_(torch.randn(head.weight.shape) * 0.5)
        if getattr(head, "bias", None) is not None:
            head.bias.copy_(torch.randn(head.bias.shape))
    return model.eval()


def batch(generator, pad: bool = True):
    """Ids, labels in the convention of transformers (a prompt and padding ignored), mask."""
    ids = torch.randint(3, 90, (3, 11), generator=generator)  # also in a vocabulary cut to 90
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[0, :4] = labels[1, :1] = labels[2, :6] = -100
    labels[1, 5] = -100  # a hole, as of a tool's answer
    if pad:
        mask[1, 8:] = 0
        labels[1, 8:] = -100
    return ids, labels, mask


def eager(model, ids, labels, mask):
    """log_softmax of the model's own logits, gathered: [B, T-1], and the logits."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = torch.log_softmax(logits, -1)
    wanted = labels[:, 1:]
    picked = logps.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return picked.masked_fill(wanted == -100, 0), logits


def gradients(model, loss):
    """Of the head's weight, of its bias, and of all that is below it, in one vector."""
    head = model.get_output_embeddings()
    wanted = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    below = [p for p in model.parameters() if not any(p is w for w in wanted)]
    found = torch.autograd.grad(loss, [*wanted, *below], allow_unused=True)
    rest = torch.cat([g.flatten() for g in found[len(wanted) :] if g is not None])
    return [*found[: len(wanted)], rest]


@pytest.mark.parametrize("family", SUPPORTED)
def test_log_probs_and_gradients_are_those_of_the_logits(family, generator):
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    config, arguments, what = SUPPORTED[family]
    model = build(config, arguments)
    ids, labels, mask = batch(generator)
    exact = copy.deepcopy(model).double()
    wanted, logits = eager(model, ids, labels, mask)
    truth, exact_logits = eager(exact, ids, labels, mask)
    size = sensitivity(truth, exact_logits)
    truth = truth.double()  # Mamba and xLSTM round their logits to float32 even when in float64
    got = model_token_logps(model, ids, labels, mask)
    assert got.dtype == torch.float32
    assert got.shape == (3, 10)
    assert (got[labels[:, 1:] == -100] == 0).all()
    assert wanted.abs().max() > 1  # neither uniform nor trivial
    assert_within_budget(got, wanted, truth, what=f"{family}: log-probs", size=size)
    weights = torch.randn(got.shape, generator=generator)
    for mine, theirs, true in zip(
        gradients(model, (got * weights).sum()),
        gradients(model, (wanted * weights).sum()),
        gradients(exact, (truth * weights).sum()),
        strict=True,
    ):
        assert true.norm() > 0
        assert_within_budget(mine, theirs, true, what=f"{family}: gradient", roundings=2)
    # What the table says of the head is true of it, and counts in these numbers.
    head = find_head(model)
    weight, bias = head.parameters()
    said = set(what.replace(";", ",").replace(" (", ", ").split(", "))
    assert ("softcap" in said) == (head.softcap is not None)
    scaled = bool({"scale", "divisor"} & said) and "before the head" not in said
    assert scaled == (head.logit_scale != 1)
    assert ("bias" in said) == (bias is not None)
    assert ("tied" in said) == (model.get_input_embeddings().weight is head.layer.weight)
    assert weight.shape[0] == logits.shape[-1]
    if head.softcap is not None:
        assert logits.abs().max() > 0.5 * head.softcap
    if "after layers of its own" in said:  # which nobody has looked at without a probe
        with pytest.raises(HeadProbeError, match=r"has .* beside it: only a probe can tell"):
            model_token_logps(model, ids, labels, mask, check=False)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family, generator):
    config, arguments, cls, reason = REFUSED[family]
    model = build(config, arguments, cls)
    ids, labels, _ = batch(generator, pad=False)
    with pytest.raises(HeadProbeError, match=reason):
        model_token_logps(model, ids, labels)
    with pytest.raises(HeadProbeError, match=type(model).__name__):  # nor when told not to look
        model_token_logps(model, ids, labels, check=False)


def test_trls_fused_head_is_not_the_model_on_recurrentgemma(generator):
    """TRL 1.16 knows no `logits_soft_cap`, does not probe, and gives other numbers."""
    trl = pytest.importorskip("trl")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"a statement about TRL 1.16.0, here is {trl.__version__}")
    from trl.trainer.utils import add_fused_lm_head

    config, arguments, _ = SUPPORTED["RecurrentGemma"]
    model = build(config, arguments)
    ids, labels, mask = batch(generator)
    wanted, _ = eager(model, ids, labels, mask)
    torch.testing.assert_close(model_token_logps(model, ids, labels, mask), wanted)
    add_fused_lm_head(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert (out.log_probs - wanted).abs().max() > 0.1
    model.config.final_logit_softcapping = model.config.logits_soft_cap  # the cap is all it lacks
    del model.forward
    add_fused_lm_head(model)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, wanted, rtol=1e-4, atol=1e-4)


def test_every_config_name_that_changes_logits_is_known():
    """A scan of the installed models: names of configs and modules in lines about logits."""
    if not transformers.__version__.startswith("5.23."):
        pytest.skip(f"scanned for transformers 5.23, here is {transformers.__version__}")
    line = re.compile(r"^ +(?:lm_)?logits = (.*(?:logits|lm_head\(|cap).*)$", re.M)
    name = re.compile(r"(?:config|self|self\.model)\.([a-z]\w*(?:scal|cap|multiplier|mup)\w*)")
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for assigned in line.findall(file.read_text()):
            found.update(name.findall(assigned))
    assert {"logit_scale", "logits_scaling", "final_logit_softcapping"} <= found
    # Inkling 2's layer `logit_softcap` holds `final_logit_softcapping`; Jev (`softcap`) judges, and
    # CLIP's kin compare images with texts: no language models.
    others = {"logit_softcap", "softcap"}
    others |= {n for n in found if n.startswith("logit_scale")} - {"logit_scale"}
    assert found - others <= {*SCALES, *SOFTCAPS}


def table() -> str:
    """The Markdown table of docs/models.md."""
    lines = ["| family | head | |", "| --- | --- | --- |"]
    for family, (_, _, what) in SUPPORTED.items():
        lines.append(f"| {family} | {what} | exact |")
    for family, (_, _, _, reason) in REFUSED.items():
        lines.append(f"| {family} | {reason} | refused |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one():
    assert table() in DOCS.read_text(), "run python -m tests.models.test_families"


if __name__ == "__main__":
    write_table("families", table())
