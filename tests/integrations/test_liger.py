"""Liger's fused DPO loss against the drop-in: loss, metrics, gradients, whole runs, the switch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sppo_kernels.integrations import liger
from sppo_kernels.testing import relative_error

chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
Theirs = chunked.LigerFusedLinearDPOLoss
PAIRS, STEPS, DIM, REF_DIM, VOCAB = 3, 7, 16, 12, 61


def batch(g, dtype=torch.float32, pairs=PAIRS):
    """Padded pairs with ignored labels of another index than usual, and a smaller reference."""
    labels = torch.randint(0, VOCAB, (2 * pairs, STEPS), generator=g)
    for row, length in enumerate(torch.randint(1, STEPS + 1, (2 * pairs,), generator=g)):
        labels[row, length:] = -7
    shapes = {
        "weight": (VOCAB, DIM),
        "hidden": (2 * pairs, STEPS, DIM),
        "bias": (VOCAB,),
        "ref_hidden": (2 * pairs, STEPS, REF_DIM),
        "ref_weight": (VOCAB, REF_DIM),
        "ref_bias": (VOCAB,),
    }
    found = {k: torch.randn(s, generator=g).div(2).to(dtype) for k, s in shapes.items()}
    return {**found, "labels": labels}


def call(module, data, *, bias=True, reference=True, **extra):
    """What the module returns and the gradients of 1.7 times its loss."""
    leaves = {k: data[k].clone().requires_grad_() for k in ("weight", "hidden", "bias")}
    ref = (data["ref_hidden"], data["ref_weight"], data["ref_bias"] if bias else None)
    loss, metrics = module(
        leaves["weight"],
        leaves["hidden"],
        data["labels"],
        leaves["bias"] if bias else None,
        *(ref if reference else ()),
        **extra,
    )
    (loss * 1.7).backward()  # an upstream gradient other than 1
    return [loss, *metrics, *(t.grad for t in leaves.values() if t.grad is not None)]


def assert_same(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, index
        assert a.dtype == b.dtype, index
        if index in (3, 4):  # means of logits of order 1, which cancel
            assert abs(float(a - b)) < tolerance / 10, index
        elif index in (6, 7):  # rewards, differences of log-probs: relative to those
            size = theirs[index - 5].double().norm()
            assert (a.double() - b.double()).norm() < tolerance / 10 * size, index
        elif not b.any():
            assert not a.any(), index
        else:
            assert relative_error(a, b) < tolerance, index


SMOOTHING = {"exo_pair": 0.1, "robust": 0.2, "sigmoid": 0.3}  # Liger's sigmoid ignores it


@pytest.mark.parametrize("loss_type", sorted(Theirs._SUPPORTED_LOSS_TYPES))
@pytest.mark.parametrize("terms", [False, True], ids=["sums", "averages-and-nll"])
def test_every_type_of_liger(generator, loss_type, terms):
    settings = {
        "ignore_index": -7,
        "beta": 0.3,
        "alpha": 0.7,
        "loss_type": loss_type,
        "label_smoothing": SMOOTHING.get(loss_type, 0.0),
        "compiled": False,
        "compute_nll_loss": terms,
        "average_log_prob": terms,
    }
    data = batch(generator)
    # DiscoPOP divides log-ratios by a temperature of 0.05, and so their roundings.
    tolerance = 1e-5 / 0.05 if loss_type == "discopop" else 1e-5
    ours, theirs = (m(**settings) for m in (liger.LigerFusedLinearDPOLoss, Theirs))
    assert_same(call(ours, data), call(theirs, data), tolerance)


# a head without bias; no reference; NLL with sums, the one term alone, in chunks of two pairs
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"bias": False}),
        ({"use_ref_model": False}, {"reference": False}),
        ({"use_ref_model": False}, {}),
        ({"compute_nll_loss": True, "chunk_size": 2}, {}),
    ],
    ids=["no-bias", "reference-free", "reference-ignored", "nll"],
)
def test_calls(generator, changes, options):
    settings = {"ignore_index": -7, "loss_type": "sppo_hard", "compiled": False, **changes}
    data = batch(generator)
    assert_same(
        call(liger.LigerFusedLinearDPOLoss(**settings), data, **options),
        call(Theirs(**settings), data, **options),
        1e-5,
    )


def test_a_budget_changes_no_number(generator):
    data = batch(generator)
    settings = {"ignore_index": -7, "loss_type": "sppo_hard"}
    whole = call(liger.LigerFusedLinearDPOLoss(**settings), data)
    small = liger.LigerFusedLinearDPOLoss(**settings, memory_budget=2 * STEPS * VOCAB * 4)
    assert_same(call(small, data), whole, 1e-6)


def test_only_what_needs_a_gradient_gets_one(generator):
    data = batch(generator)
    module = liger.LigerFusedLinearDPOLoss(ignore_index=-7, loss_type="sigmoid")
    hidden = data["hidden"].clone().requires_grad_()
    ref = {k: data[f"ref_{k}"].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    loss, metrics = module(data["weight"], hidden, data["labels"], None, *ref.values())
    loss.backward()
    assert hidden.grad.abs().sum() > 0
    assert all(t.grad is None for t in ref.values())
    assert not any(t.requires_grad for t in metrics)


def test_soft_win_rates(generator):
    """ "sppo" is the mean of the responses' losses; with rates 1 and 0 half of "sppo_hard"."""
    data = batch(generator)
    soft = liger.LigerFusedLinearDPOLoss(ignore_index=-7, beta=0.2, loss_type="sppo")
    win = torch.rand(2 * PAIRS, generator=generator)
    found = call(soft, data, win_rate=win)
    leaves = [data[k].double().requires_grad_() for k in ("weight", "hidden", "bias")]
    mask = data["labels"] != -7

    def logps(hidden, weight, bias):
        logp = (hidden @ weight.T + bias).log_softmax(-1)
        return (logp.gather(-1, data["labels"].clamp(min=0)[..., None])[..., 0] * mask).sum(-1)

    ref = logps(*(data[f"ref_{k}"].double() for k in ("hidden", "weight", "bias")))
    weight, hidden, bias = leaves
    loss = (logps(hidden, weight, bias) - ref - 5.0 * (win.double() - 0.5)).square().mean()
    (loss * 1.7).backward()
    for ours, exact in zip((found[0], *found[-3:]), (loss, *(t.grad for t in leaves)), strict=True):
        assert relative_error(ours, exact) < 1e-5
    # averages go the other way, through pairwise_loss
    hard = torch.cat([torch.ones(PAIRS), torch.zeros(PAIRS)])
    for average in (False, True):
        settings = {"ignore_index": -7, "average_log_prob": average}
        soft = liger.LigerFusedLinearDPOLoss(loss_type="sppo", **settings)
        full = liger.LigerFusedLinearDPOLoss(loss_type="sppo_hard", **settings)
        half, whole = call(soft, data, win_rate=hard)[0], call(full, data)[0]
        assert relative_error(2 * half, whole) < 1e-6


