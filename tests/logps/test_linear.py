"""Hidden-in log-probs and the fused loss: values, gradients, memory budget, frozen heads."""

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.logps import linear as linear_logps
from sppo_kernels.testing import assert_within_budget, poisoned_empty, relative_error, sensitivity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that small inputs take several."""
    monkeypatch.setitem(linear_logps.CHUNK_ROWS, "cpu", 16)


def make(generator, batch, steps, dim, vocab, dtype):
    hidden = torch.randn(batch, steps, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * 2 / dim**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (batch, steps), generator=generator)
    return hidden, weight, bias, labels


def run(hidden, weight, bias, labels, upstream, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_()
              for t in (hidden, weight, bias)]  # fmt: skip
    out = sk.linear_token_logps(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def sizes_of(hidden, weight, bias, labels, upstream, logit_scale=1.0, softcap=None):
    """Of log p, by one rounding of the logits; and of d hidden, of the terms of its sums."""
    v = (hidden @ weight.T + (0 if bias is None else bias)).requires_grad_()
    z = logit_scale * v
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = sk.token_logps(z, labels, impl="reference")
    (dv,) = torch.autograd.grad(logp, v, upstream.double(), retain_graph=True)
    return {"log p": sensitivity(logp, z), "hidden": dv.abs() @ weight.abs()}


def compare(hidden, weight, bias, labels, upstream, roundings=1.0, **options):
    with poisoned_empty():
        ours = run(hidden, weight, bias, labels, upstream, impl="native", **options)
    options.pop("memory_budget", None)
    eager = run(hidden, weight, bias, labels, upstream, impl="reference", **options)
    double = [None if t is None else t.double() for t in (hidden, weight, bias)]
    truth = run(*double, labels, upstream, impl="reference", **options)
    sizes = sizes_of(*double, labels, upstream, **options)
    names = ("log p", "hidden", "weight", "bias")
    for name, value, base, exact in zip(names, ours, eager, truth, strict=False):
        given = {"what": name, "roundings": roundings, "size": sizes.get(name)}
        assert_within_budget(value, base, exact, **given)


# batch, steps, hidden size, vocabulary, and the reason for the case
SHAPES = [
    pytest.param(2, 8, 32, 64, id="one-chunk"),
    pytest.param(3, 17, 24, 131, id="chunks-with-a-tail-and-odd-vocab"),
    pytest.param(1, 1, 16, 33, id="one-token"),
    pytest.param(4, 16, 8, 50, id="whole-chunks"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "steps", "dim", "vocab"), SHAPES)
def test_within_budget(generator, batch, steps, dim, vocab, dtype):
    hidden, weight, _, labels = make(generator, batch, steps, dim, vocab, dtype)
    upstream = torch.randn(batch, steps, generator=generator)
    compare(hidden, weight, None, labels, upstream)


HEADS = [
    pytest.param({"bias": True}, id="bias-GPT-J-Phi"),
    pytest.param({"logit_scale": 0.0625}, id="scale-Cohere-Granite"),
    pytest.param({"softcap": 3.0}, id="softcap-Gemma"),
    pytest.param({"bias": True, "logit_scale": 1.7, "softcap": 5.0}, id="all-three"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads_within_budget(generator, head, dtype):
    hidden, weight, bias, labels = make(generator, 2, 19, 24, 131, dtype)
    options = {k: v for k, v in head.items() if k != "bias"}
    upstream = torch.randn(2, 19, generator=generator)
    compare(hidden, weight, bias if "bias" in head else None, labels, upstream, **options)


def test_bias_gradient_over_many_rows(generator):
    hidden, weight, bias, labels = make(generator, 1, 1000, 16, 1003, torch.float32)
    compare(hidden, weight, bias, labels, torch.randn(1, 1000, generator=generator))


def test_reference_gradcheck(generator):
    hidden, weight, bias, labels = make(generator, 2, 3, 4, 7, torch.float64)
    labels[1, 1] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(h, w, b):
        return sk.linear_sequence_logps(h, w, labels, bias=b, logit_scale=1.3, softcap=2.0)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kept_rows", [0, 16, 40], ids=["nothing-kept", "one-chunk-kept", "some-kept"]
)
def test_memory_budget_recomputes_what_does_not_fit(generator, kept_rows, dtype):
    hidden, weight, bias, labels = make(generator, 3, 19, 24, 131, dtype)
    upstream = torch.randn(3, 19, generator=generator)
    budget = (kept_rows + 16) * 131 * hidden.element_size() + 1
    # Each part of dW is rounded once more than a single GEMM's result.
    compare(hidden, weight, bias, labels, upstream, roundings=2.0, memory_budget=budget)


def loss_inputs(generator, sequences, mean):
    ref = torch.randn(sequences, generator=generator) * 3 + mean
    return ref, torch.rand(sequences, generator=generator)


def fused(hidden, weight, bias, labels, ref, win, cu=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    out = sk.fused_linear_sppo_loss(
        leaves[0], leaves[1], labels, ref, win, cu, bias=leaves[2], **options
    )
    (out.loss * 3.0).backward()
    return out.loss.detach(), out.logps, *(t.grad for t in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "budget_rows",
    [200, 60, 30, 8],
    ids=["one-group", "groups-of-3", "groups-of-1", "a-sequence-over-the-budget"],
)
def test_grouped_loss(generator, budget_rows, reduction, dtype):
    """Groups of whole sequences, finished one after another: same loss, same gradients."""
    hidden, weight, bias, labels = make(generator, 7, 19, 24, 131, dtype)
    labels[2] = -100  # a sequence without a token
    labels[3, :5] = -100
    ref, win = loss_inputs(generator, 7, -95.0)
    weights = torch.rand(7, generator=generator) + 0.1
    options = {"reduction": reduction, "weights": weights, "eta": 50.0, "softcap": 8.0}
    budget = budget_rows * 131 * hidden.element_size()
    with poisoned_empty():
        ours = fused(
            hidden, weight, bias, labels, ref, win, impl="native", memory_budget=budget, **options
        )
    eager = fused(hidden, weight, bias, labels, ref, win, impl="reference", **options)
    truth = fused(
        hidden.double(), weight.double(), bias.double(), labels, ref, win, impl="reference",
        **options,
    )  # fmt: skip
    names = ("loss", "logps", "hidden", "weight", "bias")
    for name, value, base, exact in zip(names, ours, eager, truth, strict=True):
        # one loss, seven sums: eager may be exact by luck, so they get the roundings of their terms
        slack = 4.0 if name in ("loss", "logps") else 1.0
        assert_within_budget(value, base, exact, what=name, roundings=slack)


@pytest.mark.parametrize("chunk", [7, 16])
def test_grouped_packed_with_host_offsets(generator, chunk, monkeypatch):
    monkeypatch.setitem(linear_logps.CHUNK_ROWS, "cpu", chunk)
    hidden, weight, bias, labels = make(generator, 1, 57, 24, 131, torch.float32)
    cu = torch.tensor([0, 3, 3, 30, 41, 57])
    ref, win = loss_inputs(generator, 5, -50.0)
    args = (hidden[0], weight, bias, labels[0], ref, win, cu)
    ours = fused(*args, impl="native", memory_budget=28 * 131 * 4)
    truth = fused(*(t.double() for t in args[:3]), *args[3:], impl="reference")
    for value, exact in zip(ours, truth, strict=True):
        assert relative_error(value, exact) < 2e-6


def test_budget_bounds_what_is_held(generator, monkeypatch):
    """The buffers of logits that the streaming code allocates stay within the budget."""
    hidden, weight, bias, labels = make(generator, 4, 40, 8, 300, torch.float32)
    ref, win = loss_inputs(generator, 4, -250.0)
    sizes = []
    allocate = torch.Tensor.new_empty

    def spy(like, *shape, **kwargs):
        out = allocate(like, *shape, **kwargs)
        if out.dim() == 2 and out.shape[1] == 300:
            sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", spy)
    budget = 100 * 300 * 4
    for call in ("fused", "bare"):
        sizes.clear()
        if call == "fused":
            fused(hidden, weight, bias, labels, ref, win, impl="native", memory_budget=budget)
        else:
            run(
                hidden, weight, bias, labels, torch.ones(4, 40), impl="native",
                memory_budget=budget,
            )  # fmt: skip
        assert sizes, "the spy saw no buffer of logits"
        assert max(sizes) <= budget
        # bare: what forward keeps and the chunk in work together, in either pass
        assert sum(sizes[:2]) <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_parts(generator, dtype):
    """LoRA freezes the head; a probe freezes the body: the other's gradient is unchanged."""
    hidden, weight, bias, labels = make(generator, 2, 19, 24, 131, dtype)
    upstream = torch.randn(2, 19, generator=generator)
    everything = run(hidden, weight, bias, labels, upstream, impl="native")
    for wanted in range(3):
        leaves = [t.detach().clone() for t in (hidden, weight, bias)]
        leaves[wanted].requires_grad_()
        out = sk.linear_token_logps(leaves[0], leaves[1], labels, bias=leaves[2], impl="native")
        out.backward(upstream)
        assert torch.equal(out.detach(), everything[0])
        assert torch.equal(leaves[wanted].grad, everything[1 + wanted])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


