"""Logits-in log-probs: values and gradients against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import sppo_kernels as sk
from sppo_kernels.testing import assert_within_budget, poisoned_empty, relative_error, sensitivity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# batch, steps, vocabulary, and the reason for the case
SHAPES = [
    pytest.param(2, 5, 32, id="vocab-of-whole-vectors"),
    pytest.param(3, 7, 1003, id="vocab-prime-tail"),
    pytest.param(1, 1, 257, id="one-token"),
    pytest.param(2, 3, 1, id="vocab-1-probability-is-1"),
    pytest.param(2, 3, 5, id="vocab-below-one-vector"),
    pytest.param(2, 2, 50304, id="many-summation-blocks"),
]


def make(generator, batch, steps, vocab, dtype, scale=4.0):
    logits = torch.randn(batch, steps, vocab, generator=generator) * scale
    labels = torch.randint(0, vocab, (batch, steps), generator=generator)
    return logits.to(dtype), labels


def eager(logits, labels):
    """Same precision, as people write it: log_softmax in float32 at least, gather."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


def size_of(logits, labels):
    """Of log-probs: what one rounding of the logits does to them."""
    z = logits.detach().double().requires_grad_()
    return sensitivity(eager(z, labels), z)


def gradients(function, logits, labels, upstream):
    leaf = logits.detach().clone().requires_grad_()
    out = function(leaf, labels)
    out.backward(upstream.to(out.dtype))
    return out.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "steps", "vocab"), SHAPES)
def test_native_within_budget(generator, batch, steps, vocab, dtype):
    logits, labels = make(generator, batch, steps, vocab, dtype)
    upstream = torch.randn(batch, steps, generator=generator)
    with poisoned_empty():
        value, grad = gradients(
            lambda z, y: sk.token_logps(z, y, impl="native"), logits, labels, upstream
        )
    base, base_grad = gradients(eager, logits, labels, upstream)
    truth, truth_grad = gradients(
        lambda z, y: sk.token_logps(z, y, impl="reference"), logits.double(), labels, upstream
    )
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_budget(value, base, truth, what="log p", size=size_of(logits, labels))
    assert_within_budget(grad, base_grad, truth_grad, what="gradient")


def test_reference_is_log_softmax(generator):
    logits, labels = make(generator, 2, 4, 37, torch.float64)
    expected = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(sk.token_logps(logits, labels), expected)


def test_reference_gradcheck(generator):
    logits, labels = make(generator, 2, 3, 5, torch.float64, scale=1.0)
    labels[0, 1] = -100
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sk.sequence_logps(z, labels), logits)
    assert torch.autograd.gradgradcheck(lambda z: sk.sequence_logps(z, labels), logits)


