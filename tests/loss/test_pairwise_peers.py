"""pairwise_loss against values of TRL and Liger, computed by their own code."""

import collections
from types import SimpleNamespace

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.testing import relative_error

PAIRS, STEPS, PROMPT = 5, 9, 3


@pytest.fixture
def pairs(generator):
    """Per-token log-probs [2P, T−1] of prompts of 3 tokens and answers of 1 to T−3."""
    mask = torch.zeros(2 * PAIRS, STEPS, dtype=torch.long)
    lengths = torch.randint(1, STEPS - PROMPT + 1, (2 * PAIRS,), generator=generator)
    for row, length in enumerate(lengths):
        mask[row, PROMPT : PROMPT + length] = 1
    logps = -torch.rand(2 * PAIRS, STEPS - 1, generator=generator) * 3 * mask[:, 1:]
    ref = logps.sum(1) + torch.randn(2 * PAIRS, generator=generator)
    return SimpleNamespace(mask=mask, lengths=lengths, logps=logps, ref=ref)


def trl_dpo(pairs, kind, beta, label_smoothing, tau):
    """Loss of TRL's own `DPOTrainer._compute_loss`, and its gradient by token log-probs.

    The method runs unchanged; the trainer around it and the model are stand-ins that hold what it
    reads: token log-probs as the model's output, and reference log-probs computed before.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    leaf = pairs.logps.clone().requires_grad_()
    zeros = torch.zeros_like(pairs.logps)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=tau),
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        label_smoothing=label_smoothing,
        ld_alpha=None,
        loss_types=[kind],
        loss_weights=[1.0],
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )

    def model(**kwargs):
        return SimpleNamespace(
            log_probs=leaf, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    inputs = {
        "input_ids": torch.zeros_like(pairs.mask),
        "attention_mask": torch.ones_like(pairs.mask),
        "completion_mask": pairs.mask,
        "ref_chosen_logps": pairs.ref[:PAIRS],
        "ref_rejected_logps": pairs.ref[PAIRS:],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    return loss, leaf.grad


TRL_KINDS = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
WITH_LENGTHS = ("ipo", "sigmoid_norm")


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", TRL_KINDS)
def test_trl_dpo_trainer(pairs, kind, beta):
    pytest.importorskip("trl", reason="trl is not installed")
    smoothing = 0.2 if kind in SMOOTHED else 0.0
    theirs = trl_dpo(pairs, kind, beta, smoothing, tau=0.3)
    leaf = pairs.logps.clone().requires_grad_()
    settings = {"beta": beta, "label_smoothing": smoothing}
    if kind == "discopop":
        settings["tau"] = 0.3
    if kind in WITH_LENGTHS:
        settings["chosen_lengths"], settings["rejected_lengths"] = pairs.lengths.chunk(2)
    loss = sk.pairwise_loss(*leaf.sum(1).chunk(2), *pairs.ref.chunk(2), kind=kind, **settings)
    loss.backward()
    for ours, expected in zip((loss, leaf.grad), theirs, strict=True):
        assert relative_error(ours, expected) < 2e-6


@pytest.mark.parametrize(
    ("kind", "theirs", "alpha"),
    [("simpo", "simpo", 0.0), ("cpo", "sigmoid", 0.0), ("alphapo", "simpo", 0.4)],
)
def test_trl_cpo_trainer(pairs, kind, theirs, alpha):
    """TRL's own `cpo_loss`; its NLL term is a mean over tokens of a batch, so it is left out."""
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl has no CPO")
    leaf = pairs.logps.clone().requires_grad_()
    sums = leaf.sum(1)
    trainer = SimpleNamespace(
        alpha=alpha,
        beta=0.6,
        simpo_gamma=0.9,
        label_smoothing=0.1,
        loss_type=theirs,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    given = sums / pairs.lengths if theirs == "simpo" else sums
    losses, *_ = module.CPOTrainer.cpo_loss(trainer, *given.chunk(2))
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    settings = {"beta": 0.6, "label_smoothing": 0.1}
    if kind == "cpo":
        settings["nll_weight"] = 0.0
    else:
        settings["margin"] = 0.9
        settings["chosen_lengths"], settings["rejected_lengths"] = pairs.lengths.chunk(2)
    if kind == "alphapo":
        settings["alpha"] = alpha
    found = sk.pairwise_loss(*leaf.sum(1).chunk(2), kind=kind, reduction="none", **settings)
    found.sum().backward()
    assert relative_error(found, losses) < 3e-6
    assert relative_error(leaf.grad, expected) < 3e-6


def test_trl_orpo_trainer(pairs):
    """TRL's own `odds_ratio_loss`, whose value is subtracted from the NLL."""
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl has no ORPO")
    leaf = pairs.logps.clone().requires_grad_()
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=torch.device("cpu")))
    given = leaf.sum(1) / pairs.lengths
    losses, *_ = module.ORPOTrainer.odds_ratio_loss(trainer, *given.chunk(2))
    expected = torch.autograd.grad(-losses.sum(), leaf)[0]
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), pairs.lengths.chunk(2), strict=True))
    found = sk.pairwise_loss(
        *leaf.sum(1).chunk(2), kind="orpo", beta=0.4, nll_weight=0.0, reduction="none", **lengths
    )
    found.sum().backward()
    assert relative_error(found, -losses) < 3e-6
    assert relative_error(leaf.grad, expected) < 3e-6


