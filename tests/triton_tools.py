"""What the Triton tests share: inputs, blocks so small that short rows take several, judgement."""

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels import testing
from sppo_kernels.logps.triton import config

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


def chunk(c, v, dtype, generator, width=None, offset=0):
    """[c, v] inside a NaN-filled storage, its second row ignored and NaN; and labels."""
    width = width or v
    storage = torch.full((offset + c * width,), float("nan"), dtype=dtype, device=DEVICE)
    z = storage[offset:].view(c, width)[:, :v]
    z.copy_(torch.randn((c, v), generator=generator) * 4)
    labels = torch.randint(0, v, (c,), generator=generator).to(DEVICE)
    if c > 1:
        labels[1] = IGNORE
        z[1] = float("nan")
    return z, labels, storage


CHUNKS = {
    "whole vectors, several tiles": {"c": 3, "v": 64},
    "rows start anywhere in a vector": {"c": 9, "v": 37},
    "tile exactly full": {"c": 2, "v": 16},
    "a row inside one vector": {"c": 5, "v": 3},
    "one class": {"c": 3, "v": 1},
    "one row, two tiles and an edge": {"c": 1, "v": 33},
    "padded rows of whole vectors": {"c": 3, "v": 40, "width": 48},
    "padded rows that end inside a vector": {"c": 3, "v": 37, "width": 48},
    "storage offset inside a vector": {"c": 3, "v": 24, "offset": 3},
}

TRANSFORMS = {
    "bias": (True, 1.0, None),
    "scale": (False, 0.0625, None),
    "negative scale: -inf outside the row must stay": (False, -0.5, None),
    "softcap, some logits beyond it": (False, 1.0, 3.0),
    "softcap far above the logits: tanh near 0": (False, 1.0, 1000.0),
    "everything": (True, 0.7, 5.0),
}
