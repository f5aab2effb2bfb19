"""What the Triton tests share, and the device functions on their own."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from sppo_kernels import testing  # noqa: E402
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


def assert_within_budget(got, eager, exact, what, size=None):
    """Element by element, against eager in fp32, not yet rounded to the output's dtype."""
    assert eager.dtype == torch.float32
    testing.assert_within_budget(got, eager, exact, what=what, size=size, elementwise=True)


def sizes(u, labels):
    """What one rounding of the logits u does to log p, the log-sum-exp and every probability."""
    active = labels != IGNORE
    u = torch.where(active[..., None], u, 0).detach().double().requires_grad_()
    lse, p = u.logsumexp(-1), u.softmax(-1).detach()
    logp = u.gather(-1, labels.clamp_min(0)[..., None])[..., 0] - lse
    each, own = p * u.detach().abs(), active[..., None] * p
    # p_i (1 - p_i) |u_i| by its own logit, p_i p_j |u_j| by the others
    of_p = own * (u.detach().abs() * (1 - 2 * p) + each.sum(-1, keepdim=True))
    found = (testing.sensitivity(value, u) * active for value in (logp, lse))
    return (*found, of_p)


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
