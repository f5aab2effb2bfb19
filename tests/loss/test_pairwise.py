"""pairwise_loss: each equation written out in float64, gradients, limits and arguments.

Values of TRL and Liger are in test_pairwise_peers.py.
"""

import math

import pytest
import torch
from torch import Tensor

import sppo_kernels as sk
from sppo_kernels.loss.objectives import KINDS
from sppo_kernels.testing import relative_error
from tests.objective_formulas import exact_losses

P = 7
# numbers without a default, and others than the defaults, so that each one matters
SETTINGS = {
    "beta": 0.3,
    "label_smoothing": 0.15,
    "tau": 0.4,
    "margin": 0.7,
    "nll_weight": 0.6,
    "alpha": 0.25,
    "penalty": 3.0,
    "reference_share": 0.3,
}


def settings_of(kind):
    return {name: SETTINGS[name] for name in KINDS[kind].settings}


def tensors(generator, kind, count=P, dtype=torch.float32):
    """Arguments a kind takes: log-probs of whole responses, win rates, lengths."""
    objective = KINDS[kind]
    chosen = -torch.rand(count, generator=generator) * 30 - 5
    found = {"chosen_logps": chosen, "rejected_logps": chosen - 3}
    for name in (*objective.needs, *objective.optional):
        if name.endswith("_logps"):
            found[name] = chosen.clone()
        elif name.endswith("_win"):
            found[name] = torch.rand(count, generator=generator)
        elif name.endswith("_lengths"):
            found[name] = torch.randint(1, 20, (count,), generator=generator)
        else:
            found[name] = torch.rand((), generator=generator)
    for name, value in found.items():
        if name.endswith("_logps"):
            value = value + torch.randn(count, generator=generator) * 2
            found[name] = value.clamp_max(-0.5)
    return {k: v if not v.is_floating_point() else v.to(dtype) for k, v in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(generator, kind, dtype):
    given, s = tensors(generator, kind, dtype=dtype), settings_of(kind)
    # what float32 holds of the arguments is what is computed with
    t = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    exact = torch.tensor(exact_losses(kind, t, s), dtype=torch.float64)
    found = sk.pairwise_loss(**given, kind=kind, **s, reduction="none")
    assert found.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance / 10)
    mean = sk.pairwise_loss(**given, kind=kind, **s)
    assert relative_error(mean, exact.mean()) < 2e-5
    total = sk.pairwise_loss(**given, kind=kind, **s, reduction="sum")
    assert relative_error(total, exact.sum()) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_every_log_prob(generator, kind):
    t = tensors(generator, kind, count=3, dtype=torch.float64)
    names = [k for k in t if k.endswith("_logps")]
    assert len(names) >= 2

    def function(*leaves):
        changed = {**t, **dict(zip(names, leaves, strict=True))}
        return sk.pairwise_loss(**changed, kind=kind, **settings_of(kind), reduction="none")

    assert torch.autograd.gradcheck(function, [t[k].requires_grad_() for k in names])


# Log-ratios of 0 and of ±1e4, alone and against each other; log-probs stay at most 0.
EXTREMES = torch.cartesian_prod(*[torch.tensor([0.0, -1.0, -1e4])] * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0.0, -1.0, -1e4], ids=["certain", "likely", "impossible"])
def test_limits_are_finite(kind, at):
    """Policies and references from certain to impossible: values as in float64, no NaN or inf."""
    objective = KINDS[kind]
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        t = {"chosen_logps": EXTREMES[:, 0], "rejected_logps": EXTREMES[:, 1]}
        for name in (*objective.needs, *objective.optional):
            if name.endswith("_logps"):
                t[name] = torch.full((len(EXTREMES),), at)
            elif name.endswith("_win"):
                t[name] = torch.full((len(EXTREMES),), 1.0)
            elif name.endswith("_lengths"):
                t[name] = torch.arange(len(EXTREMES)) % 4  # empty responses too
            else:
                t[name] = torch.tensor(0.0)
        t = {k: v.to(dtype) if v.is_floating_point() else v for k, v in t.items()}
        leaves = [t[k].requires_grad_() for k in t if k.endswith("_logps")]
        loss = sk.pairwise_loss(**t, kind=kind, **settings_of(kind), reduction="none")
        loss.sum().backward()
        values.append(loss.detach().double())
        gradients.append(torch.stack([leaf.grad.double() for leaf in leaves]))
    for found in (*values, *gradients):
        assert found.isfinite().all()
    # the odds of a certain response are cut at 1/eps, which depends on the precision
    if kind != "orpo":
        # float32 holds an exponent of 1e3 to 1e-4, and that is the relative error of its power
        torch.testing.assert_close(values[0], values[1], rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "sppo_hard", "robust", "discopop"])
