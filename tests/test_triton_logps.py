"""Triton: log-probabilities from logits and their gradient, against fp64."""

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels.impl.triton import token_logps, token_logps_backward
from tests.test_triton_checks import (
    DEVICE,
    DTYPES,
    IGNORE,
    assert_same,
    assert_within_budget,
    poisoned_empty,  # noqa: F401
    tiny_blocks,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _plain(b, t, v):
    return lambda new: new(b * t * v).view(b, t, v)


def _padded(b, t, v, width):
    return lambda new: new(b * t * width).view(b, t, width)[:, :, :v]


def _shifted(b, t, v):
    return lambda new: new(b * (t + 1) * v).view(b, t + 1, v)[:, :-1]


def _offset(b, t, v, by):
    return lambda new: new(b * t * v + by)[by:].view(b, t, v)


LAYOUTS = {
    "whole vectors, several slices": _plain(2, 3, 64),
    "rows start anywhere in a vector": _plain(2, 3, 37),
    "slice exactly full": _plain(1, 2, 16),
    "a row inside one vector": _plain(3, 2, 3),
    "one class": _plain(2, 2, 1),
    "one row": _plain(1, 1, 21),
    "padded rows of whole vectors": _padded(2, 2, 40, 48),
    "padded rows that end inside a vector": _padded(2, 2, 37, 48),
    "last position dropped": _shifted(2, 3, 37),
    "one response, last position dropped": _shifted(1, 3, 37),
    "storage offset inside a vector": _offset(2, 2, 37, 3),
    "storage offset, aligned strides": _offset(2, 2, 32, 5),
    "transposed batch and time": lambda new: new(3 * 2 * 24).view(3, 2, 24).transpose(0, 1),
}


def _inputs(layout, dtype, generator):
    """Logits in a NaN-filled storage, labels with one ignored row, and the rows' factors."""
    storage = []

    def new(n):
        storage.append(torch.full((n,), float("nan"), dtype=dtype, device=DEVICE))
        return storage[0]

    logits = layout(new)
    b, t, v = logits.shape
    logits.copy_(torch.randn(logits.shape, generator=generator) * 4)
    labels = torch.randint(0, v, (b, t), generator=generator)
    if b * t > 1:
        labels[-1, 0] = IGNORE
    logits[(labels == IGNORE).to(DEVICE)] = float("nan")  # must not be read
    grad = torch.randn((b, t), generator=generator)
    return logits, labels.to(DEVICE), grad.to(DEVICE), storage[0]


def _reference(grad, logits, labels, dtype):
    """(logp, lse, dlogits) in eager PyTorch of the given precision."""
    active = labels != IGNORE
    z = torch.where(active[..., None], logits, 0).to(dtype)
    y = labels.clamp_min(0)[..., None]
    logp = torch.log_softmax(z, -1)
    dz = logp.exp().scatter_add(-1, y, -torch.ones_like(y, dtype=dtype))
    dz = grad.to(dtype)[..., None] * dz * active[..., None]
    return logp.gather(-1, y)[..., 0] * active, torch.logsumexp(z, -1) * active, dz


def _lse_rounding(grad, lse):
    """What half a unit in the last place of the fp32 lse does to grad * exp(z - lse)."""
    return (grad.abs().max() * lse.abs().max() * 2**-24).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_and_gradients(layout, dtype, generator):
    logits, labels, grad, storage = _inputs(layout, dtype, generator)
    exact = _reference(grad, logits, labels, torch.float64)
    eager = _reference(grad, logits, labels, torch.float32)
    inside = torch.full_like(storage, False, dtype=torch.bool)
    inside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    with tiny_blocks():
        logp, lse = token_logps(logits, labels, IGNORE)
        out = torch.full(logits.shape, float("nan"), dtype=dtype, device=DEVICE)
        token_logps_backward(grad, logits, labels, lse, IGNORE, out)
        token_logps_backward(grad, logits, labels, lse, IGNORE, logits)
    assert_within_budget(logp, exact[0], eager[0], "logp")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    assert_within_budget(out, exact[2], eager[2], "dlogits", _lse_rounding(grad, lse))
    assert_same(logits, out, "in place")
    ignored = labels == IGNORE
    assert (logp[ignored] == 0).all() and (lse[ignored] == 0).all() and (out[ignored] == 0).all()
    assert storage[~inside].isnan().all(), "written outside the logits"


def test_production_blocks(generator):
    """Default blocks, a vocabulary of two slices, rows that start anywhere."""
    logits = (torch.randn((1, 3, 8999), generator=generator) * 4).to(DEVICE, torch.bfloat16)
    labels = torch.tensor([[8998, IGNORE, 0]], device=DEVICE)
    grad = torch.randn((1, 3), generator=generator).to(DEVICE)
    exact = _reference(grad, logits, labels, torch.float64)
    eager = _reference(grad, logits, labels, torch.float32)
    logp, lse = token_logps(logits, labels, IGNORE)
    token_logps_backward(grad, logits, labels, lse, IGNORE, logits)
    assert_within_budget(logp, exact[0], eager[0], "logp")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    assert_within_budget(logits, exact[2], eager[2], "dlogits", _lse_rounding(grad, lse))


def test_out_of_another_dtype_and_layout(generator):
    """fp32 gradient of bf16 logits, into padded rows."""
    logits, labels, grad, _ = _inputs(_plain(2, 2, 37), torch.bfloat16, generator)
    exact = _reference(grad, logits, labels, torch.float64)[2]
    eager = _reference(grad, logits, labels, torch.float32)[2]
    out = torch.full((2, 2, 43), float("nan"), device=DEVICE)
    with tiny_blocks():
        _, lse = token_logps(logits, labels, IGNORE)
        token_logps_backward(grad, logits, labels, lse, IGNORE, out[:, :, 3:40])
    assert_within_budget(out[:, :, 3:40], exact, eager, "dlogits", _lse_rounding(grad, lse))
    assert out[:, :, :3].isnan().all() and out[:, :, 40:].isnan().all()


def test_int32_strided_labels_and_expanded_grad(generator):
    logits = torch.randn((2, 3, 19), generator=generator).to(DEVICE)
    tokens = torch.randint(0, 19, (2, 4), generator=generator).to(DEVICE, torch.int32)
    grad = torch.full((1, 1), -0.5, device=DEVICE).expand(2, 3)
    labels = tokens[:, 1:]
    exact = _reference(grad, logits, labels.long(), torch.float64)
    eager = _reference(grad, logits, labels.long(), torch.float32)
    out = torch.empty_like(logits)
    with tiny_blocks():
        logp, lse = token_logps(logits, labels, IGNORE)
        token_logps_backward(grad, logits, labels, lse, IGNORE, out)
    assert_within_budget(logp, exact[0], eager[0], "logp")
    assert_within_budget(out, exact[2], eager[2], "dlogits", _lse_rounding(grad, lse))


@pytest.mark.parametrize("vocab", [64, 37], ids=["aligned", "unaligned"])
def test_everything_ignored_is_not_read(vocab):
    logits = torch.full((2, 3, vocab), float("nan"), device=DEVICE)
    labels = torch.full((2, 3), 7, device=DEVICE)
    with tiny_blocks():
        logp, lse = token_logps(logits, labels, 7)
        token_logps_backward(logp, logits, labels, lse, 7, logits)
    assert (logp == 0).all() and (lse == 0).all() and (logits == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5)])
