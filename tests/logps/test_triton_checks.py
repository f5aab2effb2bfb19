"""What the Triton tests share, and the device functions on their own."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from sppo_kernels.logps.triton import config  # noqa: E402
from sppo_kernels.logps.triton._tile import expm1, tanh_and_slope  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiny_blocks():
    """Blocks so small that short rows have several slices, tiles and tails."""
    return config.overridden(
        split=config.Block(16, 1),
        row=config.Block(16, 1),
        segment=config.Block(4, 1),
        finalize=config.Block(8, 1),
    )


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Memory that is allocated and not written holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def exact_lse(norm):
    """m + log l in fp64 of what `token_logps` returns; 0 for rows that it ignored."""
    m, l_sum = norm.double()
    return torch.where((m == 0) & (l_sum == 0), 0.0, m + l_sum.log())


def assert_within_budget(got, exact, eager, what, rounding=0.0):
    """|got - exact| <= 2 x the largest error of eager fp32 + one rounding of the output's dtype.

    `eager` is the same computation on the same inputs in fp32, before its result is rounded.
    `rounding` is what rounding inside the computation may add, where so few values are compared
    that eager may be exact by luck.
    """
    assert eager.dtype == torch.float32 and exact.dtype == torch.float64
    got64 = got.double()
    error = (got64 - exact).abs()
    scale = exact.abs().max() if got.dtype == torch.float32 else exact.abs()
    info = torch.finfo(got.dtype)
    bound = 2 * (eager.double() - exact).abs().max() + info.eps * scale + info.smallest_normal
    bound = bound + rounding
    assert not got64.isnan().any(), f"{what}: NaN"
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"{what}: error {error.flatten()[worst]:.3e} over the budget of "
        f"{bound.expand_as(error).flatten()[worst]:.3e} at {worst}"
    )


def assert_same(got, expected, what):
    """Equal values; NaN where NaN is expected."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=what)


@triton.jit
def _apply(x, y_expm1, y_tanh, y_slope, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(y_expm1 + at, expm1(value))
    t, slope = tanh_and_slope(value)
    tl.store(y_tanh + at, t)
    tl.store(y_slope + at, slope)


def test_device_functions_are_accurate_to_a_few_ulps(generator):
    """Relative error, also near zero and at the joint of series and exponential."""
    magnitude = torch.exp(torch.empty(1022).uniform_(-16, 3.6, generator=generator))
    sign = torch.randint(0, 2, (1022,), generator=generator) * 2 - 1
    x = torch.cat([magnitude * sign, torch.tensor([0.4999999, -0.5])]).to(DEVICE)
    a, b, c = (torch.empty_like(x) for _ in range(3))
    _apply[(1,)](x, a, b, c, N=1024)
    x64 = x.double()
    pairs = ((a, torch.expm1(x64)), (b, torch.tanh(x64)), (c, torch.cosh(x64) ** -2))
    for got, exact in pairs:
        relative = ((got.double() - exact) / exact).abs()
        # exp(x) itself loses about |x| roundings, those of x log2(e)
        assert (relative <= 2**-23 * (3 + 3 * x64.abs())).all(), relative.max()


def test_device_functions_at_the_limits():
    x = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")], device=DEVICE)
    a, b, c = (torch.empty_like(x) for _ in range(3))
    _apply[(1,)](x, a, b, c, N=4)
    assert_same(a, torch.expm1(x), "expm1")
    assert_same(b, torch.tanh(x), "tanh")
    assert_same(c, torch.cosh(x) ** -2, "slope")
