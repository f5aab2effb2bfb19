"""Triton: statistics of rows of logits and the entropy's gradient, against fp64 and autograd."""

import pytest
import torch

pytest.importorskip("triton")

import sppo_kernels as sk
from sppo_kernels.logps import linear as linear_logps
from sppo_kernels.logps import reference
from sppo_kernels.logps.linear import TOKEN_STATS
from sppo_kernels.logps.triton import row_stats, row_stats_backward
from sppo_kernels.testing import assert_within_budget as assert_error
from tests.triton_tools import (
    CHUNKS,
    DEVICE,
    IGNORE,
    TRANSFORMS,
    assert_same,
    assert_within_budget,
    chunk,
    tiny_blocks,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _reference(z, labels, bias, scale, cap, g_logp, g_entropy, dtype):
    """Statistics and the gradient in z, by autograd in the given precision."""
    active = labels != IGNORE
    z = torch.where(active[:, None], z, 0).detach().to(dtype).requires_grad_()
    u = z if bias is None else z + bias.to(dtype)
    u = scale * u
    if cap is not None:
        u = cap * torch.tanh(u / cap)
    logp = reference.token_logps(u, labels, IGNORE)
    entropy, squares, mean, top1 = reference.logits_stats(u, labels, IGNORE, *[True] * 4)
    objective = (logp * g_logp.to(dtype)).sum() + (entropy * g_entropy.to(dtype)).sum()
    (dz,) = torch.autograd.grad(objective, z)
    return entropy.detach(), squares, mean, top1, dz


def _check(z, labels, bias, scale, cap, generator):
    """Kernels within the error budget; what is not asked for changes nothing else."""
    args = (labels, bias, scale, cap)
    upstream = torch.randn(2, len(labels), generator=generator).to(DEVICE)
    exact = _reference(z, *args, *upstream, torch.float64)
    eager = _reference(z, *args, *upstream, torch.float32)
    before = z.clone()
    norm, *found = row_stats(z, *args, IGNORE, True, True, True, True)
    assert_same(z, before, "z")
    for name, got, want, base in zip(TOKEN_STATS, found, exact, eager, strict=False):
        if name == "is_top1":
            assert torch.equal(got, base), name
        else:  # differences of two: of means and log-sum-exps of logits
            size = 2 * (1 + before.nan_to_num().abs().max().item())
            assert_within_budget(got, base, want, name, size=size)
    only = row_stats(z, *args, IGNORE, False, True, False, True)
    assert torch.equal(only[2], found[1]) and torch.equal(only[4], found[3])
    assert [t.numel() for t in (only[0], only[1], only[3])] == [0, 0, 0]
    row_stats_backward(z, *args, IGNORE, norm, *upstream)
    # The gradient is one too: of g p (log p + H), which is of order g, and of g p.
    size = 2 * upstream.abs().max().item() * max(1.0, scale)
    assert_within_budget(z, eager[4], exact[4], "dz", size=size)
    assert (z[labels == IGNORE] == 0).all()


# float16 differs from bfloat16 in conversions alone: one layout with tiles and edges
CASES = [(name, dtype) for name in CHUNKS for dtype in (torch.float32, torch.bfloat16)]
CASES.append(("rows start anywhere in a vector", torch.float16))


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_values_and_gradients(layout, dtype, generator):
    z, labels, storage = chunk(dtype=dtype, generator=generator, **CHUNKS[layout])
    inside = torch.full_like(storage, False, dtype=torch.bool)
    inside.as_strided(z.shape, z.stride(), z.storage_offset()).fill_(True)
    with tiny_blocks():
        _check(z, labels, None, 1.0, None, generator)
    assert storage[~inside].isnan().all(), "written outside z"


@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_bias_scale_and_softcap(transform, vocab, generator):
    has_bias, scale, cap = transform
    z, labels, _ = chunk(3, vocab, torch.float32, generator)
    bias = torch.randn(vocab, generator=generator).to(DEVICE) if has_bias else None
    with tiny_blocks():
        _check(z, labels, bias, scale, cap, generator)


@pytest.mark.parametrize("spread", [30.0, 1e-3], ids=["peaked", "flat"])
def test_production_blocks(spread, generator):
    """Default blocks, more than one tile, an odd vocabulary, everything in the head."""
    z, labels, _ = chunk(3, 2501, torch.bfloat16, generator)
    z *= spread / 4
    bias = torch.randn(2501, generator=generator).to(DEVICE, torch.bfloat16) * spread
    _check(z, labels, bias, 0.7, 1.5 * spread, generator)


@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
def test_first_of_equal_maxima(vocab, generator):
    z = torch.randint(-3, 4, (40, vocab), generator=generator).float()
    labels = torch.randint(0, vocab, (40,), generator=generator)
    labels[:12] = z[:12].argmax(-1)
    labels[12:24] = vocab - 1 - z[12:24].flip(-1).argmax(-1)
    with tiny_blocks():
        *_, top1 = row_stats(
            z.to(DEVICE, torch.bfloat16), labels.to(DEVICE), None, 1.0, None, IGNORE,
            False, False, False, True,
        )  # fmt: skip
    assert torch.equal(top1.cpu(), z.argmax(-1) == labels)
    assert top1[:12].all() and not top1.all()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
def test_infinities_nan_and_large_shifts(vocab, cap, generator):
    inf = float("inf")
    z = torch.randn((7, vocab), generator=generator)
    z[0] += 1e4
    z[1] -= 1e4
    z[2, 3] = inf
    z[3, 20] = float("nan")
    z[4, 5:] = -inf
    z[5, 0] = -inf  # the label's
    z[6] = -inf
    z[6, 0] = 3.0
    labels = torch.zeros(7, dtype=torch.long)
    upstream = torch.randn(2, 7, generator=generator)
    *exact, _, dz = _reference(z, labels, None, 1.0, cap, *upstream, torch.float64)
    got = z.to(DEVICE)
    with tiny_blocks():
        args = (labels.to(DEVICE), None, 1.0, cap, IGNORE)
        norm, *found, _ = row_stats(got, *args, True, True, True, True)
        row_stats_backward(got, *args, norm, *upstream.to(DEVICE))
    for have, want in zip((*found, got), (*exact, dz), strict=True):
        # relative to logits of 1e4 in float32
        torch.testing.assert_close(have.cpu().double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("label", [37, -1, 2**40])
def test_labels_outside_the_vocabulary_give_nan(label, generator):
    z = torch.randn((3, 37), generator=generator).to(DEVICE)
    labels = torch.tensor([5, label, 6], device=DEVICE)
    bias = torch.randn(37, generator=generator).to(DEVICE)
    args = (labels, bias, 1.0, None, IGNORE)
    with tiny_blocks():
        norm, *found, top1 = row_stats(z, *args, True, True, True, True)
        row_stats_backward(
            z, *args, norm, torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
        )
    for values in found:
        assert values.isnan().tolist() == [False, True, False]
    assert not top1[1]
    assert z.isnan().all(1).tolist() == [False, True, False]
    assert not z[::2].isnan().any()


def test_two_runs_have_the_same_bits(generator):
    z, labels, _ = chunk(3, 37, torch.bfloat16, generator)
    copy = z.clone()
    upstream = torch.randn(2, 3, generator=generator).to(DEVICE)
    args = (labels, None, 1.0, 5.0, IGNORE)
    with tiny_blocks():
        first = row_stats(z, *args, True, True, True, True)
        for again in zip(first, row_stats(copy, *args, True, True, True, True), strict=True):
            assert_same(*again, "statistics")
        for logits in (z, copy):
            row_stats_backward(logits, *args, first[0], *upstream)
    assert torch.equal(z, copy)


def test_nochunk():
    z = torch.zeros((0, 5), device=DEVICE)
    labels = torch.zeros(0, dtype=torch.long, device=DEVICE)
    norm, *found = row_stats(z, labels, None, 1.0, None, IGNORE, True, True, True, True)
    assert norm.shape == (3, 0) and all(t.shape == (0,) for t in found)
    row_stats_backward(z, labels, None, 1.0, None, IGNORE, norm, *found[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_end_to_end(dtype, generator, monkeypatch):
    """Through the streaming driver and autograd, several chunks long, some labels ignored."""
    monkeypatch.setitem(linear_logps.CHUNK_ROWS, DEVICE, 4)
    on = {"device": DEVICE}
    hidden = torch.randn(3, 7, 16, generator=generator).to(dtype=dtype, **on)
    weight = (torch.randn(67, 16, generator=generator) / 2).to(dtype=dtype, **on)
    bias = torch.randn(67, generator=generator).to(dtype=dtype, **on)
    labels = torch.randint(0, 67, (3, 7), generator=generator).to(**on)
    labels[1, 2:5] = -100
    upstream = torch.randn(2, 3, 7, generator=generator).to(**on)
    results = []
    for impl, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(cast).requires_grad_() for t in (hidden, weight, bias)]
        out = sk.linear_token_stats(
            leaves[0], leaves[1], labels, bias=leaves[2], outputs=TOKEN_STATS, softcap=4.0,
            logit_scale=1.5, impl=impl,
        )  # fmt: skip
        (out.logps * upstream[0] + out.entropy * upstream[1]).sum().backward()
        results.append((*out[:4], *(t.grad for t in leaves)))
    names = (*sk.TokenStats._fields[:4], "hidden", "weight", "bias")
    for name, value, eager, truth in zip(names, *results, strict=True):
        # seven rounded parts of a weight's gradient; sums that eager may have exact by luck
        assert_error(value, eager, truth, what=name, roundings=4.0)
