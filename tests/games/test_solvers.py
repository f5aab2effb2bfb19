"""Equilibria, strengths and tournaments: both implementations against outside oracles."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sppo_kernels.games.comparisons import aggregate, load_comparisons
from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash, tournament
from tests.game_inputs import (
    IMPLS,
    needs_native,
    poisoned,
    random_games,
    random_lengths,
    shared_data,
)

choix = pytest.importorskip("choix")
evalica = pytest.importorskip("evalica")
optimize = pytest.importorskip("scipy.optimize")


def exploitability(p, strategy):
    p = p.double()
    return ((p - p.mT) / 2 @ strategy[..., None]).squeeze(-1).amax(-1)


def tied_games(generator, games, k):
    """Deterministic and tied entries: degenerate linear programs, several equilibria."""
    half = torch.randint(0, 3, (games, k, k), generator=generator).double() / 2
    p = half.triu(1) + (1 - half.mT).tril(-1)
    return p + 0.5 * torch.eye(k, dtype=p.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [2, 5, 16, 32])  # compiled sizes and the largest of the issue
def test_nash_is_not_exploitable(generator, impl, k):
    for p in (random_games(generator, 50, k), tied_games(generator, 50, k)):
        strategy, residual = nash(p, impl=impl)
        assert (strategy >= 0).all()
        torch.testing.assert_close(strategy.sum(-1), torch.ones(50, dtype=torch.float64))
        found = exploitability(p, strategy)
        assert found.max() <= 1e-10
        torch.testing.assert_close(residual, found.clamp(min=0), rtol=0, atol=1e-14)


def test_nash_is_as_good_as_linprog(generator):
    for p in torch.cat([random_games(generator, 8, 9), tied_games(generator, 8, 9)]):
        a = (p - 0.5).numpy()
        # max v s.t. x^T A >= v, sum x = 1
        solved = optimize.linprog(
            [0] * 9 + [-1],
            A_ub=np.c_[-a.T, np.ones(9)],
            b_ub=np.zeros(9),
            A_eq=[[1] * 9 + [0]],
            b_eq=[1],
            bounds=[(0, None)] * 9 + [(None, None)],
        )
        theirs = exploitability(p, torch.tensor(solved.x[:9]))
        assert nash(p).residual <= theirs.clamp(min=0) + 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_nash_of_odd_games_is_the_pfaffian_vector(generator, impl):
    """On its support S (odd), x_i is proportional to |Pf(A without row and column i)|."""

    def pfaffian(a):
        if len(a) == 0:
            return 1.0
        total = 0.0
        for j in range(1, len(a)):
            keep = [r for r in range(1, len(a)) if r != j]
            total += (-1) ** (j - 1) * a[0, j] * pfaffian(a[np.ix_(keep, keep)])
        return total

    p = random_games(generator, 60, 7)
    strategies = nash(p, impl=impl).strategy
    sizes = set()
    for game, strategy in zip(p.numpy(), strategies.numpy(), strict=True):
        support = np.flatnonzero(strategy > 0)
        a = (game - 0.5)[np.ix_(support, support)]
        assert len(support) % 2 == 1
        sizes.add(len(support))
        parts = range(len(support))
        x = np.array([(-1) ** i * pfaffian(np.delete(np.delete(a, i, 0), i, 1)) for i in parts])
        np.testing.assert_allclose(strategy[support], x / x.sum(), atol=1e-10)
    assert len(sizes) > 1  # the draw had cycles, not Condorcet winners only


@needs_native
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_equilibrium_properties(k, seed):
    generator = torch.Generator().manual_seed(seed)
    p = random_games(generator, 4, k)
    x = nash(p).strategy
    order = torch.randperm(k, generator=generator)
    torch.testing.assert_close(
        nash(p[:, order][:, :, order]).strategy, x[:, order], rtol=0, atol=1e-9
    )
    # A response that does strictly worse than response 0 against everyone is never played.
    wider = torch.full((4, k + 1, k + 1), 0.5, dtype=torch.float64)
    wider[:, :k, :k] = p
    wider[:, k, :k] = p[:, 0] * 0.9 - 0.01
    wider[:, k, :k].clamp_(min=0)
    wider[:, k, 0] = 0.4
    wider[:, :k, k] = 1 - wider[:, k, :k]
    found = nash(wider).strategy
    torch.testing.assert_close(found[:, :k], x, rtol=0, atol=1e-9)
    assert (found[:, k] == 0).all()
    # Ragged equals padded, to the bit.
    padded = poisoned(wider, torch.full((4,), k))
    assert torch.equal(nash(padded, torch.full((4,), k)).strategy[:, :k], x)


@pytest.mark.parametrize("impl", IMPLS)
def test_mirror_descent_reports_its_residual(generator, impl):
    p = random_games(generator, 2, 140)  # above the limit of the simplex method
    strategy, residual = nash(p, max_iter=2000, impl=impl)
    torch.testing.assert_close(exploitability(p, strategy), residual, rtol=0, atol=1e-12)
    assert (residual > 1e-12).all() and (residual < 5e-3).all()
    assert nash(p, method="simplex", impl=impl).residual.max() < 1e-10
    cycle = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
    found = nash(cycle, method="mirror", tol=1e-9, max_iter=20_000, impl=impl)
    torch.testing.assert_close(found.strategy, nash(cycle).strategy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_regularized_nash_is_the_fixed_point(generator, impl, tau):
    p = random_games(generator, 20, 6)
    mu = torch.rand(20, 6, generator=generator, dtype=torch.float64) + 0.05
    pi, residual = regularized_nash(p, mu, tau, impl=impl)
    again = torch.softmax(mu.log() + (p @ pi[:, :, None]).squeeze(-1) / tau, -1)
    torch.testing.assert_close(pi, again, rtol=0, atol=1e-10)
    assert residual.max() < 1e-10


def test_regularized_nash_has_its_two_limits(generator):
    p = random_games(generator, 10, 5)
    mu = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
    torch.testing.assert_close(
        regularized_nash(p, mu, 1e6).strategy, mu.expand(10, 5), rtol=0, atol=1e-6
    )
    # Near-ties move the strategy itself far; what it loses is at most tau log(1 / min mu).
    found = regularized_nash(p, mu, 1e-5)
    solved = found.residual < 1e-9  # Newton may stall at so small a tau, and says so
    assert solved.sum() >= 8
    assert exploitability(p, found.strategy)[solved].max() <= 1e-5 * math.log(10) + 1e-10


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [2, 5, 24])
def test_bradley_terry_is_choixs_and_evalicas(generator, impl, k):
    p = random_games(generator, 3, k)
    counts = torch.randint(1, 9, (3, k, k), generator=generator).double()
    counts = counts.triu(1) + counts.triu(1).mT
    found = bradley_terry(p, counts=counts, impl=impl)
    assert found.connected.all()
    xs, ys = (index.tolist() for index in (~torch.eye(k, dtype=torch.bool)).nonzero().T)
    for wins, strength in zip(p * counts, found.strength, strict=True):
        theirs = choix.ilsr_pairwise_dense(wins.numpy(), tol=1e-14, max_iter=100_000)
        np.testing.assert_allclose(strength, theirs - theirs.mean(), atol=1e-10)
        scores = evalica.bradley_terry(
            *(xs, ys, [evalica.Winner.X] * len(xs)),
            weights=wins[xs, ys].tolist(),
            tolerance=1e-15,
            limit=100_000,
        ).scores.sort_index()
        log = np.log(scores.to_numpy())
        np.testing.assert_allclose(strength, log - log.mean(), atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_bradley_terry_recovers_strengths_however_far_apart(generator, impl):
    theta = 6 * torch.randn(12, 7, generator=generator, dtype=torch.float64)
    theta -= theta.mean(-1, keepdim=True)
    p = torch.sigmoid(theta[:, :, None] - theta[:, None, :])
    torch.testing.assert_close(bradley_terry(p, impl=impl).strength, theta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_disconnected_games_are_flagged(generator, impl):
    p = random_games(generator, 4, 4)
    p[1, 0, 1:], p[1, 1:, 0] = 1.0, 0.0  # response 0 never loses
    counts = torch.ones_like(p)
    counts[2, :2, 2:] = counts[2, 2:, :2] = 0  # two groups that never met
    found = bradley_terry(p, counts=counts, impl=impl)
    assert found.connected.tolist() == [True, False, False, True]
    assert found.strength[[1, 2]].isnan().all() and found.strength[[0, 3]].isfinite().all()
    # The same, one response fewer: what is past the length connects nothing.
    p[3, 0, 1], p[3, 1, 0] = 1.0, 0.0
    assert bradley_terry(p, [4, 4, 4, 2], impl=impl).connected.tolist() == [
        True,
        False,
        True,
        False,
    ]


def brute_tournament(p):
    k = len(p)
    beats = lambda i, j: p[i, j] > p[j, i]  # noqa: E731
    winner = [i for i in range(k) if all(beats(i, j) for j in range(k) if j != i)]
    dominating = [
        members
        for size in range(1, k + 1)
        for members in itertools.combinations(range(k), size)
        if all(beats(i, j) for i in members for j in range(k) if j not in members)
    ]
    cycles = sum(
        (beats(a, b) and beats(b, c) and beats(c, a))
        or (beats(b, a) and beats(c, b) and beats(a, c))
        for a, b, c in itertools.combinations(range(k), 3)
    )
    return (winner or [-1])[0], min(dominating, key=len), cycles


@pytest.mark.parametrize("impl", IMPLS)
def test_tournament_against_brute_force(generator, impl):
    games = torch.cat([random_games(generator, 40, 6), tied_games(generator, 40, 6)])
    lengths = random_lengths(generator, 80, 6)
    found = tournament(poisoned(games, lengths), lengths, impl=impl)
    for g, n in enumerate(lengths.tolist()):
        winner, smith, cycles = brute_tournament(games[g, :n, :n])
        assert found.condorcet[g] == winner
        assert tuple(found.smith[g].nonzero().flatten().tolist()) == smith
        assert found.cycles[g] == cycles
    assert (found.condorcet >= 0).any() and (found.cycles > 0).any()


@needs_native
def test_tournament_of_many_words(generator):
    """K = 130: the bit sets of a row span three words."""
    p = torch.cat([random_games(generator, 2, 130), tied_games(generator, 2, 130)])
    for a, b in zip(tournament(p), tournament(p, impl="reference"), strict=True):
        assert torch.equal(a, b)


@needs_native
def test_solvers_on_ragged_poisoned_games(generator):
    p = random_games(generator, 30, 11, dtype=torch.float32)
    lengths = random_lengths(generator, 30, 11)
    p = poisoned(p, lengths)
    for solve in (nash, lambda p, n, impl: regularized_nash(p, tau=0.1, lengths=n, impl=impl)):
        a, b = solve(p, lengths, impl="native"), solve(p, lengths, impl="reference")
        torch.testing.assert_close(a.strategy, b.strategy, rtol=0, atol=1e-9)
        outside = torch.arange(11) >= lengths[:, None]
        assert (a.strategy[outside] == 0).all()
    a, b = (bradley_terry(p, lengths, impl=impl).strength for impl in ("native", "reference"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_arguments_are_named(impl):
    p = torch.full((2, 3, 3), 0.5)
    cases = [
        (lambda: nash(p, method="lp", impl=impl), "method: .*'lp'"),
        (lambda: nash(p + 1, impl=impl), r"P: .*\[0, 1\]"),
        (lambda: regularized_nash(p, tau=0.0, impl=impl), "tau: .*number above 0, got 0.0"),
        (lambda: regularized_nash(p, tau=float("nan"), impl=impl), "tau: "),
        (lambda: regularized_nash(p, [1.0, 1.0], impl=impl), r"mu: expected shape \[3\]"),
        (lambda: regularized_nash(p, [1.0, -1.0, 1.0], impl=impl), "mu: expected positive"),
        (lambda: bradley_terry(p, counts=p[0], impl=impl), r"counts: expected shape \[2, 3, 3\]"),
        (lambda: bradley_terry(p, counts=-p, impl=impl), "counts: .*at least 0"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()


def test_real_comparisons_agree_with_evalica():
    """13 prompts, 59 models, 8,931 human judgements, 39 % of them ties."""
    table = load_comparisons(shared_data() / "crowd-comparisons.csv")
    assert table.game.numel() == 8931 and len(table.games) == 13
    pooled = aggregate(table)
    equilibria = nash(pooled.P, table.lengths)
    assert equilibria.residual.max() <= 1e-10
    ranked = bradley_terry(pooled.P, table.lengths, counts=pooled.counts)
    assert tournament(pooled.P, table.lengths).cycles.sum() > 0  # human preferences are cyclic
    words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    for g in range(13):
        rows = table.game == g
        xs, ys = table.i[rows].tolist(), table.j[rows].tolist()
        wins = [words[v] for v in table.outcome[rows].tolist()]
        rates = evalica.average_win_rate(xs, ys, wins).scores.sort_index().to_numpy()
        found = pooled.win_rate[g, : table.lengths[g]].double()
        np.testing.assert_allclose(found, rates, atol=1e-6)
        if ranked.connected[g]:
            scores = evalica.bradley_terry(xs, ys, wins, tolerance=1e-13, limit=100_000).scores
            log = np.log(scores.sort_index().to_numpy())
            found = ranked.strength[g, : table.lengths[g]]
            np.testing.assert_allclose(found, log - log.mean(), atol=1e-6)
    assert ranked.connected.any()


def test_average_of_self_play_converges_to_nash(generator):
    """Tabular SPPO, pi_{t+1} ~ pi_t exp(eta P(. > pi_t)), on a cycle: the mean policy settles."""
    up = 0.05 * torch.rand(3, generator=generator, dtype=torch.float64)  # 0 > 1 > 2 > 0
    up += torch.tensor([0.7, 0.78, 0.86])  # unequal: the equilibrium is not where play starts
    p = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    for i in range(3):
        p[0, i, (i + 1) % 3], p[0, (i + 1) % 3, i] = up[i], 1 - up[i]
    pi, mean, gaps = torch.full((1, 3), 1 / 3, dtype=torch.float64), 0.0, {}
    for t in range(1, 20_001):
        mean = mean + (pi - mean) / t
        gain = (p @ pi[:, :, None]).squeeze(-1)
        pi = torch.softmax(pi.log() + 0.05 * gain, -1)
        if t in (200, 20_000):
            gaps[t] = float(exploitability(p, mean))
    assert gaps[20_000] < gaps[200] / 10 and gaps[20_000] < 1e-3
    torch.testing.assert_close(mean, nash(p).strategy, rtol=0, atol=5e-3)
    assert exploitability(p, pi) > 5e-3  # the last policy keeps cycling
