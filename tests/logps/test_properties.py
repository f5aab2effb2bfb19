"""What must hold whatever the numbers: symmetries of the batch, layouts, bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sppo_kernels as sk
from sppo_kernels.testing import relative_error


def batch(seed, sequences, steps, dim=12, vocab=53):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(sequences, steps, dim, generator=g),
        "weight": torch.randn(vocab, dim, generator=g) / 2,
        "labels": torch.where(
            torch.rand(sequences, steps, generator=g) < 0.2,
            -100,
            torch.randint(0, vocab, (sequences, steps), generator=g),
        ),
        "ref": torch.randn(sequences, generator=g) * 4 - 4.0 * steps,
        "win": torch.rand(sequences, generator=g),
    }


def step(hidden, weight, labels, ref, win, cu=None, upstream=1.0, **options):
    """loss, logps and gradients of the fused hidden-in loss."""
    h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    options = {"eta": 30.0, "reduction": "sum", "impl": "native"} | options
    out = sk.fused_linear_sppo_loss(h, w, labels, ref, win, cu, **options)
    (out.loss * upstream).backward()
    return out.loss.detach(), out.logps, h.grad, w.grad


cases = given(seed=st.integers(0, 2**31), sequences=st.integers(1, 6), steps=st.integers(0, 9))
few = settings(max_examples=25, deadline=None)


@few
@cases
def test_permuting_responses_permutes_results(seed, sequences, steps):
    b = batch(seed, sequences, steps)
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    loss, logps, grad_h, grad_w = step(**b)
    moved = {k: v if k == "weight" else v[order] for k, v in b.items()}
    loss2, logps2, grad_h2, grad_w2 = step(**moved)
    assert torch.allclose(loss, loss2, rtol=1e-5)
    assert torch.allclose(logps[order], logps2, rtol=1e-6)
    assert torch.allclose(grad_h[order], grad_h2, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grad_w, grad_w2, rtol=1e-4, atol=1e-3)


@few
@cases
def test_splitting_a_batch_splits_the_sum(seed, sequences, steps):
    b = batch(seed, sequences, steps)
    whole = step(**b)
    parts = [
        step(**{k: v if k == "weight" else v[i : i + 1] for k, v in b.items()})
        for i in range(sequences)
    ]
    assert torch.allclose(whole[0], sum(p[0] for p in parts), rtol=1e-5)
    assert torch.allclose(whole[1], torch.cat([p[1] for p in parts]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(whole[2], torch.cat([p[2] for p in parts]), rtol=1e-4, atol=1e-3)
    assert torch.allclose(whole[3], sum(p[3] for p in parts), rtol=1e-4, atol=1e-2)


@few
@cases
def test_padded_equals_packed(seed, sequences, steps):
    """Padding with ignored labels against the same sequences end to end, without padding."""
    b = batch(seed, sequences, steps)
    counted = b["labels"] != -100
    lengths = counted.sum(1)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    packed = b | {"hidden": b["hidden"][counted], "labels": b["labels"][counted], "cu": cu}
    padded_result, packed_result = step(**b), step(**packed)
    assert torch.equal(padded_result[0], packed_result[0])
    assert torch.equal(padded_result[1], packed_result[1])
    assert torch.equal(padded_result[2][counted], packed_result[2])
    assert torch.equal(padded_result[3], packed_result[3])


@few
@given(seed=st.integers(0, 2**31), responses=st.integers(1, 5))
def test_rows_equal_repetition(seed, responses):
    """Responses that share the prompt's last row against a copy of that row for each."""
    b = batch(seed, 1, 8)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 8, (responses, 4), generator=g)
    rows[:, 0] = 0
    labels = torch.randint(0, 53, (responses, 4), generator=g)
    ref, win = torch.full((responses,), -16.0), torch.rand(responses, generator=g)
    hidden = b["hidden"][0]
    shared = step(hidden, b["weight"], labels, ref, win, rows=rows)
    repeated = step(hidden[rows], b["weight"], labels, ref, win)
    assert torch.equal(shared[0], repeated[0])
    assert torch.equal(shared[1], repeated[1])
    summed = torch.zeros_like(hidden).index_add(0, rows.view(-1), repeated[2].view(-1, 12))
    assert torch.allclose(shared[2], summed, rtol=1e-5, atol=1e-5)
    assert torch.equal(shared[3], repeated[3])


@few
@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.0, 0.25, 2.0, 1024.0]))
def test_upstream_gradient_scales(seed, factor):
    """Powers of two (and zero) scale every gradient exactly."""
    b = batch(seed, 3, 7)
    one, scaled = step(**b), step(**b, upstream=factor)
    assert torch.equal(one[2] * factor, scaled[2])
    assert torch.equal(one[3] * factor, scaled[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_two_runs(dtype):
    b = batch(3, 5, 40, dim=64, vocab=1003)
    b |= {k: b[k].to(dtype) for k in ("hidden", "weight")}
    for first, second in zip(step(**b), step(**b), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0}, {"logit_scale": 0.5}])
def test_equal_policy_and_reference_give_a_log_ratio_of_exactly_zero(dtype, head):
    """The reference runs without gradient (1U), the policy with it (3U): the same bits of log p."""
    b = batch(5, 5, 40, dim=64, vocab=1003)
    hidden, weight = b["hidden"].to(dtype), b["weight"].to(dtype)
    with torch.no_grad():
        ref = sk.linear_sequence_logps(hidden, weight, b["labels"], impl="native", **head)
    weight.requires_grad_()
    hidden.requires_grad_()
    policy = sk.linear_sequence_logps(hidden, weight, b["labels"], impl="native", **head)
    assert torch.equal(policy.detach(), ref)
    half = torch.full((5,), 0.5)
    out = sk.fused_linear_sppo_loss(hidden, weight, b["labels"], ref, half, impl="native", **head)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert (weight.grad == 0).all()
    # From logits, too.
    logits = torch.randn(5, 6, 77).to(dtype).requires_grad_()
    target = torch.randint(0, 77, (5, 6))
    with torch.no_grad():
        ref = sk.sequence_logps(logits, target, impl="native")
    assert sk.fused_sppo_loss(logits, target, ref, half, impl="native").loss.item() == 0.0


def test_any_downstream_loss_differentiates(generator):
    """The primitive serves other objectives: DPO on the same sequence log-probs."""
    b = batch(9, 4, 8)
    grads = []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "reference")):
        h, w = (b[k].to(dtype).detach().clone().requires_grad_() for k in ("hidden", "weight"))
        logps = sk.linear_sequence_logps(h, w, b["labels"], impl=impl)
        margin = (logps[:2] - logps[2:]) - (b["ref"][:2] - b["ref"][2:])
        (-torch.nn.functional.logsigmoid(0.1 * margin).mean()).backward()
        grads.append((h.grad, w.grad))
    for value, truth in zip(*grads, strict=True):
        assert relative_error(value, truth) < 1e-5
