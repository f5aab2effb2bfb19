"""Against code nobody here wrote: TRL and Liger, values, gradients and a training step."""

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.testing import relative_error

PAIRS, STEPS, DIM, VOCAB, BETA = 3, 9, 16, 61, 0.05


@pytest.fixture
def batch(generator):
    """Chosen responses, then rejected ones, as both peers expect; padded with ignored labels."""
    g = generator
    labels = torch.randint(0, VOCAB, (2 * PAIRS, STEPS), generator=g)
    for row, length in enumerate(torch.randint(1, STEPS + 1, (2 * PAIRS,), generator=g)):
        labels[row, length:] = -100
    return {
        "hidden": torch.randn(2 * PAIRS, STEPS, DIM, generator=g),
        "weight": torch.randn(VOCAB, DIM, generator=g) / 2,
        "bias": torch.randn(VOCAB, generator=g) / 2,
        "labels": labels,
        "ref": torch.randn(2 * PAIRS, generator=g) * 3 - 20,
        "win": torch.cat([torch.ones(PAIRS), torch.zeros(PAIRS)]),
    }


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_token_logps_equal_trl_selective_log_softmax(generator, impl):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    logits = torch.randn(3, 7, 301, generator=generator) * 4
    labels = torch.randint(0, 301, (3, 7), generator=generator)
    results = []
    for function in (
        lambda z: utils.selective_log_softmax(z, labels),
        lambda z: sk.token_logps(z, labels, impl=impl),
    ):
        leaf = logits.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append((out, leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 2e-6


def trl_sppo_hard(logps, ref):
    """The per-pair loss of TRL's DPOTrainer, run by TRL's own method on given log-probs.

    TRL has no function for it; its formula is evaluated here through the trainer's source so that
    a change there is noticed.
    """
    import inspect

    from trl.trainer.dpo_trainer import DPOTrainer

    source = inspect.getsource(DPOTrainer)
    start = source.index('elif loss_type == "sppo_hard":')
    body = source[source.index("\n", start) + 1 : source.index('elif loss_type == "aot":')]
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref.chunk(2)
    scope = {
        "chosen_logratios": chosen - ref_chosen,
        "rejected_logratios": rejected - ref_rejected,
        "self": type("Settings", (), {"beta": BETA}),
    }
    exec(inspect.cleandoc(body), scope)
    return scope["per_sequence_loss"].mean()


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_loss_equals_trl_sppo_hard_up_to_the_factor_two(batch, impl):
    """TRL sums the two squares of a pair and averages pairs; we average responses: factor 2."""
    pytest.importorskip("trl", reason="trl is not installed")
    results = []
    for ours in (True, False):
        h, w = (batch[k].clone().requires_grad_() for k in ("hidden", "weight"))
        if ours:
            out = sk.fused_linear_sppo_loss(
                h, w, batch["labels"], batch["ref"], batch["win"], eta=1 / BETA, impl=impl
            )
            loss = 2.0 * out.loss
        else:
            labels = batch["labels"]
            logps = (h @ w.T).log_softmax(-1)
            logps = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            loss = trl_sppo_hard((logps * (labels != -100)).sum(-1), batch["ref"])
        loss.backward()
        results.append((loss, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 3e-6


def liger_loss(batch, hidden, weight, bias):
    module = pytest.importorskip(
        "liger_kernel.chunked_loss.dpo_loss", reason="liger-kernel is not installed"
    )
    loss_fn = module.LigerFusedLinearDPOLoss(
        beta=BETA, loss_type="sppo_hard", use_ref_model=True, compiled=False
    )
    # Liger computes the reference from its own hidden states: an equal reference, for which
    # log-probs differ from the policy's by a detached copy.
    loss, _ = loss_fn(
        weight, hidden, batch["labels"], bias, batch["hidden"].detach() * 0.9,
        batch["weight"].detach(), batch["bias"].detach(),
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_loss_equals_liger_sppo_hard(batch, impl):
    with torch.no_grad():
        ref = sk.linear_sequence_logps(
            batch["hidden"] * 0.9, batch["weight"], batch["labels"], bias=batch["bias"]
        )
    results = []
    for ours in (True, False):
        h, w, b = (batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias"))
        if ours:
            loss = (
                2.0
                * sk.fused_linear_sppo_loss(
                    h, w, batch["labels"], ref, batch["win"], bias=b, eta=1 / BETA, impl=impl
                ).loss
            )
        else:
            loss = liger_loss(batch, h, w, b)
        loss.backward()
        results.append((loss, h.grad, w.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_a_training_step_equals_ligers(batch):
    """Three AdamW steps of head and hidden states from the same start."""
    with torch.no_grad():
        ref = sk.linear_sequence_logps(
            batch["hidden"] * 0.9, batch["weight"], batch["labels"], bias=batch["bias"]
        )
    ends = []
    for ours in (True, False):
        leaves = [batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
        optimizer = torch.optim.AdamW(leaves, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            if ours:
                h, w, b = leaves
                loss = (
                    2.0
                    * sk.fused_linear_sppo_loss(
                        h, w, batch["labels"], ref, batch["win"], bias=b, eta=1 / BETA
                    ).loss
                )
            else:
                loss = liger_loss(batch, *leaves)
            loss.backward()
            optimizer.step()
        ends.append([t.detach() for t in leaves])
    for ours, theirs in zip(*ends, strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_hidden_in_logps_equal_trl_chunked_kernel(batch):
    """TRL's fused head, with bias, softcap and scale, values and gradients."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="trl is not installed")
    results = []
    for ours in (True, False):
        h, w, b = (batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias"))
        flat, labels = h.view(-1, DIM), batch["labels"].view(-1).clamp(min=0)
        if ours:
            out = sk.linear_token_logps(flat, w, labels, bias=b, softcap=3.0, logit_scale=0.8)
        else:
            out, *_ = chunked.ChunkedLogProbFunction.apply(
                flat, w, b, labels, 1.0, 32, 3.0, 0.8, ()
            )
        out.square().sum().backward()
        results.append((out, h.grad, w.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 1e-5
