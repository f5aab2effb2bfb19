"""Tiny models, batches and the eager values that the tests of heads and integrations share."""

from __future__ import annotations

from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parents[1] / "docs/models.md"
V = 101  # odd: no kernel sees a whole vector


def write_table(name: str, table: str) -> None:
    """Put a table between its two comments in docs/models.md."""
    before, rest = DOCS.read_text().split(f"<!-- {name} -->\n", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    DOCS.write_text(f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}")


def llama(tied: bool = False, vocab: int = V, **config):
    """A random Llama whose logits differ by whole nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    made = LlamaConfig(
        vocab_size=vocab,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **sizes,
        **config,
    )
    model = LlamaForCausalLM(made)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.4)
    return model


def batch(generator, rows: int = 3, length: int = 11, vocab: int = V):
    """Ids, labels as transformers has them (prompt and padding ignored), mask."""
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    mask[1, 8:] = 0
    labels[1, 8:] = -100
    return ids, labels, mask


def eager_logps(model, ids, labels, mask=None):
    """log_softmax of the model's own logits at the labels, after virtual tokens: [B, T-1]."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits[:, -ids.shape[1] : -1]
    logps = torch.log_softmax(logits.float(), -1)
    wanted = labels[:, 1:]
    picked = logps.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return picked.masked_fill(wanted == -100, 0)


def assert_same_gradients(model, mine, theirs, parameters, rtol=5e-5):
    """Of two scalars that should be one, for named parameters."""
    names, tensors = zip(*parameters, strict=True)
    pairs = zip(
        names,
        torch.autograd.grad(mine, tensors, allow_unused=True),
        torch.autograd.grad(theirs, tensors, allow_unused=True),
        strict=True,
    )
    for name, got, wanted in pairs:
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            assert wanted.norm() > 0, name
            error = float((got - wanted).norm() / wanted.norm())
            assert error <= rtol, f"{name}: gradient off by {error:.2e}"