@pytest.mark.parametrize(
    ("loss_type", "dtype", "reference", "tolerance"),
    [
        ("sppo_hard", torch.float32, True, 2e-5),
        ("sigmoid", torch.float32, False, 2e-5),
        # bfloat16 weights round after every step, to 2^-8: runs part by that, and no more
        ("sppo_hard", torch.bfloat16, True, 2e-2),
    ],
)
def test_twenty_steps(generator, loss_type, dtype, reference, tolerance):
    data = batch(generator, dtype)
    settings = {
        "ignore_index": -7,
        "beta": 0.1,
        "loss_type": loss_type,
        "use_ref_model": reference,
        "compiled": False,
    }
    ends = []
    for module in (Theirs(**settings), liger.LigerFusedLinearDPOLoss(**settings)):
        leaves = [data[k].clone().requires_grad_() for k in ("weight", "hidden", "bias")]
        optimizer = torch.optim.SGD(leaves, lr=1e-3 if loss_type == "sppo_hard" else 0.5)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            weight, hidden, bias = leaves
            ref = (data["ref_hidden"], data["ref_weight"], data["ref_bias"]) if reference else ()
            loss, _ = module(weight, hidden, data["labels"], bias, *ref)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), *(t.detach() for t in leaves)))
    theirs, ours = ends
    assert theirs[0][-1] < 0.9 * theirs[0][0]  # it did learn
    assert not torch.equal(theirs[1], data["weight"])
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a.float(), b.float()) < tolerance


