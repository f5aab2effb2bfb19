"""The function that replaces TRL's: against TRL's own, and both against float64."""

import pytest
import torch

pytest.importorskip("trl")

from trl.kernels import ChunkedLogProbFunction

from sppo_kernels.integrations.trl.function import OPTIONAL, dense, fused_logprobs
from sppo_kernels.testing import assert_within_budget, sensitivity

PLAIN = {}
BENT = {"temperature": 0.7, "final_logit_softcapping": 2.0, "logit_scale": 1.7}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# rows, width, vocabulary, dtypes of hidden and head, autocast, with bias, transform of the logits
CASES = {
    "one row, odd vocabulary": (1, 5, 37, F32, F32, None, False, PLAIN),
    "bias, cap, scale, temperature": (23, 16, 101, F32, F32, None, True, BENT),
    "low temperature": (9, 8, 64, F32, F32, None, False, {"temperature": 0.05}),
    "bfloat16": (17, 32, 211, BF16, BF16, None, True, BENT),
    "float16": (17, 32, 211, F16, F16, None, False, PLAIN),
    "bfloat16 states, float32 head": (17, 32, 211, BF16, F32, None, True, PLAIN),
    "float32 states under autocast": (17, 32, 211, F32, F32, BF16, False, BENT),
    "states cast to float32": (11, 32, 211, F32, BF16, None, False, PLAIN),
}


def projected(hidden, weight, bias):
    return hidden @ weight.t() + (0 if bias is None else bias)


def transformed(z, transform):
    z = z * transform.get("logit_scale", 1.0)
    cap = transform.get("final_logit_softcapping")
    return (z if cap is None else cap * torch.tanh(z / cap)) / transform.get("temperature", 1.0)


def truth(z, targets):
    """All outputs in float64, from the definition."""
    logp = z.log_softmax(-1)
    return (
        logp.gather(-1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == targets,
    )


def with_gradients(function, leaves, coefficients):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    loss = sum((c.to(o.dtype) * o).sum() for c, o in zip(coefficients, outputs, strict=False))
    loss.backward()
    grads = {
        name: leaf.grad
        for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True)
        if leaf is not None
    }
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads.values(), leaves, strict=False))
    return outputs, grads


