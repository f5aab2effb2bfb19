"""The public functions with impl="triton": in the interpreter here, on the device with a GPU."""

import pytest
import torch
from torch.library import opcheck

import sppo_kernels as sk
from sppo_kernels.logps import linear as linear_logps
from sppo_kernels.testing import assert_within_budget, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype):
    on = {"device": DEVICE}
    labels = torch.randint(0, 67, (3, 7), **on)
    labels[1, 2:5] = -100
    return {
        "hidden": torch.randn(3, 7, 16, **on).to(dtype),
        "weight": (torch.randn(67, 16, **on) / 2).to(dtype),
        "bias": torch.randn(67, **on).to(dtype),
        "labels": labels,
        "ref": torch.randn(3, **on) - 20,
        "win": torch.rand(3, **on),
    }


def results(i, impl, dtype=None, **options):
    """Losses and gradients of both fused losses and the bare log-probs."""
    cast = {k: i[k].to(dtype or i[k].dtype).requires_grad_() for k in ("hidden", "weight", "bias")}
    h, w, b = (t.detach().clone().requires_grad_() for t in cast.values())
    head = {"bias": b, "softcap": 4.0, "logit_scale": 1.5, "impl": impl}
    logps = sk.linear_sequence_logps(h, w, i["labels"], **head)
    loss, fused = sk.fused_linear_sppo_loss(
        h, w, i["labels"], i["ref"], i["win"], eta=20.0, **head, **options
    )
    (loss + logps.sum()).backward()
    z = (i["hidden"].to(h.dtype) @ i["weight"].to(h.dtype).T).detach().requires_grad_()
    plain = sk.fused_sppo_loss(z, i["labels"], i["ref"], i["win"], eta=20.0, impl=impl)
    (plain.loss + sk.sequence_logps(z, i["labels"], impl=impl).sum()).backward()
    return {
        "logps": logps, "loss": loss, "fused logps": fused, "hidden": h.grad, "weight": w.grad,
        "bias": b.grad, "logits loss": plain.loss, "logits logps": plain.logps, "logits": z.grad,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 67 * 4 * 8], ids=["all-kept", "groups"])
def test_triton_end_to_end(dtype, budget, monkeypatch):
    """Through autograd, the streaming driver and the loss, several chunks long."""
    monkeypatch.setitem(linear_logps.CHUNK_ROWS, DEVICE, 4)
    i = inputs(dtype)
    ours = results(i, "triton", memory_budget=budget)
    eager = results(i, "reference")
    truth = results(i, "reference", torch.float64)
    for name, value in ours.items():
        # three sums and a loss may be exact in eager by luck: four roundings of slack
        assert_within_budget(value, eager[name], truth[name], what=name, roundings=4.0)


def test_equal_policy_and_reference_are_exactly_equal():
    i = inputs(torch.bfloat16)
    with torch.no_grad():
        ref = sk.linear_sequence_logps(i["hidden"], i["weight"], i["labels"], impl="triton")
    weight = i["weight"].requires_grad_()
    out = sk.fused_linear_sppo_loss(
        i["hidden"], weight, i["labels"], ref, torch.full_like(i["win"], 0.5), impl="triton"
    )
    assert torch.equal(out.logps, ref)
    assert out.loss.item() == 0.0


def test_native_and_triton_agree():
    i = inputs(torch.float32)
    if DEVICE == "cuda":
        pytest.skip("the native kernels run on the CPU")
    for value, other in zip(
        results(i, "triton").values(), results(i, "native").values(), strict=True
    ):
        assert relative_error(value, other) < 2e-6


def test_opcheck_with_triton():
    i = inputs(torch.float32)
    logits = torch.randn(3, 7, 67, device=DEVICE, requires_grad=True)
    head = (
        i["hidden"].view(21, 16).requires_grad_(), i["weight"].requires_grad_(), None,
        i["labels"].view(-1), None, 1.0, None, -100, 8, 21, "triton",
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.sppo_kernels
    opcheck(ops.token_logps, (logits, i["labels"], -100, False, "triton"), test_utils=tests)
    for wanted in (False, True):
        flags = (wanted, wanted, wanted, wanted, True)
        opcheck(ops.linear_token_logps, (*head, *flags), test_utils=tests)


@pytest.mark.gpu
def test_host_labels_drop_ignored_rows_without_a_synchronisation():
    i = inputs(torch.bfloat16)
    expected = results(i, "triton")
    host = i | {"labels": i["labels"].cpu()}
    h, w = (host[k].clone().requires_grad_() for k in ("hidden", "weight"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sk.fused_linear_sppo_loss(
            h, w, host["labels"], host["ref"], host["win"], eta=20.0, bias=host["bias"],
            softcap=4.0, logit_scale=1.5,
        )  # fmt: skip
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(out.loss, expected["loss"]) < 1e-2
