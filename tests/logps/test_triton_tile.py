"""Triton: the device functions on their own."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from sppo_kernels.logps.triton._tile import expm1, tanh_and_slope  # noqa: E402
from tests.triton_tools import DEVICE, assert_same  # noqa: E402


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
