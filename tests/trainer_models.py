"""Tiny random models of the families the trainer covers, and random preference rows."""

from __future__ import annotations

import torch

VOCAB = 211
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = dict(COMMON, num_key_value_heads=2)


def _gpt2(**extra):
    return dict(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **extra,
    )


# family -> (config class, arguments); the tied and untied, scaled, capped and biased heads
FAMILIES = {
    "llama-untied": ("LlamaConfig", dict(GQA, tie_word_embeddings=False)),
    "llama-tied": ("LlamaConfig", dict(GQA, tie_word_embeddings=True)),
    "mistral-window": ("MistralConfig", dict(GQA, sliding_window=4)),
    "qwen2": ("Qwen2Config", dict(GQA)),
    "gemma2-softcap": (
        "Gemma2Config",
        dict(GQA, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
    ),
    "gemma3": ("Gemma3TextConfig", dict(GQA, head_dim=8, sliding_window=4)),
    "cohere-scale": ("CohereConfig", dict(GQA, logit_scale=0.25)),
    "granite-divisor": ("GraniteConfig", dict(GQA, logits_scaling=8.0)),
    "phi-bias": ("PhiConfig", dict(COMMON, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt2": ("GPT2Config", _gpt2()),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dropout": 0.0,
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32):
    """A random model, with weights large enough for its logits to differ by whole nats."""
    import transformers

    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**arguments)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # transformers' sdpa has no soft cap; 5.17 leaves it out silently, 5.23 refuses
        config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.25)
            elif parameter.shape[0] == VOCAB:
                parameter.copy_(torch.randn(parameter.shape))  # the head's bias
    return model.to(dtype)


def rows(generator, count: int = 6, responses: int = 5, hard: bool = False) -> list[dict]:
    """Rows of random ids with lengths from 1 to 11 and random (or hard) win rates."""

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(2, 9),
            "response_ids": [ids(1, 12) for _ in range(responses)],
            "win_rate": [1.0, 0.0] if hard else torch.rand(responses, generator=generator).tolist(),
        }
        for _ in range(count)
    ]
