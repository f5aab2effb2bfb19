"""Triton: sums over sequences, and the SPPO loss from logits, against fp64 autograd."""

from itertools import pairwise

import pytest
import torch

import sppo_kernels as sk

pytest.importorskip("triton")

from sppo_kernels.logps.triton import segment_expand, segment_sum
from tests.triton_tools import DEVICE, IGNORE, assert_same, assert_within_budget, tiny_blocks

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


CASES = {
    "padded": ((3, 4, 37), None),
    "packed, an empty response": ((12, 37), [0, 5, 5, 12]),
}


@pytest.mark.parametrize("units", ["log_ratio", "win_rate"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient(case, units, generator):
    shape, cu = case
    n_seq, eta = 3, 7.0
    logits = (torch.randn(shape, generator=generator) * 3).to(DEVICE)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator).to(DEVICE)
    labels[..., 1] = IGNORE
    logits[labels == IGNORE] = float("nan")
    ref = (torch.randn(n_seq, generator=generator) * 3 - 20).to(DEVICE)
    win = torch.rand(n_seq, generator=generator).to(DEVICE)
    scale = torch.rand(n_seq, generator=generator).to(DEVICE)
    bounds = cu or [0, 4, 8, 12]

    def reference(dtype):
        z = torch.where((labels != IGNORE)[..., None], logits, 0).to(dtype).requires_grad_()
        logp = torch.log_softmax(z, -1).gather(-1, labels.clamp_min(0)[..., None]).flatten()
        logp = torch.where((labels != IGNORE).flatten(), logp, 0.0)
        total = torch.stack([logp[a:b].sum() for a, b in pairwise(bounds)])
        target, unit = eta * (win.to(dtype) - 0.5), eta if units == "win_rate" else 1.0
        residual = (total - ref.to(dtype) - target) / unit
        loss = scale.to(dtype) * residual * residual
        loss.sum().backward()
        return loss.detach(), total.detach(), z.grad

    exact, eager = reference(torch.float64), reference(torch.float32)
    offsets = None if cu is None else torch.tensor(cu, device=DEVICE)

    def ours():
        z = logits.clone().requires_grad_()
        with tiny_blocks():
            out = sk.fused_sppo_loss(
                z, labels, ref, win, offsets, eta=eta, weights=scale, reduction="none",
                units=units, impl="triton",
            )  # fmt: skip
            out.loss.sum().backward()
        return out.loss.detach(), out.logps, z.grad

    got = ours()
    # What is subtracted in the residual, and what its rounding does to the loss and coefficients.
    delta = exact[1].abs() + ref.double().abs()
    curvature = 2 * scale.double() / (eta**2 if units == "win_rate" else 1)
    slope, of_coef = (2 * curvature * exact[0]).sqrt(), (curvature * delta).max()
    names, found = ("loss", "logps", "dlogits"), (slope * delta, delta, of_coef)
    for name, g, e, f, size in zip(names, got, eager, exact, found, strict=True):
        assert_within_budget(g, e, f, name, size=size)
    assert (got[2][labels == IGNORE] == 0).all()
    for first, second in zip(got, ours(), strict=True):
        assert torch.equal(first, second)


def test_nan_stays_in_its_response(generator):
    logits = torch.randn((2, 3, 16), generator=generator).to(DEVICE)
    logits[0, 2, 5] = float("nan")
    labels = torch.zeros((2, 3), dtype=torch.long, device=DEVICE)
    half = torch.full((2,), 0.5, device=DEVICE)
    leaf = logits.requires_grad_()
    out = sk.fused_sppo_loss(leaf, labels, half, half, reduction="none", impl="triton")
    out.loss.sum().backward()
    for value in (out.loss, out.logps, leaf.grad.sum((1, 2))):
        assert value.isnan().tolist() == [True, False]


def test_all_rows_ignored():
    logits = torch.full((2, 3, 5), float("nan"), device=DEVICE, requires_grad=True)
    labels = torch.full((2, 3), IGNORE, device=DEVICE)
    half = torch.full((2,), 0.5, device=DEVICE)
    out = sk.fused_sppo_loss(logits, labels, half, half, impl="triton")
    out.loss.backward()
    assert out.logps.tolist() == [0, 0] and out.loss == 0.25
    assert (logits.grad == 0).all()
