"""The head that computes log-probs during a model's own forward; used by two adapters."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sppo_kernels.integrations._capture import fused_head
from sppo_kernels.integrations._swap import IntegrationError, Swap
from tests.trainer_models import VOCAB, build


def eager(model, ids, temperature=1.0):
    logp = torch.log_softmax(model(ids).logits.double() / temperature, -1)
    return logp.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]


def test_under_ddp_that_looks_for_unused_parameters(generator, tmp_path):
    """Every parameter gets its gradient, though the loss does not come from the model's output."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = build("llama-untied")
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    eager(model, ids).mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # the second step fails when the first left parameters unreduced
            model.zero_grad()
            with fused_head(wrapped, ids.roll(-1, 1)) as got:
                wrapped(ids)
            got["logps"].mean().backward()
    finally:
        dist.destroy_process_group()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_autocast_and_mean_logits(generator):
    """In bfloat16 autocast as the model itself; the mean of softcapped logits is the model's."""
    model = build("gemma2-softcap")
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    with torch.no_grad():
        logits = model(ids).logits
        with fused_head(model, ids.roll(-1, 1), mean_logits=True) as got:
            model(ids)
        torch.testing.assert_close(got["mean_logits"], logits.mean(-1), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            with fused_head(model, ids.roll(-1, 1)) as low:
                model(ids)
            plain = torch.log_softmax(model(ids).logits.float(), -1)
    plain = plain.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    assert low["logps"].dtype == torch.float32
    torch.testing.assert_close(low["logps"], plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["gemma2-softcap", "cohere-scale", "phi-bias"])
def test_temperature_divides_the_models_logits(family, generator):
    """After the scale and the cap: cap(scale z) / T, with its gradient and its mean logit."""
    model = build(family)
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    expected = eager(model, ids, 0.5)
    with fused_head(model, ids.roll(-1, 1), temperature=0.5, mean_logits=True) as got:
        logits = model(ids).logits
    assert logits.shape == (2, 6, 1)  # a placeholder
    torch.testing.assert_close(got["logps"].double(), expected, rtol=1e-5, atol=1e-5)
    mean = model(ids).logits.mean(-1) / 0.5
    torch.testing.assert_close(got["mean_logits"], mean, rtol=1e-4, atol=1e-5)
    assert (eager(model, ids) - expected).abs().max() > 1e-2  # T counts
    weight = model.get_output_embeddings().weight
    mine, theirs = (torch.autograd.grad(x.sum(), weight)[0] for x in (got["logps"], expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_refusals_and_restoration(generator):
    """Named errors, and the head's own forward back after an error too."""
    model = build("gemma2-softcap")
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    with pytest.raises(IntegrationError, match="did not use its head"), fused_head(model, ids):
        model.model(ids)
    other = pytest.raises(IntegrationError, match=r"labels of shape \(2, 5\)")
    with other, fused_head(model, ids[:, 1:]):
        model(ids)
    assert "forward" not in vars(model.lm_head)
    assert model(ids).logits.shape == (2, 6, VOCAB)


def test_swap_restores_inherited_and_own_attributes():
    """An attribute that came from a base class is removed, not written down into the subclass."""

    class Base:
        name = "base"

    class Derived(Base):
        own = "own"

    swap = Swap("nowhere")
    swap.add(Derived, "name", 1)
    swap.add(Derived, "own", 2)
    swap.install()
    assert (Derived.name, Derived.own, Base.name) == (1, 2, "base")
    swap.uninstall()
    assert "name" not in vars(Derived) and Derived.own == "own"
