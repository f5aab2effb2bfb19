"""Triton on a CUDA device: production shapes, offsets past 2^31, and no synchronisation."""

import pytest
import torch

pytest.importorskip("triton")

from sppo_kernels.logps.triton import (
    row_logps,
    segment_expand,
    segment_sum,
    token_logps,
    token_logps_backward,
)
from tests.triton_tools import IGNORE, assert_within_budget, exact_lse

pytestmark = pytest.mark.gpu


def _problem(n_rows, vocab, dtype, seed=0):
    """Logits made on the device, because at this size the host would be slow; and labels."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.empty((1, n_rows, vocab), dtype=dtype, device="cuda")
    for chunk in logits[0].split(1024):
        chunk.copy_(torch.randn(chunk.shape, generator=generator, device="cuda") * 4)
    labels = torch.randint(0, vocab, (1, n_rows), generator=generator, device="cuda")
    labels[0, 1] = IGNORE
    return logits, labels


def _reference(logits, labels, dtype):
    active = labels != IGNORE
    z = logits.to(dtype)
    y = labels.clamp_min(0)[..., None]
    lse = torch.logsumexp(z, -1)
    logp = torch.log_softmax(z, -1)
    dz = logp.exp().scatter_add(-1, y, -torch.ones_like(y, dtype=dtype))
    return logp.gather(-1, y)[..., 0] * active, lse * active, dz * active[..., None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [128256, 50257, 32001, 1000])
def test_real_vocabularies(vocab, dtype):
    """Whole vectors, rows that start anywhere, and a row of one slice; all three kernels."""
    logits, labels = _problem(64, vocab, dtype, seed=vocab)
    exact = _reference(logits, labels, torch.float64)
    eager = _reference(logits, labels, torch.float32)
    z, one = logits[0].clone(), torch.ones(labels.shape, device="cuda")
    logp, norm = token_logps(logits, labels, IGNORE)
    token_logps_backward(one, logits, labels, logp, norm, IGNORE, logits)
    assert_within_budget(logp, eager[0], exact[0], "logp")
    assert_within_budget(exact_lse(norm).float(), eager[1], exact[1], "lse")
    assert_within_budget(logits, eager[2], exact[2], "dz")

    plain = row_logps(z, labels[0], None, 1.0, None, IGNORE, False)
    logp = row_logps(z, labels[0], None, 1.0, None, IGNORE, True)
    assert torch.equal(logp, plain), "write_grad changes bits"
    assert_within_budget(logp, eager[0][0], exact[0][0], "row logp")
    assert_within_budget(z, eager[2][0], exact[2][0], "row dz")


def test_write_grad_keeps_the_bits_with_bias_scale_and_softcap():
    logits, labels = _problem(64, 50257, torch.bfloat16)
    bias = torch.randn(50257, device="cuda")
    args = (labels[0], bias, 0.7, 30.0, IGNORE)
    plain = row_logps(logits[0], *args, False)
    written = row_logps(logits[0], *args, True)
    assert torch.equal(plain, written)


def test_offsets_past_two_to_the_31():
    """The last rows of 2.2e9 logits agree with the same rows on their own."""
    n_rows, vocab = 17408, 128256
    assert n_rows * vocab > 2**31
    logits, labels = _problem(n_rows, vocab, torch.bfloat16)
    tail = logits[:, -8:].clone()
    row_tail = logits[0, -8:].clone()
    logp, norm = token_logps(logits, labels, IGNORE)
    alone, alone_norm = token_logps(tail, labels[:, -8:], IGNORE)
    assert torch.equal(logp[:, -8:], alone) and torch.equal(norm[:, :, -8:], alone_norm)
    rows = row_logps(logits[0], labels[0], None, 1.0, None, IGNORE, False)
    rows_alone = row_logps(row_tail, labels[0, -8:], None, 1.0, None, IGNORE, True)
    assert torch.equal(rows[-8:], rows_alone)
    one = torch.ones_like(logp)
    token_logps_backward(one, logits, labels, logp, norm, IGNORE, logits)
    token_logps_backward(one[:, -8:], tail, labels[:, -8:], alone, alone_norm, IGNORE, tail)
    assert torch.equal(logits[:, -8:], tail)


def test_two_runs_have_the_same_bits():
    logits, labels = _problem(256, 50257, torch.bfloat16)
    first, second = (token_logps(logits, labels, IGNORE) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_nothing_synchronises_with_the_host():
    logits, labels = _problem(64, 32001, torch.bfloat16)
    cu = torch.tensor([0, 30, 64], device="cuda")

    def everything():
        logp, norm = token_logps(logits, labels, IGNORE)
        coef = segment_expand(segment_sum(logp.flatten(), cu), cu, 64).view_as(logp)
        out = torch.empty_like(logits)
        token_logps_backward(coef, logits, labels, logp, norm, IGNORE, out)
        row_logps(logits[0], labels[0], None, 1.0, 30.0, IGNORE, True)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
