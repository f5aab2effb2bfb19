"""Triton: the row kernel of the hidden-in path, against fp64 and autograd."""

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels.logps.triton import row_logps
from tests.triton_tools import (
    CHUNKS,
    DEVICE,
    DTYPES,
    IGNORE,
    TRANSFORMS,
    assert_same,
    assert_within_budget,
    chunk,
    sizes,
    tiny_blocks,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _reference(z, labels, bias, scale, cap, dtype):
    """(logp, -d logp/dz) by autograd in the given precision; their sizes."""
    active = labels != IGNORE
    z = torch.where(active[:, None], z, 0).detach().to(dtype).requires_grad_()
    u = z if bias is None else z + bias.to(dtype)
    if scale != 1.0:
        u = scale * u
    if cap is not None:
        u = cap * torch.tanh(u / cap)
    logp = torch.log_softmax(u, -1).gather(-1, labels.clamp_min(0)[:, None])[:, 0] * active
    (dz,) = torch.autograd.grad(-logp.sum(), z, retain_graph=True)
    (slope,) = torch.autograd.grad(u.sum(), z)
    of_logp, _, of_p = sizes(u, labels)
    return logp.detach(), dz, (of_logp, slope.abs() * of_p)


def _check(z, labels, bias, scale, cap):
    args = (labels, bias, scale, cap)
    *exact, size = _reference(z, *args, torch.float64)
    *eager, _ = _reference(z, *args, torch.float32)
    before = z.clone()
    plain = row_logps(z, *args, IGNORE, False)
    assert_same(z, before, "z without write_grad")
    logp = row_logps(z, *args, IGNORE, True)
    assert torch.equal(logp, plain), "write_grad changes bits"
    for i, (got, name) in enumerate(((logp, "logp"), (z, "dz"))):
        assert_within_budget(got, eager[i], exact[i], name, size=size[i])
    assert (z[labels == IGNORE] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", CHUNKS.values(), ids=CHUNKS.keys())
def test_values_and_gradients(layout, dtype, generator):
    z, labels, storage = chunk(dtype=dtype, generator=generator, **layout)
    inside = torch.full_like(storage, False, dtype=torch.bool)
    inside.as_strided(z.shape, z.stride(), z.storage_offset()).fill_(True)
    with tiny_blocks():
        _check(z, labels, None, 1.0, None)
    assert storage[~inside].isnan().all(), "written outside z"


@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_bias_scale_and_softcap(transform, vocab, generator):
    has_bias, scale, cap = transform
    z, labels, _ = chunk(3, vocab, torch.float32, generator)
    bias = torch.randn(vocab, generator=generator).to(DEVICE) if has_bias else None
    with tiny_blocks():
        _check(z, labels, bias, scale, cap)


def test_everything_in_bf16(generator):
    z, labels, _ = chunk(4, 37, torch.bfloat16, generator)
    bias = torch.randn(37, generator=generator).to(DEVICE, torch.bfloat16)
    with tiny_blocks():
        _check(z, labels, bias, 0.7, 5.0)


def test_production_blocks(generator):
    """Default blocks, more than one tile, an odd vocabulary."""
    z, labels, _ = chunk(2, 2501, torch.bfloat16, generator)
    _check(z, labels, None, 1.0, 30.0)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("vocab", [48, 37], ids=["aligned", "unaligned"])
def test_infinities_nan_and_large_shifts(vocab, cap, generator):
    inf = float("inf")
    z = torch.randn((8, vocab), generator=generator)
    z[0] += 1e4
    z[1] -= 1e4
    z[2, 3] = inf
    z[3, 20] = float("nan")
    z[4, 5:] = -inf
    z[5, 0] = -inf
    z[6] = -inf
    z[7] = -inf
    z[7, 0] = 3.0
    labels = torch.zeros(8, dtype=torch.long)
    exact = _reference(z, labels, None, 1.0, cap, torch.float64)
    got = z.to(DEVICE)
    with tiny_blocks():
        logp = row_logps(got, labels.to(DEVICE), None, 1.0, cap, IGNORE, True)
    for have, want in ((logp, exact[0]), (got, exact[1])):
        torch.testing.assert_close(have.cpu().double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("label", [37, -1, 2**40])
def test_labels_outside_the_vocabulary_give_nan(label, generator):
    z = torch.randn((3, 37), generator=generator).to(DEVICE)
    labels = torch.tensor([5, label, 6], device=DEVICE)
    bias = torch.randn(37, generator=generator).to(DEVICE)
    with tiny_blocks():
        logp = row_logps(z, labels, bias, 1.0, None, IGNORE, True)
    assert logp.isnan().tolist() == [False, True, False]
    assert z.isnan().all(1).tolist() == [False, True, False]
    assert not z[::2].isnan().any()


def test_two_runs_have_the_same_bits(generator):
    z, labels, _ = chunk(3, 37, torch.bfloat16, generator)
    copy = z.clone()
    with tiny_blocks():
        first = row_logps(z, labels, None, 1.0, 5.0, IGNORE, True)
        second = row_logps(copy, labels, None, 1.0, 5.0, IGNORE, True)
    assert torch.equal(first, second)
    assert torch.equal(z, copy)


def test_nochunk():
    z = torch.zeros((0, 5), device=DEVICE)
    labels = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert row_logps(z, labels, None, 1.0, None, IGNORE, True).shape == (0,)