LIGER_DPO = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip


@pytest.mark.parametrize("kind", LIGER_DPO)
def test_liger_dpo_types(pairs, kind):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss", reason="no liger-kernel")
    smoothing = 0.2 if kind in SMOOTHED else 0.0
    sums, target = pairs.logps.sum(1), torch.zeros(2 * PAIRS, 1)
    (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), pairs.ref.chunk(2)
    expected, *_ = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        chosen, rejected, target, ref_chosen, ref_rejected, beta=0.3, loss_type=kind,
        label_smoothing=smoothing, discopop_tau=0.3,
    )  # fmt: skip
    extra = {"tau": 0.3} if kind == "discopop" else {}
    found = sk.pairwise_loss(
        chosen, rejected, ref_chosen, ref_rejected, kind=kind, beta=0.3,
        label_smoothing=smoothing, **extra,
    )  # fmt: skip
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("kind", ["cpo", "simpo", "orpo"])
def test_liger_reference_free(pairs, kind):
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{kind}_loss", reason="no liger-kernel")
    names = {"cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO"}
    function = getattr(module, f"LigerFusedLinear{names[kind]}Function").preference_loss_fn
    sums, target = pairs.logps.sum(1), torch.zeros(2 * PAIRS, 1)
    given = sums if kind == "cpo" else sums / pairs.lengths
    theirs = {"cpo": {"label_smoothing": 0.1}, "simpo": {"gamma": 0.8}, "orpo": {}}[kind]
    expected, *_ = function(*given.chunk(2), target, beta=0.5, **theirs)
    m, n = pairs.lengths.chunk(2)
    ours = {
        "cpo": {"label_smoothing": 0.1, "nll_weight": 0.0},
        "simpo": {"margin": 0.8, "chosen_lengths": m, "rejected_lengths": n},
        "orpo": {"nll_weight": 0.0, "chosen_lengths": m, "rejected_lengths": n},
    }[kind]
    found = sk.pairwise_loss(*sums.chunk(2), kind=kind, beta=0.5, **ours)
    assert relative_error(found, expected) < 3e-6


def test_liger_kto(pairs, generator):
    module = pytest.importorskip("liger_kernel.chunked_loss.kto_loss", reason="no liger-kernel")
    sums, kl = pairs.logps.sum(1), torch.rand((), generator=generator)
    labels = torch.arange(2 * PAIRS) < PAIRS
    expected, *_ = module.LigerFusedLinearKTOFunction.preference_loss_fn(
        sums, labels, torch.zeros(2 * PAIRS, 1), pairs.ref, beta=0.3, kl=kl
    )
    found = sk.pairwise_loss(*sums.chunk(2), *pairs.ref.chunk(2), kind="kto", beta=0.3, kl=kl)
    assert relative_error(found, expected) < 2e-6