def test_bfloat16_is_no_further_from_float64_than_liger(generator):
    """Log-probs, rewards and gradients within twice Liger's error, plus one rounding.

    The loss and the means of logits are single numbers, whose errors may cancel in either: they
    are held to one rounding of bfloat16.
    """
    data = batch(generator, torch.bfloat16, pairs=24)
    settings = {"ignore_index": -7, "loss_type": "sppo_hard", "compiled": False}
    exact_data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    exact = call(liger.LigerFusedLinearDPOLoss(**settings, impl="reference"), exact_data)
    ours = call(liger.LigerFusedLinearDPOLoss(**settings), data)
    theirs = call(Theirs(**settings), data)
    for index, (a, b, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype, index
        bound = 2 * relative_error(b, truth) + torch.finfo(a.dtype).eps
        if a.dim() == 0:
            bound = torch.finfo(torch.bfloat16).eps if truth else 0.0
        assert relative_error(a, truth) <= bound, index


def test_patch_switches_instances(generator):
    data = batch(generator)
    before = Theirs.forward
    module = Theirs(ignore_index=-7, loss_type="sppo_hard", compiled=False)
    expected = call(module, data)
    with liger.patched():
        with liger.patched():
            liger.patch()
            found = call(module, data)
        assert Theirs.forward is not before  # the inner block leaves the outer one alone
        soft = Theirs(ignore_index=-7, loss_type="sppo")
        call(soft, data, win_rate=torch.rand(2 * PAIRS, generator=generator))
    assert_same(found, expected, 1e-5)
    assert not torch.equal(found[-1], expected[-1])  # another code did compute it
    with pytest.raises(ValueError, match="Unsupported loss_type"):
        Theirs(loss_type="sppo")


BAD = [
    ({"loss_type": "ipo"}, {}, "loss_type: expected one of"),
    ({"loss_type": "exo_pair"}, {}, "label_smoothing: expected a number in"),
    ({"beta": 0.0}, {}, "beta: expected a finite number above 0"),
    ({"loss_type": "sppo"}, {}, "win_rate: needed for loss_type='sppo'"),
    ({}, {"win_rate": torch.rand(6)}, "win_rate: taken only by loss_type='sppo'"),
    ({"loss_type": "sppo"}, {"win_rate": torch.rand(3)}, "win_rate: expected shape"),
    ({"loss_type": "sppo"}, {"win_rate": torch.rand(6) + 1}, "win_rate: expected values in"),
    ({}, {"reference": False}, "ref_input: expected a tensor with use_ref_model=True"),
]


@pytest.mark.parametrize(("settings", "options", "message"), BAD, ids=[b[2] for b in BAD])
def test_refusals(generator, settings, options, message):
    data = batch(generator)
    with pytest.raises(ValueError, match=message):
        call(liger.LigerFusedLinearDPOLoss(**{"ignore_index": -7, **settings}), data, **options)


def test_an_odd_batch_is_refused(generator):
    data = batch(generator)
    module = liger.LigerFusedLinearDPOLoss(use_ref_model=False)
    with pytest.raises(ValueError, match="target: expected chosen responses and as many"):
        module(data["weight"], data["hidden"][:3], data["labels"][:3])


def test_the_drop_in_runs_without_liger():
    code = (
        "import sys; from sppo_kernels.integrations.liger import LigerFusedLinearDPOLoss as L;"
        "L(loss_type='sppo_hard'); assert 'liger_kernel' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
