"""Token statistics from hidden states: values, the entropy's gradient, and what they cost."""

import math

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.logps import linear as linear_logps
from sppo_kernels.logps import streaming
from sppo_kernels.logps.linear import TOKEN_STATS
from sppo_kernels.testing import assert_within_budget, poisoned_empty, relative_error, sensitivity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that small inputs take several."""
    monkeypatch.setitem(linear_logps.CHUNK_ROWS, "cpu", 16)


def make(generator, count, dim, vocab, dtype, spread=2.0):
    """hidden, weight, bias, labels; logits have a standard deviation of about `spread`."""
    hidden = torch.randn(count, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * spread / dim**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocab, (count,), generator=generator)


def run(hidden, weight, bias, labels, g_logp, g_entropy, **options):
    """All statistics, then the gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().clone().requires_grad_()
              for t in (hidden, weight, bias)]  # fmt: skip
    options.setdefault("outputs", TOKEN_STATS)
    out = sk.linear_token_stats(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    graded = [(out.logps, g_logp), (out.entropy, g_entropy)]
    graded = [(value, g.to(value.dtype)) for value, g in graded if g is not None]
    torch.autograd.backward(*zip(*graded, strict=True))
    found = dict(zip(out._fields, out, strict=True))
    names = ("d hidden", "d weight", "d bias")
    found.update((n, t.grad) for n, t in zip(names, leaves, strict=True) if t is not None)
    return {name: value.detach() for name, value in found.items() if value is not None}


def logits(hidden, weight, bias, logit_scale, softcap):
    z = logit_scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def statistics(z, labels):
    """Of float64 logits, from the definitions."""
    logp = z.log_softmax(-1)
    counted = labels != -100
    return {
        "logps": logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * counted,
        "entropy": -(logp.exp() * logp).sum(-1) * counted,
        "log_sum_sq_probs": (2 * logp).logsumexp(-1) * counted,
        "mean_logits": z.mean(-1) * counted,
    }


def compare(hidden, weight, bias, labels, g_logp, g_entropy, roundings=1.0, **options):
    args = (labels, g_logp, g_entropy)
    with poisoned_empty():
        ours = run(hidden, weight, bias, *args, impl="native", **options)
    for name in ("memory_budget", "entropy_grad"):
        options.pop(name, None)
    eager = run(hidden, weight, bias, *args, impl="reference", **options)
    double = [None if t is None else t.double() for t in (hidden, weight, bias)]
    truth = run(*double, *args, impl="reference", **options)
    assert ours.keys() == eager.keys() == truth.keys()
    z = logits(*double, options.get("logit_scale", 1.0), options.get("softcap"))
    z = z[options.get("rows", slice(None))].requires_grad_()
    sizes = {name: sensitivity(value, z) for name, value in statistics(z, labels).items()}
    for name, exact in truth.items():
        if name == "is_top1":  # rounded logits tie and swap; exact ones have a test of their own
            assert ours[name].dtype == torch.bool
            assert torch.equal(ours[name], eager[name]) or hidden.dtype != torch.float32
            continue
        assert_within_budget(
            ours[name], eager[name], exact, what=name, roundings=roundings, size=sizes.get(name)
        )


# rows, hidden size, vocabulary, spread of the logits
SHAPES = [
    pytest.param(16, 32, 64, 2.0, id="one-whole-chunk"),
    pytest.param(51, 24, 131, 2.0, id="chunks-with-a-tail-and-odd-vocab"),
    pytest.param(1, 16, 4133, 2.0, id="one-token-and-two-blocks-of-vocab"),
    pytest.param(20, 16, 77, 40.0, id="peaked"),
    pytest.param(20, 16, 77, 1e-3, id="flat"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "dim", "vocab", "spread"), SHAPES)
def test_within_budget(generator, count, dim, vocab, spread, dtype):
    hidden, weight, _, labels = make(generator, count, dim, vocab, dtype, spread)
    upstream = torch.randn(2, count, generator=generator)
    # Each part of dW is rounded once more than a single GEMM's result.
    compare(hidden, weight, None, labels, *upstream, roundings=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["both", "entropy", "logps"])
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["unannounced", "announced"])
def test_heads_and_either_gradient(generator, which, entropy_grad, dtype):
    """Bias, scale and softcap; the log-probs' gradient alone, the entropy's alone, both."""
    hidden, weight, bias, labels = make(generator, 38, 24, 131, dtype)
    labels[3], labels[20:25] = -100, -100
    g_logp, g_entropy = torch.randn(2, 38, generator=generator)
    compare(
        hidden, weight, bias, labels, None if which == "entropy" else g_logp,
        None if which == "logps" else g_entropy, roundings=2.0, logit_scale=1.7, softcap=5.0,
        entropy_grad=entropy_grad,
    )  # fmt: skip


