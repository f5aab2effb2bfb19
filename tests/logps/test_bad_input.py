"""Every refusal names the argument; every odd input that is allowed means what the docs say."""
# ruff: noqa: E501

import pytest
import torch

import sppo_kernels as sk

B, T, D, V = 3, 4, 8, 11


def arguments():
    return {
        "hidden": torch.randn(B, T, D),
        "weight": torch.randn(V, D),
        "labels": torch.randint(0, V, (B, T)),
        "ref_logps": torch.randn(B),
        "win_rate": torch.rand(B),
    }


def call(**changes):
    args = arguments() | changes
    names = ("hidden", "weight", "labels", "ref_logps", "win_rate")
    positional = [args.pop(n) for n in names]
    return sk.fused_linear_sppo_loss(*positional, **args)


BAD = [
    ("hidden", {"hidden": torch.randn(B, T, D + 1)}, ValueError, "weight: expected shape"),
    ("hidden-list", {"hidden": [[1.0]]}, TypeError, "hidden: expected a torch.Tensor, got list"),
    ("hidden-int", {"hidden": torch.ones(B, T, D).long()}, TypeError, "hidden: expected float32"),
    ("hidden-1d", {"hidden": torch.randn(D)}, ValueError, r"hidden: expected shape \[..., D\]"),
    ("weight-1d", {"weight": torch.randn(D)}, ValueError, "weight: expected 2 dimensions"),
    ("weight-dtype", {"weight": torch.randn(V, D).half()}, TypeError, "weight: expected torch.float32"),
    ("weight-device", {"weight": torch.randn(V, D, device="meta")}, ValueError, "weight: expected on cpu"),
    ("labels-float", {"labels": torch.rand(B, T)}, TypeError, "labels: expected int64 or int32"),
    ("labels-shape", {"labels": torch.zeros(B, T - 1).long()}, ValueError, "labels: expected shape"),
    ("labels-V", {"labels": torch.full((B, T), V)}, ValueError, f"labels: .* got {V} at flat position 0"),
    ("labels-negative", {"labels": torch.full((B, T), -1)}, ValueError, "labels: .* got -1"),
    ("win-above", {"win_rate": torch.tensor([0.1, 1.5, 0.2])}, ValueError, "win_rate: .* got 1.5 at 1"),
    ("win-nan", {"win_rate": torch.tensor([0.1, 0.5, float("nan")])}, ValueError, "win_rate: .* nan at 2"),
    ("win-shape", {"win_rate": torch.rand(B - 1)}, ValueError, "win_rate: expected shape"),
    ("win-grad", {"win_rate": torch.rand(B).requires_grad_()}, ValueError, "win_rate: expected a constant"),
    ("ref-shape", {"ref_logps": torch.randn(B, 1)}, ValueError, "ref_logps: expected 1 dimensions"),
    ("ref-grad", {"ref_logps": torch.rand(B).requires_grad_()}, ValueError, "ref_logps: expected a constant"),
    ("weights", {"weights": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "weights: .* got -1.0 at 1"),
    ("weights-shape", {"weights": torch.ones(2)}, ValueError, "weights: expected shape"),
    ("eta-0", {"eta": 0.0}, ValueError, "eta: expected a finite number above 0"),
    ("eta-str", {"eta": "1"}, TypeError, "eta: expected a number, got str"),
    ("softcap", {"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0"),
    ("scale", {"logit_scale": float("inf")}, ValueError, "logit_scale: expected a finite number"),
    ("budget", {"memory_budget": 0}, ValueError, "memory_budget: expected"),
    ("bias-shape", {"bias": torch.randn(V + 1)}, ValueError, "bias: expected shape"),
    ("rows-range", {"rows": torch.full((B, T), B * T)}, ValueError, r"rows: expected values in \[0, 12\)"),
    ("rows-shape", {"rows": torch.zeros(B).long()}, ValueError, "rows: expected shape"),
    ("reduction", {"reduction": "avg"}, ValueError, "reduction: expected one of"),
    ("units", {"units": "nats"}, ValueError, "units: expected one of"),
    ("impl", {"impl": "cuda"}, ValueError, "impl: expected 'auto' or one of"),
    ("cu-padded", {"cu_seqlens": torch.tensor([0, 12])}, ValueError, "cu_seqlens: expected None with padded"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 5, 3, 12], "expected no decrease, got 5 then 3 at positions 1, 2"),
        ([1, 5, 12], "expected 0 first and 12"),
        ([0, 5, 11], "expected 0 first and 12"),
        ([0], "at least one sequence"),
    ],
)
def test_bad_offsets(cu, message):
    logits, labels = torch.randn(12, V), torch.randint(0, V, (12,))
    with pytest.raises(ValueError, match="cu_seqlens: .*" + message):
        sk.sequence_logps(logits, labels, torch.tensor(cu))


def test_float_offsets():
    with pytest.raises(TypeError, match="cu_seqlens: expected int64 or int32"):
        sk.sequence_logps(torch.randn(2, V), torch.zeros(2).long(), torch.tensor([0.0, 2.0]))


def test_packed_without_offsets():
    with pytest.raises(ValueError, match="cu_seqlens: needed for packed"):
        sk.sequence_logps(torch.randn(12, V), torch.randint(0, V, (12,)))


def test_empty_batch():
    with pytest.raises(ValueError, match="labels: expected at least one sequence"):
        sk.sequence_logps(torch.randn(0, T, V), torch.zeros(0, T).long())
    with pytest.raises(ValueError, match="expected at least one response"):
        sk.sppo_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert sk.sppo_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0), reduction="sum") == 0


def test_empty_vocabulary():
    with pytest.raises(ValueError, match="vocabulary"):
        sk.token_logps(torch.randn(2, 3, 0), torch.zeros(2, 3).long())


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_sequences_of_no_steps_have_log_probability_zero(impl):
    hidden = torch.randn(B, 0, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    out = sk.linear_sequence_logps(hidden, weight, torch.zeros(B, 0).long(), impl=impl)
    assert torch.equal(out, torch.zeros(B))
    out.sum().backward()
    assert (weight.grad == 0).all()
    logits = torch.randn(B, 0, V, requires_grad=True)
    out = sk.sequence_logps(logits, torch.zeros(B, 0).long(), impl=impl)
    assert torch.equal(out, torch.zeros(B))
    out.sum().backward()


def test_an_ignored_sequence_counts_in_the_loss_as_log_probability_zero():
    args = arguments()
    args["labels"][1] = -100
    out = call(**args, reduction="none", eta=10.0)
    assert out.logps[1] == 0
    expected = (0 - args["ref_logps"][1] - 10.0 * (args["win_rate"][1] - 0.5)) ** 2
    torch.testing.assert_close(out.loss[1], expected)


def test_explicit_backend_that_cannot_run():
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run here: .*float64"):
        call(**{k: v.double() for k, v in arguments().items() if k in ("hidden", "weight")},
             impl="native")  # fmt: skip


def test_out_of_range_labels_are_nan_where_they_are_not_checked():
    """Unchecked (as on a GPU), a bad label reads nothing out of bounds: it gives NaN."""
    logits = torch.randn(1, 2, V)
    labels = torch.tensor([[V, 3]])
    logp, _ = torch.ops.sppo_kernels.token_logps(logits, labels, -100, False, "native")
    assert logp[0, 0].isnan()
    assert logp[0, 1].isfinite()