def test_no_rows(shape):
    logits = torch.zeros(shape, device=DEVICE)
    labels = torch.zeros(shape[:2], dtype=torch.long, device=DEVICE)
    logp, lse = token_logps(logits, labels, IGNORE)
    token_logps_backward(logp, logits, labels, lse, IGNORE, logits)
    assert logp.shape == lse.shape == shape[:2]


@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
def test_infinities_nan_and_large_shifts(vocab, generator):
    inf = float("inf")
    z = torch.randn((1, 8, vocab), generator=generator)
    z[0, 0] += 1e4
    z[0, 1] -= 1e4
    z[0, 2, 3] = inf
    z[0, 3, 20] = float("nan")
    z[0, 4, 5:] = -inf  # whole slices of probability 0
    z[0, 5, 0] = -inf  # the label's
    z[0, 6] = -inf
    z[0, 7] = -inf
    z[0, 7, 0] = 3.0  # certain
    labels = torch.zeros((1, 8), dtype=torch.long)
    leaf = z.double().requires_grad_()
    exact = torch.log_softmax(leaf, -1)[..., 0]
    exact.sum().backward()
    logits, labels = z.to(DEVICE), labels.to(DEVICE)
    with tiny_blocks():
        logp, lse = token_logps(logits, labels, IGNORE)
        grad = torch.full_like(logp, -1.0)
        token_logps_backward(grad, logits, labels, lse, IGNORE, logits)
    exact, logp, got = exact.detach(), logp.cpu().double(), logits.cpu().double()
    torch.testing.assert_close(logp, exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    usual = [1, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(got[0, 2:], leaf.grad[0, 2:], rtol=2e-6, atol=1e-6, equal_nan=True)
    # lse of 1e4 is known to half an ulp, 4.9e-4, and p with it
    torch.testing.assert_close(got[0, :2], leaf.grad[0, :2], rtol=6e-4, atol=1e-6)
    assert logp[0, usual].isnan().tolist() == [False, True, True, False, False, True, False]


@pytest.mark.parametrize("label", [40, 37, -1, -(2**40), 2**40])
def test_labels_outside_the_vocabulary_give_nan(label, generator):
    """And nothing else: the rows around them keep their values."""
    logits = torch.randn((1, 3, 37), generator=generator).to(DEVICE)
    labels = torch.tensor([[5, label, 6]], device=DEVICE)
    out = torch.empty_like(logits)
    with tiny_blocks():
        logp, lse = token_logps(logits, labels, IGNORE)
        token_logps_backward(torch.ones_like(logp), logits, labels, lse, IGNORE, out)
        good, _ = token_logps(logits, torch.tensor([[5, 0, 6]], device=DEVICE), IGNORE)
    assert logp[0, 1].isnan() and out[0, 1].isnan().all()
    assert_same(logp[0, ::2], good[0, ::2], "other rows")
    assert not out[0, ::2].isnan().any()


def test_two_runs_have_the_same_bits(generator):
    logits, labels, grad, _ = _inputs(_plain(2, 3, 37), torch.bfloat16, generator)
    runs = []
    with tiny_blocks():
        for _ in range(2):
            logp, lse = token_logps(logits, labels, IGNORE)
            out = torch.empty_like(logits)
            token_logps_backward(grad, logits, labels, lse, IGNORE, out)
            runs.append((logp, lse, out))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_strided_vocabulary_is_refused():
    logits = torch.zeros((2, 3, 8), device=DEVICE)[:, :, ::2]
    with pytest.raises(ValueError, match="unit stride"):
        token_logps(logits, torch.zeros((2, 3), dtype=torch.long, device=DEVICE), IGNORE)