def test_reference_gradcheck(generator):
    hidden, weight, bias, labels = make(generator, 6, 4, 7, torch.float64)
    labels[4] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(h, w, b):
        out = sk.linear_token_stats(h, w, labels, bias=b, logit_scale=1.3, softcap=2.0)
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_unused_vocabulary_of_probability_zero(generator, impl):
    """Bias -inf: p log p is 0 there, in the entropy and in every gradient; -inf is in the mean."""
    hidden, weight, bias, labels = make(generator, 20, 8, 77, torch.float32)
    unused = torch.rand(77, generator=generator) < 0.3
    unused[labels] = False
    upstream = torch.randn(2, 20, generator=generator)
    bias[unused] = -math.inf
    ours = run(hidden, weight, bias, labels, *upstream, impl=impl)
    used = ~unused
    place = used.cumsum(0)[labels] - 1
    truth = run(
        hidden.double(), weight[used].double(), bias[used].double(), place, *upstream,
        impl="reference",
    )  # fmt: skip
    for name in ("logps", "entropy", "log_sum_sq_probs", "d hidden"):
        assert relative_error(ours[name], truth[name]) < 2e-6, name
    for name in ("d weight", "d bias"):
        assert relative_error(ours[name][used], truth[name]) < 2e-6, name
        assert (ours[name][unused] == 0).all(), name
    assert torch.equal(ours["is_top1"], truth["is_top1"])
    assert (ours["mean_logits"] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_the_first_of_equal_maxima_is_top1(generator, impl, softcap, dtype):
    """Logits that are small integers are exact in every dtype, and tie."""
    logits = torch.randint(-3, 4, (48, 37), generator=generator)
    labels = torch.where(
        torch.arange(48) % 2 == 0,  # both answers in every run, whatever the draw
        logits.argmax(-1),
        torch.randint(0, 37, (48,), generator=generator),
    )
    labels[:8] = 36 - logits[:8].flip(-1).argmax(-1)  # the last maximum
    hidden = torch.eye(48).to(dtype)
    out = sk.linear_token_stats(
        hidden, logits.T.to(dtype), labels, outputs=("is_top1",), softcap=softcap, impl=impl
    )
    expected = [min(range(37), key=lambda v, row=row: (-row[v], v)) for row in logits.tolist()]
    assert torch.equal(out.is_top1, labels == torch.tensor(expected))
    assert 10 < out.is_top1.sum() < 48
    assert out.entropy is out.log_sum_sq_probs is out.mean_logits is None


def test_certain_and_uniform_rows():
    """Entropy 0 of one certain token, log V of equal logits: exact limits, however large."""
    vocab = 50
    weight = torch.zeros(vocab, 2)
    weight[7, 1] = 3e4
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    out = sk.linear_token_stats(
        hidden, weight, torch.tensor([4, 7]), outputs=TOKEN_STATS, impl="native"
    )
    nats = math.log(vocab)
    torch.testing.assert_close(out.entropy, torch.tensor([nats, 0.0]), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.log_sum_sq_probs, torch.tensor([-nats, 0.0]), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.mean_logits, torch.tensor([0.0, 600.0]), rtol=1e-7, atol=0)
    assert out.is_top1.tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_an_entropy_gradient_it_is_linear_token_logps(generator, dtype, monkeypatch):
    """The same bits of values and gradients, and nothing is computed twice."""
    hidden, weight, bias, labels = make(generator, 37, 24, 131, dtype)
    labels[5] = -100
    upstream = torch.randn(37, generator=generator)

    def never(*args):
        raise AssertionError("the logits are recomputed although the entropy has no gradient")

    monkeypatch.setattr(streaming, "recomputed", never)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logps = sk.linear_token_logps(leaves[0], leaves[1], labels, bias=leaves[2], impl="native")
    logps.backward(upstream)
    for outputs in ((), ("is_top1",), TOKEN_STATS):
        ours = run(hidden, weight, bias, labels, upstream, None, outputs=outputs, impl="native")
        assert torch.equal(ours["logps"], logps)
        for leaf, name in zip(leaves, ("d hidden", "d weight", "d bias"), strict=True):
            assert torch.equal(ours[name], leaf.grad), (outputs, name)


@pytest.mark.parametrize(("announced", "products"), [(False, 2 + 3), (True, 1 + 3)])
def test_matrix_products_of_a_step(generator, announced, products, monkeypatch):
    """One chunk: forward and backward take as many GEMMs with the vocabulary as documented."""
    hidden, weight, _, labels = make(generator, 16, 24, 131, torch.float32)
    count, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: count.append(1) or mm(*a, **k))
    run(
        hidden, weight, None, labels, torch.ones(16), torch.ones(16), impl="native",
        outputs=("entropy",), entropy_grad=announced,
    )  # fmt: skip
    assert len(count) == products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "entropy"])