@pytest.mark.parametrize("entropy_gradient", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, entropy_gradient, generator):
    n, d, v, states, head, autocast, biased, transform = CASES[case]

    def random(*shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    # Logits of order 1: a saturated cap makes ties, and ties are decided by the last bit.
    leaves = [random(n, d, dtype=states), (random(v, d, dtype=F32) / d**0.5).to(head)]
    leaves.append(random(v, dtype=head) if biased else None)
    targets = torch.randint(v, (n,), generator=generator)
    # Every other row has the likeliest token, so that is_top1 has both values.
    top = leaves[0].double() @ leaves[1].double().t() + (leaves[2].double() if biased else 0)
    targets = torch.where(torch.arange(n) % 2 == 0, top.argmax(-1), targets)
    coefficients = [random(n, dtype=F32), random(n, dtype=F32)][: 1 + entropy_gradient]
    full = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0, **transform}
    order = (full["final_logit_softcapping"], full["logit_scale"], ("log_probs", *OPTIONAL))

    def theirs(*x):
        return ChunkedLogProbFunction.apply(*x, targets, full["temperature"], 29, *order)

    def ours(*x):
        return fused_logprobs(*x, targets, **transform)

    def exact(*x):
        return truth(transformed(projected(*x), transform), targets)

    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        eager, eager_grads = with_gradients(theirs, leaves, coefficients)
        got, got_grads = with_gradients(ours, leaves, coefficients)
    rounded = states if autocast is None else autocast
    inputs = [None if x is None else x.to(rounded).double() for x in leaves[:2]]
    inputs.append(None if leaves[2] is None else leaves[2].double())
    expected, expected_grads = with_gradients(exact, inputs, coefficients)

    product = projected(*inputs).requires_grad_()
    z = transformed(product, transform)
    outputs = truth(z, targets)
    columns = (("log_probs", *OPTIONAL), got, eager, expected, outputs)
    for name, a, b, c, of_z in zip(*columns, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if name == "is_top1":
            # A tie after rounding to 16 bits is no longer a maximum of the float64 logits.
            assert torch.equal(a, b) if rounded == F32 else (a == b).float().mean() > 0.7
        else:
            assert_within_budget(a, b, c, what=name, size=sensitivity(of_z, z))
    used = zip(coefficients, outputs, strict=False)
    (dz,) = torch.autograd.grad(sum((c.double() * o).sum() for c, o in used), product)
    terms = {"hidden": dz.abs() @ inputs[1].abs()}  # a row's gradient is one sum of them
    for name, grad in got_grads.items():
        # With low precision one rounding more: ours keeps the product of a row in its dtype.
        extra = 2 * torch.finfo(rounded).eps / torch.finfo(grad.dtype).eps
        given = {"what": name, "roundings": max(1.0, extra), "size": terms.get(name)}
        assert_within_budget(grad, eager_grads[name], expected_grads[name], **given)


def test_only_what_is_asked_for(generator):
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    w = torch.randn(9, 3, generator=generator)
    y = torch.randint(9, (4,), generator=generator)
    everything = fused_logprobs(x, w, None, y)
    for name in OPTIONAL:
        some = fused_logprobs(x, w, None, y, outputs=("log_probs", name))
        assert [s is None for s in some] == [
            n not in ("log_probs", name) for n in ("log_probs", *OPTIONAL)
        ]
        assert torch.equal(some[0], everything[0])
    assert everything[1].requires_grad
    assert not any(out.requires_grad for out in everything[2:])


def test_no_rows_give_a_differentiable_zero(generator):
    """A micro-batch whose labels are all masked still takes part in backward, as under DDP."""
    x = torch.randn(0, 3, generator=generator, requires_grad=True)
    w = torch.randn(9, 3, generator=generator, requires_grad=True)
    b = torch.randn(9, generator=generator, requires_grad=True)
    for outputs in (("log_probs",), OPTIONAL):
        out = fused_logprobs(x, w, b, torch.zeros(0, dtype=torch.long), outputs=outputs)
        x.grad = w.grad = b.grad = None
        out[0].new_zeros(2, 2).masked_scatter(torch.zeros(2, 2).bool(), out[0]).sum().backward()
        assert x.grad.shape == x.shape
        assert not w.grad.any() and not b.grad.any()


def test_zero3_weights(generator):
    """A gathered weight that is emptied before backward, as ZeRO-3 does; one not gathered."""
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(9, 3, generator=generator))
    w.ds_id, full = 0, w.data.clone()
    y = torch.randint(9, (4,), generator=generator)

    def plain(x, w):
        return truth(transformed(projected(x, w, None), {}), y)

    expected, grads = with_gradients(
        lambda x, w, _: plain(x, w), [x, full, None], [torch.ones(4)] * 2
    )
    out = fused_logprobs(x, w, None, y)
    w.data = torch.empty(0)
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        fused_logprobs(x, w, None, y)
    (gw, gx) = torch.autograd.grad(out[0].sum() + out[1].sum(), (w, x))
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(gw, grads["weight"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gx, grads["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    with pytest.raises(TypeError, match="quantised"):
        dense("weight", torch.zeros(3, 4).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"final_logit_softcapping": -1.0}, "softcap"),
        ({"outputs": ("perplexity",)}, "perplexity"),
        ({"targets": torch.tensor([9])}, "labels"),
    ],
)
def test_what_cannot_be_done_is_named(change, message):
    call = {"targets": torch.tensor([1]), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        fused_logprobs(torch.zeros(1, 2), torch.zeros(9, 2), None, **call)
