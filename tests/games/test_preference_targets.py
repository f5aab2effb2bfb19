"""The win rate that is trained on, against transcriptions in float64 that share no code."""

import numpy as np
import pytest
import torch

import sppo_kernels as sk
from sppo_kernels.games import TARGETS, preference_targets
from tests.game_inputs import IMPLS, poisoned, random_lengths, random_logits

choix = pytest.importorskip("choix")
optimize = pytest.importorskip("scipy.optimize")
TAU = 0.2


def sigma(x):
    return 1 / (1 + np.exp(-x))


def mean_of_others(p, of):
    return np.array([np.mean([p[i, j] for j in range(len(p)) if j != i]) for i in range(of)])


def against(p, strategy):
    fair = p.copy()
    np.fill_diagonal(fair, 0.5)
    return fair @ strategy


def winner(p):
    """von Neumann's, as a linear program: max v with x^T A >= v."""
    k = len(p)
    a = (p - p.T) / 2
    solved = optimize.linprog(
        [0] * k + [-1], A_ub=np.c_[-a.T, np.ones(k)], b_ub=np.zeros(k),
        A_eq=[[1] * k + [0]], b_eq=[1], bounds=[(0, None)] * k + [(None, None)],
    )  # fmt: skip
    return solved.x[:k]


def regularized(p):
    """The fixed point pi ~ exp((P pi)_i / tau), by damped iteration."""
    pi = np.full(len(p), 1 / len(p))
    for _ in range(4000):
        gain = (p - p.T) / 2 @ pi / TAU
        step = np.exp(gain - gain.max())
        pi = 0.95 * pi + 0.05 * step / step.sum()
    return pi


def strengths(p):
    wins = p.copy()
    np.fill_diagonal(wins, 0)
    return choix.ilsr_pairwise_dense(wins, tol=1e-14, max_iter=100_000)


def expected(c, by):
    """w of one game of raw logits c [K, K]."""
    k = len(c)
    if by == "uclaml":
        score = np.array([np.mean(c[i] - c[:, i]) for i in range(k)])
        return sigma(score[:, None] - score).sum(1) / k
    p = sigma((c - c.T) / 2)
    if by == "win_rate":
        return mean_of_others(p, k)
    if by == "win_rate_with_self":
        return p.mean(1)  # sigma(0) on the diagonal
    if by == "bradley_terry":
        theta = strengths(p)
        return mean_of_others(sigma(theta[:, None] - theta), k)
    return against(p, {"nash": winner, "regularized_nash": regularized}[by](p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("by", TARGETS)
def test_of_ragged_logits(generator, impl, by):
    """Leading dimensions, lengths, and NaN wherever nothing may be read."""
    c = random_logits(generator, 6, 5, scale=1.5)
    lengths = random_lengths(generator, 6, 5)
    given = poisoned(c, lengths).reshape(2, 3, 5, 5)
    found = preference_targets(
        given, by, logits=True, lengths=lengths.reshape(2, 3), tau=TAU, impl=impl
    )
    assert found.shape == (2, 3, 5) and found.dtype == torch.float64
    assert not found.requires_grad
    for rates, game, n in zip(found.reshape(6, 5), c.numpy(), lengths.tolist(), strict=True):
        np.testing.assert_allclose(rates[:n], expected(game[:n, :n], by), rtol=0, atol=1e-8)
        assert (rates[n:] == 0.5).all()


@pytest.mark.parametrize("by", [by for by in TARGETS if by != "uclaml"])
def test_of_probabilities(generator, by):
    """Those of symmetrised logits give what the logits give, in the dtype of the input."""
    c = random_logits(generator, 4, 5)
    found = sk.preference_targets(c, by, logits=True)
    p = sk.symmetrize(c).float()
    again = sk.preference_targets(p.numpy(), by)
    assert again.dtype == torch.float32 and ((again >= 0) & (again <= 1)).all()
    torch.testing.assert_close(again.double(), found, rtol=0, atol=1e-5)


def test_what_is_trained_on_differs(generator):
    c = random_logits(generator, 8, 5)
    rates = {by: preference_targets(c, by, logits=True) for by in TARGETS}
    assert torch.equal(rates["win_rate"], sk.sppo_targets(c, logits=True).win_rate)
    assert rates["nash"].max() <= 0.5 + 1e-10  # nobody beats the von Neumann winner
    # maximum likelihood reproduces the share that each response won
    model = rates.pop("bradley_terry")
    torch.testing.assert_close(model, rates["win_rate"], rtol=0, atol=1e-9)
    for name, a in rates.items():
        for other, b in rates.items():
            assert name == other or (a - b).abs().max() > 1e-3


def test_gradients_of_the_first_three(generator):
    c = random_logits(generator, 2, 4).requires_grad_()
    for by in TARGETS[:3]:
        assert torch.autograd.gradcheck(lambda x, by=by: preference_targets(x, by, logits=True), c)
    for by in TARGETS[3:]:
        assert not preference_targets(c, by, logits=True).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_refusals(impl):
    p = torch.full((2, 2, 3, 3), 0.5)
    p[1, 0, 0, 1:], p[1, 0, 1:, 0] = 1.0, 0.0  # response 0 never loses
    with pytest.raises(ValueError, match=r"by='bradley_terry'.* game \[1, 0\] do not"):
        preference_targets(p, "bradley_terry", impl=impl)
    assert preference_targets(p, "nash", impl=impl)[1, 0].tolist() == [0.5, 0.0, 0.0]
    cases = [
        ({"by": "elo"}, "by: expected one of .*'elo'"),
        ({"by": "uclaml"}, "by: 'uclaml' takes raw logits"),
        ({"tau": 0.0}, "tau: .*above 0, got 0.0"),
        ({"lengths": [3, 3]}, "lengths: expected shape"),
        ({"x": p + 1}, r"x: expected probabilities in \[0, 1\]"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            preference_targets(**({"x": p, "impl": impl} | change))