def test_memory_budget(generator, with_entropy, dtype):
    """Some rows of dz kept, others recomputed; the entropy's gradient holds one chunk."""
    hidden, weight, bias, labels = make(generator, 57, 24, 131, dtype)
    g_logp, g_entropy = torch.randn(2, 57, generator=generator)
    compare(
        hidden, weight, bias, labels, g_logp, g_entropy if with_entropy else None, roundings=2.0,
        memory_budget=40 * 131 * hidden.element_size(),
    )  # fmt: skip


def test_rows_shared_and_ignored(generator):
    hidden, weight, bias, _ = make(generator, 30, 24, 131, torch.float32)
    rows = torch.randint(0, 30, (50,), generator=generator)
    rows[:6] = 4
    labels = torch.randint(0, 131, (50,), generator=generator)
    labels[torch.rand(50, generator=generator) < 0.4] = -100
    upstream = torch.randn(2, 50, generator=generator)
    compare(hidden, weight, bias, labels, *upstream, rows=rows, roundings=2.0)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_ignored_rows_are_not_looked_at(generator, impl):
    hidden, weight, bias, labels = make(generator, 20, 8, 31, torch.float32)
    labels[3] = -100
    hidden[3] = math.nan
    found = run(hidden, weight, bias, labels, torch.ones(20), torch.ones(20), impl=impl)
    for name, value in found.items():
        assert value.isfinite().all(), name
    for name in ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "d hidden"):
        assert not found[name][3].any(), name


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_all_ignored(generator, impl):
    hidden, weight, bias, labels = make(generator, 18, 8, 31, torch.float32)
    with poisoned_empty():
        found = run(
            hidden, weight, bias, torch.full_like(labels, -100), torch.ones(18), torch.ones(18),
            impl=impl,
        )  # fmt: skip
    for name, value in found.items():
        assert not value.any(), name


@pytest.mark.parametrize("scale", [3000.0, 1e-7])
def test_float16_gradients_neither_overflow_nor_vanish(generator, scale):
    hidden, weight, bias, labels = make(generator, 9, 8, 31, torch.float16)
    hidden, weight = hidden * 100, weight / 100
    upstream = torch.full((2, 9), scale)
    ours = run(hidden, weight, bias, labels, *upstream, impl="native")
    truth = run(*(t.double() for t in (hidden, weight, bias)), labels, *upstream, impl="reference")
    representable = (truth["d weight"].abs() < 6e4) & (truth["d weight"].abs() > 6e-8)
    assert representable.any()
    exact = truth["d weight"][representable]
    # near the smallest subnormals the result itself has few digits
    assert relative_error(ours["d weight"][representable], exact) < (5e-3 if scale > 1 else 2e-2)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "entropy"])
