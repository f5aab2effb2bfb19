"""Token statistics inside PyTorch: opcheck, compile, and no synchronisation on the CUDA path."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import sppo_kernels as sk
from sppo_kernels.logps import _stats_ops, dispatch_stats, streaming
from sppo_kernels.logps.stats import TOKEN_STATS
from sppo_kernels.testing import relative_error
from tests.logps.test_stats import DTYPES, make

OPS = torch.ops.sppo_kernels


def test_opcheck(generator):
    hidden, weight, bias, labels = make(generator, 18, 8, 31, torch.float32)
    labels[2] = -100
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    head = (labels, None, 1.5, 3.0, -100)
    for wanted in ((True,) * 4, (False, False, False, True)):
        opcheck(
            OPS.linear_token_stats.default,
            (*leaves, *head, *wanted, True, True, 16, 18, "native"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
    tests = ("test_schema", "test_faketensor")
    rows = (labels, bias, 1.5, 3.0, -100)
    norm, *_ = OPS.native_row_stats(hidden @ weight.T, *rows, True, True, True, True)
    upstream = torch.randn(2, 18, generator=generator)
    for given in (upstream, (None, upstream[1]), (upstream[0], None)):
        opcheck(
            OPS.linear_token_stats_backward.default,
            (*given, hidden, weight, bias, *head, norm, True, True, True, 16, "native"),
            test_utils=tests,
        )
    opcheck(
        OPS.native_row_stats.default,
        (hidden @ weight.T, *rows, True, False, True, True),
        test_utils=(*tests, "test_aot_dispatch_dynamic"),
    )
    opcheck(
        OPS.native_row_stats_backward.default,
        (hidden @ weight.T, *rows, norm, *upstream),
        test_utils=tests,
    )
    assert len(_stats_ops.SCHEMAS) == 4


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "entropy"])
def test_compile_fullgraph(generator, impl, with_entropy):
    hidden, weight, bias, labels = make(generator, 18, 8, 31, torch.float32)

    def step(h, w, b):
        out = sk.linear_token_stats(h, w, labels, bias=b, outputs=TOKEN_STATS, impl=impl)
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


class ShapesOnly:
    """A backend whose kernels give outputs of the right shapes and nothing else."""

    @staticmethod
    def row_logps(z, labels, bias, scale, softcap, ignore_index, write_grad):
        return z.new_empty(z.shape[0], dtype=torch.float32), None

    @staticmethod
    def row_stats(z, labels, bias, scale, softcap, ignore_index, *wanted):
        on = {"dtype": torch.float32}
        of_rows = [z.new_empty(z.shape[0], **on) for _ in range(3)]
        return z.new_empty(3, z.shape[0], **on), *of_rows, z.new_empty(z.shape[0]).bool()

    @staticmethod
    def row_stats_backward(z, labels, bias, scale, softcap, ignore_index, norm, a, b):
        assert norm.shape == (3, z.shape[0]) and a.shape == b.shape == labels.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_is_read_on_the_cuda_path(dtype, monkeypatch):
    """Fake tensors have no values: whatever would synchronise with a device raises instead."""
    monkeypatch.setattr(streaming, "on_host", lambda tensor: False)
    monkeypatch.setattr(dispatch_stats, "load", lambda impl: ShapesOnly)
    with FakeTensorMode(), torch.no_grad():
        hidden, weight, bias = (torch.empty(*s, dtype=dtype) for s in ((15, 8), (17, 8), (17,)))
        labels = torch.zeros(15, dtype=torch.long)
        for rows in (None, labels):
            head = (hidden, weight, bias, labels, rows, 1.0, 3.0, -100)
            *_, norm, _, _ = dispatch_stats.linear_token_stats(
                *head, True, True, True, True, True, True, 4, 15, "triton"
            )
            upstream = torch.empty(15)
            out = dispatch_stats.linear_token_stats_backward(
                upstream, upstream, *head, norm, True, True, True, 4, "triton"
            )
            assert [t.dtype for t in out] == [dtype] * 3