def test_equal_policies_give_the_closed_form(kind):
    zero = torch.full((3,), -17.25)
    s = settings_of(kind)
    e, target = s.get("label_smoothing", 0.0), 0.5 / s["beta"]
    expected = {
        "dpo": math.log(2),
        "robust": math.log(2) * (1 - 2 * e) / (1 - 2 * e),
        "ipo": target**2,
        "sppo_hard": 2 * target**2,
        "discopop": (math.log(2) + 1) / 2,
    }[kind]
    found = sk.pairwise_loss(zero, zero, zero, zero, kind=kind, **s)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_sppo_is_the_loss_of_responses(generator):
    """Mean over pairs of "sppo" = `sppo_loss` of all responses; "sppo_hard" is twice that."""
    t = tensors(generator, "sppo")
    policy, ref, win = (
        torch.cat([t[f"{a}chosen_{b}"], t[f"{a}rejected_{b}"]])
        for a, b in (("", "logps"), ("ref_", "logps"), ("", "win"))
    )
    found = sk.pairwise_loss(**t, kind="sppo", beta=0.01)
    assert relative_error(found, sk.sppo_loss(policy, ref, win, eta=100.0)) < 1e-6
    del t["chosen_win"], t["rejected_win"]
    hard = torch.cat([torch.ones(P), torch.zeros(P)])
    found = sk.pairwise_loss(**t, kind="sppo_hard", beta=0.01)
    assert relative_error(found, 2 * sk.sppo_loss(policy, ref, hard, eta=100.0)) < 1e-6


def test_ipo_without_lengths_is_the_papers(generator):
    t = tensors(generator, "ipo")
    del t["chosen_lengths"], t["rejected_lengths"]
    a, b = t["chosen_logps"] - t["ref_chosen_logps"], t["rejected_logps"] - t["ref_rejected_logps"]
    expected = (a - b - 1 / 0.4).square().mean()
    assert relative_error(sk.pairwise_loss(**t, kind="ipo", beta=0.2), expected) < 1e-6


def test_reward_shift_may_be_left_out_or_one_a_pair(generator):
    t = tensors(generator, "bco_pair")
    del t["reward_shift"]
    zero = sk.pairwise_loss(**t, kind="bco_pair", reward_shift=0.0)
    assert torch.equal(sk.pairwise_loss(**t, kind="bco_pair"), zero)
    shift = torch.rand(P, generator=generator)
    each = [
        sk.pairwise_loss(**{k: v[i : i + 1] for k, v in t.items()}, kind="bco_pair",
                         reward_shift=shift[i])
        for i in range(P)
    ]  # fmt: skip
    found = sk.pairwise_loss(**t, kind="bco_pair", reward_shift=shift, reduction="none")
    torch.testing.assert_close(found, torch.stack(each))


def test_weights(generator):
    t = tensors(generator, "dpo")
    weights = torch.rand(P, generator=generator)
    none = sk.pairwise_loss(**t, kind="dpo", reduction="none")
    for reduction, expected in {
        "none": weights * none,
        "sum": (weights * none).sum(),
        "mean": (weights * none).sum() / weights.sum(),
    }.items():
        found = sk.pairwise_loss(**t, kind="dpo", weights=weights, reduction=reduction)
        torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32(generator):
    t = {k: v.bfloat16() for k, v in tensors(generator, "dpo").items()}
    found = sk.pairwise_loss(**t, kind="dpo", beta=0.3)
    assert found.dtype == torch.float32
    assert torch.equal(
        found, sk.pairwise_loss(**{k: v.float() for k, v in t.items()}, kind="dpo", beta=0.3)
    )


