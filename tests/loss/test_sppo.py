"""The SPPO loss: formula, units, reductions, and the fused forms against their composition."""

import math

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.testing import relative_error


def sample(generator, count=6):
    logps = torch.randn(count, generator=generator) * 30 - 200
    ref = logps + torch.randn(count, generator=generator) * 5
    return logps, ref, torch.rand(count, generator=generator)


def by_hand(logps, ref, win, eta):
    return [
        (lp - r - eta * (w - 0.5)) ** 2
        for lp, r, w in zip(logps.tolist(), ref.tolist(), win.tolist(), strict=True)
    ]


@pytest.mark.parametrize("eta", [1000.0, 1.0])
def test_formula(generator, eta):
    logps, ref, win = sample(generator)
    terms = by_hand(logps, ref, win, eta)
    none = sk.sppo_loss(logps, ref, win, eta=eta, reduction="none")
    torch.testing.assert_close(none, torch.tensor(terms), rtol=1e-4, atol=1e-4)
    mean = sk.sppo_loss(logps, ref, win, eta=eta)
    assert math.isclose(mean.item(), sum(terms) / len(terms), rel_tol=1e-4)
    total = sk.sppo_loss(logps, ref, win, eta=eta, reduction="sum")
    assert math.isclose(total.item(), sum(terms), rel_tol=1e-4)


def test_units_differ_by_eta_squared(generator):
    logps, ref, win = sample(generator)
    nats = sk.sppo_loss(logps, ref, win, eta=100.0)
    rates = sk.sppo_loss(logps, ref, win, eta=100.0, units="win_rate")
    torch.testing.assert_close(rates * 100.0**2, nats)


def test_weights(generator):
    logps, ref, win = sample(generator)
    weights = torch.rand(6, generator=generator)
    none = sk.sppo_loss(logps, ref, win, reduction="none")
    for reduction, expected in {
        "none": weights * none,
        "sum": (weights * none).sum(),
        "mean": (weights * none).sum() / weights.sum(),
    }.items():
        out = sk.sppo_loss(logps, ref, win, weights=weights, reduction=reduction)
        torch.testing.assert_close(out, expected)


def test_zero_at_the_target(generator):
    _, ref, win = sample(generator)
    target = ref.double() + 1000.0 * (win.double() - 0.5)
    assert sk.sppo_loss(target, ref.double(), win.double()).item() < 1e-18


def test_float64_win_rates_do_not_promote(generator):
    logps, ref, win = sample(generator)
    assert sk.sppo_loss(logps, ref, win.double()).dtype == torch.float32


def test_gradcheck(generator):
    logps, ref, win = (t.double().requires_grad_() for t in sample(generator))
    assert torch.autograd.gradcheck(
        lambda a, b, c: sk.sppo_loss(a, b, c.clamp(0, 1), eta=3.0, units="win_rate"),
        (logps, ref, win),
    )


@pytest.mark.parametrize("units", ["log_ratio", "win_rate"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_equals_composition(generator, units, reduction, packed, weighted):
    batch, steps, dim, vocab = 4, 11, 16, 71
    hidden = torch.randn(batch, steps, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) / 3
    labels = torch.randint(0, vocab, (batch, steps), generator=generator)
    labels[1, 4:] = -100
    win = torch.rand(batch, generator=generator)
    weights = torch.rand(batch, generator=generator) if weighted else None
    cu = torch.arange(batch + 1) * steps if packed else None
    shape = (batch * steps,) if packed else (batch, steps)
    hidden, labels = hidden.view(*shape, dim), labels.view(shape)
    options = {"eta": 20.0, "weights": weights, "reduction": reduction, "units": units}
    upstream = torch.rand(batch if reduction == "none" else (), generator=generator)

    results = []
    for kind in ("composed", "linear", "logits"):
        dtype = torch.float64 if kind == "composed" else torch.float32
        h, w = (t.to(dtype).detach().clone().requires_grad_() for t in (hidden, weight))
        ref = torch.full((batch,), -45.0, dtype=dtype)
        if kind == "composed":
            logps = sk.sequence_logps(h @ w.T, labels, cu)
            loss = sk.sppo_loss(logps, ref, win, **options)
        elif kind == "linear":
            loss, logps = sk.fused_linear_sppo_loss(
                h, w, labels, ref, win, cu, impl="native", **options
            )
        else:
            loss, logps = sk.fused_sppo_loss(
                h @ w.T, labels, ref, win, cu, impl="native", **options
            )
        loss.backward(upstream.to(dtype))
        results.append((loss, logps, h.grad, w.grad))
    for other in results[1:]:
        assert not other[1].requires_grad
        for value, exact in zip(other, results[0], strict=True):
            assert relative_error(value, exact) < 3e-6


def test_modules_are_the_functions(generator):
    logps, ref, win = sample(generator)
    module = sk.SPPOLoss(eta=10.0, reduction="sum", units="win_rate")
    expected = sk.sppo_loss(logps, ref, win, eta=10.0, reduction="sum", units="win_rate")
    assert torch.equal(module(logps, ref, win), expected)
    assert "eta=10.0" in repr(module)
    logits = torch.randn(6, 3, 17, generator=generator)
    labels = torch.randint(0, 17, (6, 3), generator=generator)
    fused = sk.FusedSPPOLoss(eta=10.0, impl="native")(logits, labels, ref, win)
    assert torch.equal(
        fused.loss, sk.fused_sppo_loss(logits, labels, ref, win, eta=10.0, impl="native").loss
    )
    hidden = torch.randn(6, 3, 8, generator=generator)
    weight = torch.randn(17, 8, generator=generator)
    linear = sk.FusedLinearSPPOLoss(eta=10.0, softcap=4.0, impl="native")
    expected = sk.fused_linear_sppo_loss(
        hidden, weight, labels, ref, win, eta=10.0, softcap=4.0, impl="native"
    )
    assert torch.equal(linear(hidden, weight, labels, ref, win).loss, expected.loss)
