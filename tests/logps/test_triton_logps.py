"""Triton: log-probabilities from logits and their gradient, against fp64."""

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels.logps.triton import token_logps, token_logps_backward
from tests.triton_tools import (
    DEVICE,
    DTYPES,
    IGNORE,
    assert_same,
    assert_within_budget,
    exact_lse,
    sizes,
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
    """(logp, log-sum-exp, dlogits) in eager PyTorch of the given precision."""
    active = labels != IGNORE
    z = torch.where(active[..., None], logits, 0).to(dtype)
    y = labels.clamp_min(0)[..., None]
    logp = torch.log_softmax(z, -1)
    dz = logp.exp().scatter_add(-1, y, -torch.ones_like(y, dtype=dtype))
    dz = grad.to(dtype)[..., None] * dz * active[..., None]
    return logp.gather(-1, y)[..., 0] * active, torch.logsumexp(z, -1) * active, dz


def _budget(grad, logits, labels):
    """Name, eager, exact and size of (log p, log-sum-exp, dlogits), before any is overwritten."""
    eager, exact = (
        _reference(grad, logits, labels, dtype) for dtype in (torch.float32, torch.float64)
    )
    *size, of_p = sizes(logits, labels)
    size.append(grad.double().abs()[..., None] * of_p)
    return list(zip(("logp", "lse", "dlogits"), eager, exact, size, strict=True))


def _assert_within(budget, logp, norm, dlogits):
    found = (logp, exact_lse(norm).float(), dlogits)
    for got, (name, eager, exact, size) in zip(found, budget, strict=True):
        assert_within_budget(got, eager, exact, name, size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_and_gradients(layout, dtype, generator):
    logits, labels, grad, storage = _inputs(layout, dtype, generator)
    budget = _budget(grad, logits, labels)
    inside = torch.full_like(storage, False, dtype=torch.bool)
    inside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        out = torch.full(logits.shape, float("nan"), dtype=dtype, device=DEVICE)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, out)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, logits)
    _assert_within(budget, logp, norm, out)
    assert_same(logits, out, "in place")
    ignored = labels == IGNORE
    assert (
        (logp[ignored] == 0).all() and (norm[:, ignored] == 0).all() and (out[ignored] == 0).all()
    )
    assert storage[~inside].isnan().all(), "written outside the logits"


def test_production_blocks(generator):
    """Default blocks, a vocabulary of two slices, rows that start anywhere."""
    logits = (torch.randn((1, 3, 8999), generator=generator) * 4).to(DEVICE, torch.bfloat16)
    labels = torch.tensor([[8998, IGNORE, 0]], device=DEVICE)
    grad = torch.randn((1, 3), generator=generator).to(DEVICE)
    budget = _budget(grad, logits, labels)
    logp, norm = token_logps(logits, labels, IGNORE)
    token_logps_backward(grad, logits, labels, logp, norm, IGNORE, logits)
    _assert_within(budget, logp, norm, logits)


def test_out_of_another_dtype_and_layout(generator):
    """fp32 gradient of bf16 logits, into padded rows."""
    logits, labels, grad, _ = _inputs(_plain(2, 2, 37), torch.bfloat16, generator)
    *_, (name, eager, exact, size) = _budget(grad, logits, labels)
    out = torch.full((2, 2, 43), float("nan"), device=DEVICE)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, out[:, :, 3:40])
    assert_within_budget(out[:, :, 3:40], eager, exact, name, size=size)
    assert out[:, :, :3].isnan().all() and out[:, :, 40:].isnan().all()


def test_int32_strided_labels_and_expanded_grad(generator):
    logits = torch.randn((2, 3, 19), generator=generator).to(DEVICE)
    tokens = torch.randint(0, 19, (2, 4), generator=generator).to(DEVICE, torch.int32)
    grad = torch.full((1, 1), -0.5, device=DEVICE).expand(2, 3)
    labels = tokens[:, 1:]
    budget = _budget(grad, logits, labels.long())
    out = torch.empty_like(logits)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, out)
    _assert_within(budget, logp, norm, out)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_all_logits_costs_no_accuracy(shift, generator):
    """A log-sum-exp in one fp32, 1e4 to half a unit, would be off by up to 5e-4 in p."""
    logits, labels, grad, _ = _inputs(_plain(4, 8, 37), torch.float32, generator)
    logits += shift
    exact = _reference(grad, logits, labels, torch.float64)
    eager = _reference(grad, logits, labels, torch.float32)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, logits)
    assert_within_budget(logp, eager[0], exact[0], "logp")
    assert_within_budget(logits, eager[2], exact[2], "dlogits")
    torch.testing.assert_close(exact_lse(norm), exact[1], rtol=0, atol=1e-6)