def test_frozen_head_keeps_no_logits(generator):
    """2U: what autograd saves is the size of the hidden states, not of the logits."""
    hidden, weight, _, labels = make(generator, 2, 40, 8, 3000, torch.float32)
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sk.linear_token_logps(hidden.requires_grad_(), weight, labels, impl="native")
    assert max(saved) <= max(weight.numel(), hidden.numel())


@pytest.mark.parametrize("where", ["rows", "compaction", "both"])
def test_rows_and_ignored_labels(generator, where):
    """K responses share the last prompt token's row; ignored labels cost and change nothing."""
    hidden, weight, bias, _ = make(generator, 1, 30, 24, 131, torch.float32)
    rows = torch.randint(0, 30, (50,), generator=generator)
    rows[:6] = 4
    labels = torch.randint(0, 131, (50,), generator=generator)
    if where != "rows":
        labels[torch.rand(50, generator=generator) < 0.4] = -100
    if where == "compaction":
        rows = torch.randperm(50, generator=generator) % 30
    upstream = torch.randn(50, generator=generator)
    ours = run(hidden[0], weight, bias, labels, upstream, rows=rows, impl="native")
    double = [t.double() for t in (hidden[0], weight, bias)]
    repeated = run(*double, labels, upstream, rows=rows, impl="reference")
    for value, exact in zip(ours, repeated, strict=True):
        assert relative_error(value, exact) < 1e-6


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_nan_in_an_ignored_hidden_row_goes_nowhere(generator, impl):
    hidden, weight, bias, labels = make(generator, 2, 9, 8, 31, torch.float32)
    labels[0, 3] = -100
    hidden[0, 3] = float("nan")
    for result in run(hidden, weight, bias, labels, torch.ones(2, 9), impl=impl):
        assert result.isfinite().all()


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_nan_in_a_counted_row_reaches_the_output(generator, impl):
    hidden, weight, bias, labels = make(generator, 2, 9, 8, 31, torch.float32)
    hidden[0, 3] = float("nan")
    out, grad_hidden, *_ = run(hidden, weight, bias, labels, torch.ones(2, 9), impl=impl)
    assert out[0, 3].isnan()
    assert grad_hidden[0, 3].isnan().all()
    assert out[1].isfinite().all()
    assert grad_hidden[1].isfinite().all()


def test_all_ignored_gives_zero_gradients(generator):
    hidden, weight, bias, labels = make(generator, 2, 9, 8, 31, torch.float32)
    with poisoned_empty():
        results = run(
            hidden, weight, bias, torch.full_like(labels, -100), torch.ones(2, 9), impl="native"
        )
    for result in results:
        assert (result == 0).all()


def test_float16_weight_gradient_does_not_overflow(generator):
    """Coefficients of 2η(…) times hidden states pass 65504; their product with dz does not."""
    hidden, weight, bias, labels = make(generator, 2, 9, 8, 31, torch.float16)
    hidden, weight = hidden * 100, weight / 100
    upstream = torch.full((2, 9), 3000.0)
    ours = run(hidden, weight, bias, labels, upstream, impl="native")
    truth = run(*(t.double() for t in (hidden, weight, bias)), labels, upstream, impl="reference")
    assert (upstream[..., None] * hidden).abs().max() > 65504
    fits = truth[2].abs() < 6e4
    assert fits.any()
    assert relative_error(ours[2].double()[fits], truth[2][fits]) < 5e-3
