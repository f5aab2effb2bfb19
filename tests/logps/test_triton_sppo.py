"""Triton: sums over sequences, and the SPPO loss from logits, against fp64 autograd."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels.logps.triton import (
    segment_expand,
    segment_sum,
    sppo_from_logits,
    token_logps_backward,
)
from tests.logps.test_triton_checks import (  # noqa: F401
    DEVICE,
    IGNORE,
    assert_same,
    assert_within_budget,
    poisoned_empty,
    tiny_blocks,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SEGMENTS = {
    "usual, blocks and tails": [0, 3, 11, 12],
    "empty ones first, between and last": [0, 0, 5, 5, 5, 9, 9],
    "rows after the last": [0, 4, 9],
    "one sequence": [0, 12],
    "all empty": [0, 0, 0],
    "no sequences": [0],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cu", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_segments(cu, dtype, generator):
    values = torch.randn(12, generator=generator).to(DEVICE)
    grad = torch.randn(len(cu) - 1, generator=generator).to(DEVICE)
    cu_seqlens = torch.tensor(cu, dtype=dtype, device=DEVICE)
    with tiny_blocks():
        total = segment_sum(values, cu_seqlens)
        spread = segment_expand(grad, cu_seqlens, 12)
        again = segment_sum(values, cu_seqlens)
    assert total.shape == (len(cu) - 1,) and torch.equal(total, again)
    expected = torch.zeros(12, device=DEVICE)
    for s, (begin, end) in enumerate(pairwise(cu)):
        expected[begin:end] = grad[s]
        exact = values[begin:end].double().sum()
        assert (total[s].double() - exact).abs() <= 2e-6
        assert begin != end or total[s] == 0
    assert_same(spread, expected, "expand")


def test_sum_of_many_small_terms_loses_nothing(generator):
    """A running fp32 sum of 20000 terms would be off by 1e-2; a tree is not."""
    values = (torch.rand(20000, generator=generator) - 11).to(DEVICE)
    total = segment_sum(values, torch.tensor([0, 20000], device=DEVICE))
    exact = values.double().sum()
    assert (total[0].double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()


def test_expanded_values_and_no_rows():
    cu_seqlens = torch.tensor([0, 2, 5], device=DEVICE)
    ones = torch.ones(1, device=DEVICE).expand(5)
    assert segment_sum(ones, cu_seqlens).tolist() == [2, 3]
    nothing = torch.zeros(0, device=DEVICE)
    none = torch.tensor([0, 0], device=DEVICE)
    assert segment_sum(nothing, none).tolist() == [0]
    assert segment_expand(torch.ones(1, device=DEVICE), none, 0).shape == (0,)


def _loss(logp, cu, ref, win, scale, eta, win_units):
    total = torch.stack([logp[a:b].sum() for a, b in pairwise(cu)])
    target = win - 0.5
    residual = (total - ref) / eta - target if win_units else total - ref - eta * target
    return scale * residual * residual, total


CASES = {
    "padded": ((3, 4, 37), [0, 4, 8, 12]),
    "packed, an empty response": ((1, 12, 37), [0, 5, 5, 12]),
    "packed, rows after the last": ((1, 12, 32), [0, 5, 9]),
}


@pytest.mark.parametrize("win_units", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_coefficients(case, win_units, generator):
    shape, cu = case
    n_seq, eta = len(cu) - 1, 7.0
    logits = (torch.randn(shape, generator=generator) * 3).to(DEVICE)
    labels = torch.randint(0, shape[2], shape[:2], generator=generator).to(DEVICE)
    labels[0, 1] = IGNORE
    logits[0, 1] = float("nan")
    ref = (torch.randn(n_seq, generator=generator) * 3 - 20).to(DEVICE)
    win = torch.rand(n_seq, generator=generator).to(DEVICE)
    scale = torch.rand(n_seq, generator=generator).to(DEVICE)

    def reference(dtype):
        active = (labels != IGNORE).flatten()
        z = torch.where((labels != IGNORE)[..., None], logits, 0).to(dtype).requires_grad_()
        logp = torch.log_softmax(z, -1).gather(-1, labels.clamp_min(0)[..., None]).flatten()
        logp = torch.where(active, logp, 0.0)
        logp.retain_grad()
        args = (ref.to(dtype), win.to(dtype), scale.to(dtype))
        loss, total = _loss(logp, cu, *args, eta, win_units)
        loss.sum().backward()
        coef = torch.where(active, logp.grad, 0.0).view(shape[:2])
        return loss.detach(), total.detach(), coef, z.grad

    exact, eager = reference(torch.float64), reference(torch.float32)
    cu_seqlens = torch.tensor(cu, device=DEVICE)
    with tiny_blocks():
        args = (labels, cu_seqlens, ref, win, scale, eta, win_units, IGNORE)
        loss, logps, coef, logp, norm = sppo_from_logits(logits, *args)
        again = sppo_from_logits(logits, *args)
        token_logps_backward(-coef, logits, labels, logp, norm, IGNORE, logits)
    names = ("loss", "logps", "coef", "dlogits")
    got = (loss, logps, coef, logits)
    # What is subtracted in the residual, and what its rounding does to the loss and coefficients.
    delta = exact[1].abs() + ref.double().abs()
    curvature = 2 * scale.double() / (eta**2 if win_units else 1)
    slope, of_coef = (2 * curvature * exact[0]).sqrt(), (curvature * delta).max()
    sizes = (slope * delta, delta, of_coef, of_coef)
    for name, g, e, f, size in zip(names, got, eager, exact, sizes, strict=True):
        assert_within_budget(g, e, f, name, size=size)
    assert coef[0, 1] == 0 and (coef.flatten()[cu[-1] :] == 0).all()
    for first, second in zip((loss, logps, coef, logp, norm), again, strict=True):
        assert torch.equal(first, second)


def test_nan_stays_in_its_response(generator):
    logits = torch.randn((2, 3, 16), generator=generator).to(DEVICE)
    logits[0, 2, 5] = float("nan")
    labels = torch.zeros((2, 3), dtype=torch.long, device=DEVICE)
    half = torch.full((2,), 0.5, device=DEVICE)
    cu = torch.tensor([0, 3, 6], device=DEVICE)
    loss, logps, coef, _, _ = sppo_from_logits(
        logits, labels, cu, half, half, half, 1000.0, False, IGNORE
    )
    for value in (loss, logps, coef[:, 0]):
        assert value.isnan().tolist() == [True, False]


def test_no_responses():
    logits = torch.zeros((0, 3, 5), device=DEVICE)
    labels = torch.zeros((0, 3), dtype=torch.long, device=DEVICE)
    none = torch.zeros(0, device=DEVICE)
    cu = torch.zeros(1, dtype=torch.long, device=DEVICE)
    loss, logps, coef, logp, norm = sppo_from_logits(
        logits, labels, cu, none, none, none, 1.0, True, -1
    )
    assert loss.shape == logps.shape == (0,)
    assert coef.shape == logp.shape == norm.shape[1:] == (0, 3)