def test_a_nearly_certain_label_keeps_its_gradient(generator):
    """p - 1 of 1e-2 to 1e-7 follows from log p to a few of its own units, not of those of p."""
    logits = torch.randn((1, 6, 37), generator=generator)
    labels = torch.randint(0, 37, (1, 6), generator=generator)
    logits.scatter_(2, labels[..., None], torch.linspace(10, 18, 6)[None, :, None])
    exact = torch.log_softmax(logits.double(), -1).gather(2, labels[..., None])[..., 0]
    out, labels = logits.to(DEVICE), labels.to(DEVICE)
    with tiny_blocks():
        logp, norm = token_logps(out, labels, IGNORE)
        token_logps_backward(torch.ones_like(logp), out, labels, logp, norm, IGNORE, out)
    got = out.gather(2, labels[..., None])[..., 0].double()
    torch.testing.assert_close(logp.cpu().double(), exact, rtol=0, atol=5e-7)
    torch.testing.assert_close(got, logp.double().expm1(), rtol=5e-7, atol=0)


def test_strides_of_logp_labels_and_grad(generator):
    """Backward takes each with strides of its own."""
    logits, labels, grad, _ = _inputs(_plain(2, 3, 37), torch.float32, generator)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        expected, out = torch.empty_like(logits), torch.empty_like(logits)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, expected)
        wide = torch.stack([logp, torch.full_like(logp, float("nan"))], -1)[..., 0]
        args = (grad.t().contiguous().t(), logits, labels.t().contiguous().t(), wide, norm)
        token_logps_backward(*args, IGNORE, out)
    assert_same(out, expected, "other strides")


@pytest.mark.parametrize("vocab", [64, 37], ids=["aligned", "unaligned"])
def test_everything_ignored_is_not_read(vocab):
    logits = torch.full((2, 3, vocab), float("nan"), device=DEVICE)
    labels = torch.full((2, 3), 7, device=DEVICE)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, 7)
        token_logps_backward(logp, logits, labels, logp, norm, 7, logits)
    assert (logp == 0).all() and (norm == 0).all() and (logits == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5)])
def test_no_rows(shape):
    logits = torch.zeros(shape, device=DEVICE)
    labels = torch.zeros(shape[:2], dtype=torch.long, device=DEVICE)
    logp, norm = token_logps(logits, labels, IGNORE)
    token_logps_backward(logp, logits, labels, logp, norm, IGNORE, logits)
    assert logp.shape == norm.shape[1:] == shape[:2]


@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
def test_infinities_and_nan(vocab, generator):
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
        logp, norm = token_logps(logits, labels, IGNORE)
        grad = torch.full_like(logp, -1.0)
        token_logps_backward(grad, logits, labels, logp, norm, IGNORE, logits)
    exact, logp, got = exact.detach(), logp.cpu().double(), logits.cpu().double()
    torch.testing.assert_close(logp, exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got, leaf.grad, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert logp[0].isnan().tolist() == [False, False, True, True, False, False, True, False]
    lse = exact_lse(norm).cpu()
    assert lse[0, 2].isnan()  # torch.logsumexp says +inf, log_softmax says NaN
    lse[0, 2] = inf
    # m and l are apart, so that a shift of 1e4 costs neither of them digits
    torch.testing.assert_close(lse, leaf.logsumexp(-1).detach(), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("label", [40, 37, -1, -(2**40), 2**40])
def test_labels_outside_the_vocabulary_give_nan(label, generator):
    """And nothing else: the rows around them keep their values."""
    logits = torch.randn((1, 3, 37), generator=generator).to(DEVICE)
    labels = torch.tensor([[5, label, 6]], device=DEVICE)
    out = torch.empty_like(logits)
    with tiny_blocks():
        logp, norm = token_logps(logits, labels, IGNORE)
        token_logps_backward(torch.ones_like(logp), logits, labels, logp, norm, IGNORE, out)
        good, _ = token_logps(logits, torch.tensor([[5, 0, 6]], device=DEVICE), IGNORE)
    assert logp[0, 1].isnan() and out[0, 1].isnan().all()
    assert_same(logp[0, ::2], good[0, ::2], "other rows")
    assert not out[0, ::2].isnan().any()


def test_two_runs_have_the_same_bits(generator):
    logits, labels, grad, _ = _inputs(_plain(2, 3, 37), torch.bfloat16, generator)
    runs = []
    with tiny_blocks():
        for _ in range(2):
            logp, norm = token_logps(logits, labels, IGNORE)
            out = torch.empty_like(logits)
            token_logps_backward(grad, logits, labels, logp, norm, IGNORE, out)
            runs.append((logp, norm, out))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_strided_vocabulary_is_refused():
    logits = torch.zeros((2, 3, 8), device=DEVICE)[:, :, ::2]
    with pytest.raises(ValueError, match="unit stride"):
        token_logps(logits, torch.zeros((2, 3), dtype=torch.long, device=DEVICE), IGNORE)