def test_frozen_parts(generator, wanted, with_entropy):
    """LoRA freezes the head, a probe the body: the other's gradient has the same bits."""
    tensors = make(generator, 37, 24, 131, torch.bfloat16)
    g = torch.randn(2, 37, generator=generator)
    g_entropy = g[1] if with_entropy else None
    everything = run(*tensors, g[0], g_entropy, impl="native")
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors[:3])]
    out = sk.linear_token_stats(leaves[0], leaves[1], tensors[3], bias=leaves[2], impl="native")
    loss = out.logps @ g[0] + (out.entropy @ g[1] if with_entropy else 0.0)
    loss.backward()
    names = ("d hidden", "d weight", "d bias")
    assert torch.equal(leaves[wanted].grad, everything[names[wanted]])
    assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["both", "entropy", "logps"])
def test_against_trl(generator, which, dtype):
    """The function that TRL 1.16 trains with: same statistics, same gradients."""
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    hidden, weight, bias, labels = make(generator, 38, 24, 131, dtype)
    g_logp, g_entropy = torch.randn(2, 38, generator=generator)
    g_logp = None if which == "entropy" else g_logp
    g_entropy = None if which == "logps" else g_entropy
    ours = run(
        hidden, weight, bias, labels, g_logp, g_entropy, impl="native", softcap=4.0,
        logit_scale=0.5,
    )  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    out = kernels.ChunkedLogProbFunction.apply(*leaves, labels, 1.0, 50, 4.0, 0.5)
    graded = [(v, g) for v, g in zip(out, (g_logp, g_entropy), strict=False) if g is not None]
    torch.autograd.backward(*zip(*graded, strict=True))
    # bfloat16: TRL rounds z + bias, which is another logit; float32: rounding of sums
    allowed = 3e-6 if dtype == torch.float32 else 2e-2
    for name, value in zip(sk.TokenStats._fields[:4], out, strict=False):
        assert relative_error(ours[name], value) < allowed, name
    if dtype == torch.float32:
        assert torch.equal(ours["is_top1"], out[4])
    for name, leaf in zip(("d hidden", "d weight", "d bias"), leaves, strict=True):
        assert relative_error(ours[name], leaf.grad) < allowed, name


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_what_has_a_gradient(generator, impl):
    hidden, weight, _, labels = make(generator, 5, 8, 31, torch.float32)
    out = sk.linear_token_stats(
        hidden.requires_grad_(), weight, labels, outputs=TOKEN_STATS, impl=impl
    )
    assert [t.requires_grad for t in out] == [True, True, False, False, False]
    with torch.no_grad():
        out = sk.linear_token_stats(hidden, weight, labels, outputs=TOKEN_STATS, impl=impl)
    assert not any(t.requires_grad for t in out)


def test_shapes_and_autocast(generator):
    hidden, weight, _, labels = make(generator, 12, 8, 31, torch.float32)
    hidden, labels = hidden.view(3, 4, 8), labels.view(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sk.linear_token_stats(hidden, weight, labels, outputs=list(TOKEN_STATS))
    low = sk.linear_token_stats(
        hidden.bfloat16(), weight.bfloat16(), labels, outputs=set(TOKEN_STATS)
    )
    for value, expected in zip(out, low, strict=True):
        assert value.shape == (3, 4)
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("outputs", "error", "match"),
    [
        (("entropy", "varentropy"), ValueError, "outputs: .*'varentropy'"),
        ("entropy", TypeError, "outputs: expected a tuple"),
        (None, TypeError, "outputs: expected a tuple"),
    ],
)
def test_bad_outputs_are_named(generator, outputs, error, match):
    hidden, weight, _, labels = make(generator, 3, 4, 7, torch.float32)
    with pytest.raises(error, match=match):
        sk.linear_token_stats(hidden, weight, labels, outputs=outputs)


def test_second_derivatives_say_what_to_do(generator):
    hidden, weight, _, labels = make(generator, 3, 4, 7, torch.float32)
    out = sk.linear_token_stats(hidden.requires_grad_(), weight, labels, impl="native")
    (grad,) = torch.autograd.grad(out.entropy.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        grad.sum().backward()
