"""Random games, and how the two implementations are named, for the tests of preference games."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sppo_kernels.backend import native_error

needs_native = pytest.mark.skipif(
    native_error() is not None, reason=f"the compiled extension is not loaded: {native_error()}"
)
IMPLS = [pytest.param("native", marks=needs_native), "reference"]
ROOT = Path(__file__).resolve().parent.parent


def random_logits(generator, *shape: int, dtype=torch.float64, scale=2.0) -> Tensor:
    return scale * torch.randn(*shape, shape[-1], generator=generator, dtype=dtype)


def random_games(generator, *shape: int, dtype=torch.float64) -> Tensor:
    """P [*shape, K] with P + P^T = 1 and no two entries alike; `shape` ends with K."""
    c = random_logits(generator, *shape)
    return torch.sigmoid(c - c.mT).to(dtype)


def random_lengths(generator, games: int, k: int) -> Tensor:
    lengths = torch.randint(2, k + 1, (games,), generator=generator)
    lengths[0], lengths[-1] = 2, k  # both ends always occur
    return lengths


def poisoned(x: Tensor, lengths: Tensor) -> Tensor:
    """x with NaN wherever it must not be read: past the lengths and on the diagonal."""
    k = x.shape[-1]
    inside = torch.arange(k) < lengths[:, None]
    read = inside[:, :, None] & inside[:, None, :] & ~torch.eye(k, dtype=torch.bool)
    return x.masked_fill(~read, torch.nan)


def shared_data() -> Path:
    """The folder of the llmfao comparisons, beside the checkout; skips the test without it."""
    path = ROOT.parent / "shared" / "data" / "llmfao"
    if not path.exists():
        pytest.skip(f"no llmfao data at {path}")
    return path
