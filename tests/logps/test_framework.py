"""The operators inside PyTorch: opcheck, compile, autocast, checkpointing, accumulation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import sppo_kernels as sk
from sppo_kernels.logps import call as calls
from sppo_kernels.logps import linear, segments, streaming
from sppo_kernels.registry import kernels
from sppo_kernels.testing import relative_error
from tests.logps.test_stats import make

OPS = torch.ops.sppo_kernels
# What opcheck can check of an operator that mutates an argument or has no gradient.
FORWARD_ONLY = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def inputs(dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(3, 5, 8).to(dtype).requires_grad_(grad),
        "weight": torch.randn(17, 8).to(dtype).requires_grad_(grad),
        "labels": torch.randint(0, 17, (3, 5)),
        "ref": torch.full((3,), -14.0),
        "win": torch.tensor([0.1, 0.5, 0.9]),
    }


def test_opcheck_of_every_operator():
    i = inputs()
    logits = torch.randn(3, 5, 17, requires_grad=True)
    labels, cu = i["labels"], torch.tensor([0, 5, 10, 15])
    logp, norm = OPS.token_logps(logits.detach(), labels, -100, False, "native")
    upstream = torch.randn(3, 5)
    hidden, weight = i["hidden"].view(15, 8).detach().requires_grad_(), i["weight"]
    bias = torch.randn(17, requires_grad=True)
    head = (hidden, weight, bias, labels.view(-1), None, 1.5, 3.0, -100, 4)
    call, some = (*head, 15, "native"), (True, False, True, True)
    done = {
        "token_logps": (logits, labels, -100, False, "native"),
        "token_logps_backward": (upstream, logits.detach(), labels, logp, norm, -100, "native"),
        "segment_sum": (torch.randn(15, requires_grad=True), cu, "native"),
        "segment_expand": (torch.randn(3, requires_grad=True), cu, 15, "native"),
        "linear_token_logps": (*call, False, False, False, False, True),
        "linear_sppo_grouped": (
            *head, 10, "native", [0, 5, 10, 15], [0, 2, 3], i["ref"], i["win"], torch.ones(3),
            10.0, 1.0, True, True, True,
        ),
        "native_token_logps": (logits.detach(), labels, -100),
        "native_segment_sum": (torch.randn(15), cu),
        "native_segment_expand": (torch.randn(3), cu, 15),
    }  # fmt: skip
    for name, args in done.items():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        if name not in ("linear_sppo_grouped", "linear_token_logps"):
            tests += ("test_aot_dispatch_dynamic",)
        opcheck(getattr(OPS, name).default, args, test_utils=tests)
    for wanted in ((True,) * 4, (False, False, False, True)):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(OPS.linear_token_logps.default, (*call, *wanted, True), test_utils=tests)
    call = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in call)
    *_, norm3, dx, dz = OPS.linear_token_logps(*call, True, False, False, False, True)
    z, flat = torch.randn(15, 17), labels.view(-1)
    mutating = {
        "token_logps_backward_": (
            upstream, logits.detach(), labels, upstream, norm, -100, "native",
        ),
        "native_token_logps_backward": (
            upstream, logits.detach(), labels, upstream, norm, -100, torch.empty(3, 5, 17),
        ),
        "native_row_logps": (torch.randn(4, 17), flat[:4], None, 1.0, None, -100, True),
        "native_row_stats": (z, flat, bias.detach(), 1.5, 3.0, -100, *some),
        "native_row_stats_backward": (
            z, flat, bias.detach(), 1.5, 3.0, -100, norm3, upstream.view(-1), upstream.view(-1),
        ),
        "linear_token_logps_backward": (
            upstream.view(-1), None, *call, norm3, dx, dz, True, True, True,
        ),
    }  # fmt: skip
    for name, args in mutating.items():
        opcheck(getattr(OPS, name).default, args, test_utils=("test_schema", "test_faketensor"))
    given = upstream.view(-1)
    for grads in ((given, given), (None, given), (given, None)):
        args = (*grads, *call, norm3, dx, dz, True, True, True)
        backward = OPS.linear_token_logps_backward.default
        opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "sppo_k" in n}
    assert set(done) | set(mutating) == {n for n in names if not n.startswith("game_")}


def losses(i, impl, **options):
    linear = sk.fused_linear_sppo_loss(
        i["hidden"], i["weight"], i["labels"], i["ref"], i["win"], impl=impl, **options
    )
    logits = i["hidden"] @ i["weight"].T
    plain = sk.fused_sppo_loss(logits, i["labels"], i["ref"], i["win"], impl=impl)
    tokens = sk.sequence_logps(logits, i["labels"], impl=impl)
    return linear.loss + plain.loss + sk.sppo_loss(tokens, i["ref"], i["win"])


@pytest.mark.parametrize("impl", ["native", "reference", "auto"])
def test_compile_fullgraph(impl):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        i = inputs()
        function = losses
        if compiled:
            function = torch.compile(losses, fullgraph=True, backend="aot_eager")
        loss = function(i, impl)
        loss.backward()
        results.append((loss, i["hidden"].grad, i["weight"].grad))
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "entropy"])
def test_compile_fullgraph_of_statistics(generator, impl, with_entropy):
    hidden, weight, bias, labels = make(generator, 18, 8, 31, torch.float32)

    def step(h, w, b):
        out = sk.linear_token_stats(h, w, labels, bias=b, outputs=linear.TOKEN_STATS, impl=impl)
        loss = out.logps.sum() + (out.entropy if with_entropy else out.entropy.detach()).sum()
        return (loss, *(t.detach() for t in out))

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        found = function(*leaves)
        found[0].backward()
        results.append((*found, *(t.grad for t in leaves)))
    for plain, other in zip(*results, strict=True):
        assert relative_error(other, plain) < 1e-5


def test_compile_with_inductor_and_dynamic_shapes():
    torch._dynamo.reset()
    function = torch.compile(
        lambda h, w, y, r, p: sk.fused_linear_sppo_loss(h, w, y, r, p).loss,
        fullgraph=True,
        dynamic=True,
    )
    for batch, steps in ((3, 5), (4, 7), (2, 9)):
        h = torch.randn(batch, steps, 8, requires_grad=True)
        w = torch.randn(17, 8, requires_grad=True)
        y = torch.randint(0, 17, (batch, steps))
        args = (y, torch.full((batch,), -14.0), torch.rand(batch))
        function(h, w, *args).backward()
        got = h.grad, w.grad
        h.grad = w.grad = None
        sk.fused_linear_sppo_loss(h, w, *args).loss.backward()
        assert relative_error(got[0], h.grad) < 1e-6
        assert relative_error(got[1], w.grad) < 1e-6


def test_autocast_casts_hidden_and_head_and_returns_gradients_in_float32():
    i = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sk.fused_linear_sppo_loss(
            i["hidden"], i["weight"], i["labels"], i["ref"], i["win"], impl="native"
        )
        out.loss.backward()  # backward inside autocast, too
    low = inputs(torch.bfloat16)
    expected = sk.fused_linear_sppo_loss(
        low["hidden"], low["weight"], low["labels"], low["ref"], low["win"], impl="native"
    )
    expected.loss.backward()
    assert i["weight"].grad.dtype == torch.float32
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(i["weight"].grad, low["weight"].grad.float())
    assert torch.equal(i["hidden"].grad, low["hidden"].grad.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    results = []
    for wrapped in (False, True):
        i = inputs()

        def block(h, w, i=i):
            return sk.fused_linear_sppo_loss(
                torch.tanh(h), w, i["labels"], i["ref"], i["win"], impl="native"
            ).loss

        args = (i["hidden"], i["weight"])
        loss = checkpoint(block, *args, use_reentrant=reentrant) if wrapped else block(*args)
        loss.backward()
        results.append((loss, i["hidden"].grad, i["weight"].grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_gradient_accumulation_sums():
    i = inputs()
    whole = sk.fused_linear_sppo_loss(
        i["hidden"], i["weight"], i["labels"], i["ref"], i["win"], reduction="sum", impl="native"
    )
    whole.loss.backward()
    parts = inputs()
    for s in range(3):
        sk.fused_linear_sppo_loss(
            parts["hidden"][s : s + 1], parts["weight"], parts["labels"][s : s + 1],
            parts["ref"][s : s + 1], parts["win"][s : s + 1], reduction="sum", impl="native",
        ).loss.backward()  # fmt: skip
    assert relative_error(parts["weight"].grad, i["weight"].grad) < 1e-6
    assert relative_error(parts["hidden"].grad, i["hidden"].grad) < 1e-6


def test_backward_twice_through_a_retained_graph():
    i = inputs()
    loss = sk.fused_linear_sppo_loss(
        i["hidden"], i["weight"], i["labels"], i["ref"], i["win"], impl="native"
    ).loss
    loss.backward(retain_graph=True)
    first = i["weight"].grad.clone()
    loss.backward()
    assert torch.equal(i["weight"].grad, 2 * first)


class ShapesOnly:
    """A backend whose kernels give outputs of the right shapes and nothing else."""

    @staticmethod
    def row_logps(z, labels, bias, scale, softcap, ignore_index, write_grad):
        return z.new_empty(z.shape[0], dtype=torch.float32)

    @staticmethod
    def row_stats(z, labels, bias, scale, softcap, ignore_index, *wanted):
        on = {"dtype": torch.float32}
        of_rows = [z.new_empty(z.shape[0], **on) for _ in range(3)]
        return z.new_empty(3, z.shape[0], **on), *of_rows, z.new_empty(z.shape[0]).bool()

    @staticmethod
    def row_stats_backward(z, labels, bias, scale, softcap, ignore_index, norm, a, b):
        assert norm.shape == (3, z.shape[0]) and a.shape == b.shape == labels.shape

    @staticmethod
    def segment_sum(values, cu_seqlens):
        return values.new_empty(cu_seqlens.shape[0] - 1)

    @staticmethod
    def segment_expand(values, cu_seqlens, rows):
        return values.new_empty(rows)


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_read_on_the_cuda_path(dtype, with_rows, monkeypatch):
    """Fake tensors have no values: whatever would synchronise with a device raises instead.

    The public functions run up to the operators; the operators run as for tensors that are not on
    the host, with kernels that only give shapes. (This torch has no CUDA, so the fake tensors are
    CPU ones; with a GPU, test_triton_gpu.py asks CUDA itself.)
    """
    monkeypatch.setattr(streaming, "on_host", lambda tensor: False)
    for module in (streaming, segments):
        monkeypatch.setattr(module, "load", lambda impl: ShapesOnly)
    with FakeTensorMode(), torch.no_grad():
        device = torch.device("cpu")
        hidden, weight = (
            torch.empty(*shape, device=device, dtype=dtype) for shape in ((3, 5, 8), (17, 8))
        )
        bias = torch.empty(17, device=device, dtype=dtype)
        labels = torch.zeros(3, 5, dtype=torch.long, device=device)
        rows = labels if with_rows else None
        ref = torch.empty(3, device=device)
        sk.fused_linear_sppo_loss(
            hidden, weight, labels, ref, ref, bias=bias, rows=rows, weights=ref, softcap=3.0
        )
        cu = torch.zeros(4, dtype=torch.int32, device=device)
        sk.linear_sequence_logps(hidden.view(15, 8), weight, labels.view(15), cu)
        sk.fused_sppo_loss(hidden, labels, ref, ref)
        head = (hidden.view(15, 8), weight, bias, labels.view(15),
                None if rows is None else rows.view(15), 1.0, 3.0, -100, 4)  # fmt: skip
        upstream = torch.empty(15, device=device)
        for retain in (0, 8, 15):
            for wanted, of_entropy in ((False, None), (True, None), (True, upstream)):
                call = (*head, retain, "triton")
                *_, norm, dx, dz = kernels["linear_token_logps"](*call, *(wanted,) * 4, True)
                out = kernels["linear_token_logps_backward"](
                    upstream, of_entropy, *call, norm, dx, dz, True, True, True
                )
                assert [t.dtype for t in out] == [dtype] * 3
        kernels["linear_sppo_grouped"](
            *head, 10, "triton", [0, 5, 10, 15], [0, 2, 3], ref, ref, ref, 10.0, 1.0, True, True,
            True,
        )  # fmt: skip


def test_chunks_do_not_depend_on_vocabulary_or_width():
    """Policy and reference heads of any size take the same chunk shapes."""
    assert set(linear.CHUNK_ROWS) == {"cpu", "cuda"}
    small = calls.checked(
        torch.randn(2, 3, 4), torch.randn(5, 4), None, torch.zeros(2, 3).long(), None, 1.0, None,
        -100, None, "native",
    )  # fmt: skip
    large = small._replace(weight=torch.empty(50000, 4))
    assert calls.chunk_rows(small, None) == calls.chunk_rows(large, None)