def test_true_class_gradient_of_a_certain_token():
    """softmax(z)_y − 1 near 0 must not cancel: expm1(log p). Eager float32 is off by percents."""
    logits = torch.zeros(1, 1, 4)  # no two classes share a float32 lane, on any CPU
    logits[..., 3] = 15.0
    leaf = logits.requires_grad_()
    sk.token_logps(leaf, torch.tensor([[3]]), impl="native").sum().backward()
    double = logits.detach().double().requires_grad_()
    sk.token_logps(double, torch.tensor([[3]])).sum().backward()
    assert relative_error(leaf.grad[..., 3], double.grad[..., 3]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_read_in_place(generator, dtype):
    """The usual shift, logits[:, :-1], and rows padded to a wider stride."""
    wide, labels = make(generator, 3, 6, 131, dtype)
    for view in (wide[:, :-1], wide[:, 1:, :127], wide.transpose(0, 1)[1:].transpose(0, 1)):
        target = labels[:, : view.shape[1]].clamp(max=view.shape[2] - 1)
        out = sk.token_logps(view, target, impl="native")
        expected = sk.token_logps(view.double(), target)
        size = size_of(view, target)
        assert_within_budget(out, eager(view, target), expected, size=size)


def test_column_strides_are_copied(generator):
    logits, labels = make(generator, 4, 6, 9, torch.float32)
    view = logits.transpose(1, 2)  # vocabulary of stride 9
    target = labels[:, :1].expand(4, 9).clamp(max=5)
    torch.testing.assert_close(
        sk.token_logps(view, target, impl="native"), sk.token_logps(view.contiguous(), target)
    )


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_ignored_rows_are_never_looked_at(generator, impl):
    logits, labels = make(generator, 2, 4, 33, torch.float32)
    labels[0, 1] = labels[1, 3] = -100
    clean = logits.clone()
    logits[0, 1], logits[1, 3] = float("nan"), float("inf")
    upstream = torch.randn(2, 4, generator=generator)
    out, grad = gradients(lambda z, y: sk.token_logps(z, y, impl=impl), logits, labels, upstream)
    assert (out[labels == -100] == 0).all()
    assert (grad[labels == -100] == 0).all()
    keep = labels != -100
    truth, truth_grad = gradients(
        lambda z, y: sk.token_logps(z, y), clean.double(), labels, upstream
    )
    assert relative_error(out[keep], truth[keep]) < 1e-6
    assert relative_error(grad, truth_grad) < 1e-6


def test_all_rows_ignored(generator):
    logits, labels = make(generator, 2, 4, 33, torch.float32)
    leaf = logits.requires_grad_()
    out = sk.sequence_logps(leaf, torch.full_like(labels, -100), impl="native")
    out.sum().backward()
    assert (out == 0).all()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_output(generator, impl, value):
    logits, labels = make(generator, 1, 3, 65, torch.float32)
    logits[0, 1, 40] = value
    out, grad = gradients(
        lambda z, y: sk.token_logps(z, y, impl=impl), logits, labels, torch.ones(1, 3)
    )
    assert out[0, 1].isnan()
    assert grad[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()
    assert grad[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_masks_tokens(generator, dtype):
    logits, labels = make(generator, 2, 3, 70, dtype)
    logits[..., 20:50] = float("-inf")
    labels = labels.clamp(max=19)
    out, grad = gradients(
        lambda z, y: sk.token_logps(z, y, impl="native"), logits, labels, torch.ones(2, 3)
    )
    kept = torch.cat([logits[..., :20], logits[..., 50:]], -1)
    torch.testing.assert_close(out, sk.token_logps(kept, labels, impl="native"))
    assert (grad[..., 20:50] == 0).all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_shifts_cancel(generator, shift):
    logits, labels = make(generator, 2, 3, 129, torch.float32)
    shifted = logits + shift
    out = sk.token_logps(shifted, labels, impl="native")
    assert relative_error(out, sk.token_logps(shifted.double(), labels)) < 1e-6


def test_thousand_tokens_lose_no_nat(generator):
    logits, labels = make(generator, 1, 1500, 211, torch.bfloat16)
    out = sk.sequence_logps(logits, labels, impl="native")
    exact = sk.sequence_logps(logits.double(), labels)
    assert abs(out.double() - exact).item() < 1e-2


def test_int32_labels(generator):
    logits, labels = make(generator, 2, 4, 33, torch.float32)
    torch.testing.assert_close(
        sk.token_logps(logits, labels.int(), impl="native"),
        sk.token_logps(logits, labels, impl="native"),
        rtol=0,
        atol=0,
    )


def test_more_leading_dimensions(generator):
    logits, labels = make(generator, 6, 5, 33, torch.float32)
    out = sk.token_logps(logits.view(2, 3, 5, 33), labels.view(2, 3, 5), impl="native")
    assert torch.equal(out, sk.token_logps(logits, labels, impl="native").view(2, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward_gives_the_same_bits(generator, dtype):
    logits, labels = make(generator, 2, 4, 131, dtype)
    labels[0, 0] = -100
    upstream = torch.randn(2, 4, generator=generator)
    _, grad = gradients(lambda z, y: sk.token_logps(z, y, impl="native"), logits, labels, upstream)
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1.0
    memory = produced.data_ptr()
    seen = []
    produced.register_hook(lambda g: seen.append(g.data_ptr()))
    out = sk.token_logps(produced, labels, inplace_backward=True, impl="native")
    out.backward(upstream)
    assert torch.equal(leaf.grad, grad)
    assert seen == [memory]


def test_inplace_backward_protects_other_readers(generator):
    logits, labels = make(generator, 2, 4, 31, torch.float32)
    produced = logits.requires_grad_() * 1.0
    other = produced.square()  # saves `produced`, and its backward comes after
    out = sk.token_logps(produced, labels, inplace_backward=True, impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + other.sum()).backward()


def test_second_derivative_is_refused(generator):
    logits, labels = make(generator, 2, 4, 31, torch.float32)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        sk.token_logps(leaf, labels, impl="native").sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.square().sum().backward()


def test_packed_sequences_with_empty_ones(generator):
    logits, labels = make(generator, 1, 9, 77, torch.float32)
    cu = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    leaf = logits[0].clone().requires_grad_()
    out = sk.sequence_logps(leaf, labels[0], cu, impl="native")
    token = sk.token_logps(logits[0].double(), labels[0])
    expected = torch.stack([token[a:b].sum() for a, b in itertools.pairwise(cu)])
    assert relative_error(out, expected) < 1e-6
    assert (out[[0, 2, 4]] == 0).all()
    out[[0, 2, 4]].sum().backward()  # empty sequences: no gradient anywhere
    assert (leaf.grad == 0).all()