def test_on_fused_log_probs(generator):
    """The head's gradient of a length-normalised, reference-free loss, against autograd's."""
    hidden = torch.randn(4, 6, 8, generator=generator)
    weight = torch.randn(31, 8, generator=generator)
    labels = torch.randint(0, 31, (4, 6), generator=generator)
    labels[2, 3:] = -100
    lengths = (labels != -100).sum(-1)
    results = []
    for fused in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        if fused:
            logps = sk.linear_sequence_logps(h, w, labels)
        else:
            logp = (h @ w.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            logps = (logp * (labels != -100)).sum(-1)
        wins, losses = logps.chunk(2)
        m, n = lengths.chunk(2)
        loss = sk.pairwise_loss(wins, losses, kind="orpo", chosen_lengths=m, rejected_lengths=n)
        loss.backward()
        results.append((loss, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_superfluous_arguments_are_named(generator, kind):
    objective = KINDS[kind]
    t, s = tensors(generator, kind), settings_of(kind)
    for name in objective.needs:
        with pytest.raises(ValueError, match=f"{name}: kind='{kind}' needs it"):
            sk.pairwise_loss(**{k: v for k, v in t.items() if k != name}, kind=kind, **s)
    every = {n for k in KINDS.values() for n in (*k.needs, *k.optional)}
    for name in every - set(t):
        with pytest.raises(ValueError, match=f"{name}: kind='{kind}' does not take it"):
            sk.pairwise_loss(**t, **{name: torch.rand(P)}, kind=kind, **s)
    for name, default in objective.settings.items():
        rest = {k: v for k, v in s.items() if k != name}
        if default is None:
            with pytest.raises(ValueError, match=f"{name}: kind='{kind}' needs it"):
                sk.pairwise_loss(**t, kind=kind, **rest)
        else:
            plain = sk.pairwise_loss(**t, kind=kind, **rest)
            assert torch.equal(plain, sk.pairwise_loss(**t, kind=kind, **rest, **{name: default}))
    for name in set(SETTINGS) - set(s):
        with pytest.raises(ValueError, match=f"{name}: kind='{kind}' does not take it"):
            sk.pairwise_loss(**t, kind=kind, **s, **{name: SETTINGS[name]})


ONE = torch.ones(P)
BAD = [
    ({"kind": "sfo"}, ValueError, "kind: expected one of"),
    ({"kind": "sft"}, ValueError, "kind: 'sft' cannot be computed here: its mean runs over tokens"),
    ({"beta": 0.0}, ValueError, "beta: expected a finite number above 0 .* got 0"),
    ({"beta": "0.1"}, TypeError, "beta: expected a number, got str"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected .* in \[0.0, 1.0\]"),
    ({"kind": "robust", "label_smoothing": 0.5}, ValueError, r"label_smoothing: .* in \[0, 0.5\)"),
    ({"kind": "exo_pair", "label_smoothing": 1.0}, ValueError, r"label_smoothing: .* in \(0, 1\)"),
    ({"rejected_logps": torch.ones(P - 1)}, ValueError, "rejected_logps: expected shape"),
    ({"ref_chosen_logps": [1.0]}, TypeError, "ref_chosen_logps: expected a torch.Tensor"),
    ({"chosen_logps": torch.ones(P).long()}, TypeError, "chosen_logps: expected float32"),
    ({"weights": -ONE}, ValueError, "weights: expected finite values of at least 0"),
    ({"kind": "aot", "weights": ONE}, ValueError, "weights: kind='aot' sorts"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of"),
    ({"kind": "sppo", "chosen_win": ONE, "rejected_win": ONE + 1}, ValueError,
     r"rejected_win: expected values in \[0, 1\], got 2.0 at 0"),
    ({"kind": "ipo", "chosen_lengths": ONE}, ValueError, "rejected_lengths: expected with the"),
    ({"kind": "ipo", "chosen_lengths": -ONE, "rejected_lengths": ONE}, ValueError,
     "chosen_lengths: expected finite values of at least 0"),
    ({"kind": "kto", "kl": torch.ones(2)}, ValueError, "kl: expected shape"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[b[2][:32] for b in BAD])
def test_refusals(changes, error, message):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    given = {name: -torch.rand(P) for name in names} | {"kind": "dpo"}
    with pytest.raises(error, match=message):
        sk.pairwise_loss(**(given | changes))


def test_no_pairs(generator):
    empty = torch.empty(0)
    with pytest.raises(ValueError, match="chosen_logps: expected at least one pair"):
        sk.pairwise_loss(empty, empty, kind="cpo")
    assert sk.pairwise_loss(empty, empty, kind="cpo", reduction="none").shape == (0,)


def test_alias_and_module(generator):
    t = tensors(generator, "dpo")
    plain = sk.pairwise_loss(**t, kind="sigmoid", beta=0.4, label_smoothing=0.1, reduction="sum")
    module = sk.PairwiseLoss("sigmoid", beta=0.4, label_smoothing=0.1, reduction="sum")
    assert torch.equal(module(*t.values()), plain)
    assert "kind='dpo', beta=0.4" in repr(module)
    t = tensors(generator, "simpo")
    found = sk.PairwiseLoss("simpo")(**t)
    assert isinstance(found, Tensor)
    assert torch.equal(found, sk.pairwise_loss(**t, kind="simpo", beta=0.1, margin=0.5))
    for call, error, words in (
        (lambda: sk.PairwiseLoss("dpo", margin=1.0), ValueError, "margin: kind='dpo' does not"),
        (lambda: sk.PairwiseLoss("dpo")(*[found] * 5), TypeError, "at most .* got 5"),
        (lambda: sk.SPPOLoss(softcap=1.0), TypeError, "softcap: expected one of .*'units'"),
        (lambda: sk.FusedLinearSPPOLoss(logit_scale=0.0), ValueError, "logit_scale: .* above 0"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_compiles_without_a_break(generator):
    t = tensors(generator, "orpo")
    found = torch.compile(sk.pairwise_loss, fullgraph=True, backend="aot_eager")(**t, kind="orpo")
    torch.testing.assert_close(found, sk.pairwise_loss(**t, kind="orpo"))
