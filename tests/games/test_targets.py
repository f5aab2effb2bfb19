"""Symmetrisation, win rates, pairs and targets: both implementations against oracles."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash, tournament
from sppo_kernels.games.targets import (
    TARGETS,
    preference_targets,
    select_pairs,
    sppo_targets,
    symmetrize,
    win_rates,
)
from tests.game_inputs import (
    IMPLS,
    needs_native,
    poisoned,
    random_games,
    random_lengths,
    random_logits,
)

evalica = pytest.importorskip("evalica")
# K = 2: a pair; 5: the paper's; 16: whole vectors; 67: beyond the loop that fills SIMD lanes.
SIZES = [2, 5, 16, 67]
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-14}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", SIZES)
def test_win_rates_are_evalicas(generator, impl, k):
    p = random_games(generator, 3, k)
    xs, ys = (index.tolist() for index in torch.triu_indices(k, k, 1))
    names = evalica.indexing(range(k), range(k))[2]  # keeps responses in their order
    for game, rates in zip(p, win_rates(p, impl=impl), strict=True):
        weights = [*game[xs, ys].tolist(), *game[ys, xs].tolist()]
        wins = [evalica.Winner.X] * len(xs) + [evalica.Winner.Y] * len(xs)
        found = evalica.average_win_rate(xs * 2, ys * 2, wins, weights=weights, index=names)
        expected = torch.tensor(found.scores.sort_index().to_numpy())
        torch.testing.assert_close(rates, expected, rtol=0, atol=1e-13)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "logit"},
        {"mode": "prob", "include_self": True},
        {"mode": None},
        {"preset": "uclaml"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_native_matches_float64_reference(generator, dtype, k, options):
    """Ragged, NaN wherever nothing may be read; 37 games leave lanes of the last group over."""
    x = random_logits(generator, 37, k, dtype=dtype)
    lengths = random_lengths(generator, 37, k)
    found = sppo_targets(
        poisoned(x, lengths), logits=True, lengths=lengths, impl="native", **options
    )
    exact = sppo_targets(x.double(), logits=True, lengths=lengths, impl="reference", **options)
    eager = sppo_targets(x, logits=True, lengths=lengths, impl="reference", **options)
    for name in ("win_rate", "target", "chosen_prob"):
        a, b, e = (getattr(result, name).double() for result in (found, exact, eager))
        scale = 1000.0 if name == "target" else 1.0
        if not torch.equal(found.best, exact.best) or not torch.equal(found.worst, exact.worst):
            assert dtype == torch.float32  # two win rates within rounding of each other
            continue
        error = (a - b).abs().max()
        assert error <= 2 * (e - b).abs().max() + scale * TOLERANCE[dtype], name
    assert (found.best != found.worst).all()
    padding = torch.arange(k) >= lengths[:, None]
    assert (found.win_rate[padding] == 0.5).all() and (found.target[padding] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_logit_symmetrisation_removes_additive_position_bias(generator, impl):
    strength = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    fair = strength[:, :, None] - strength[:, None, :]
    bias = 3 * torch.randn(4, 1, 1, generator=generator, dtype=torch.float64)
    p = symmetrize(fair + bias, impl=impl)
    torch.testing.assert_close(p, torch.sigmoid(fair), rtol=1e-13, atol=0)
    assert not torch.allclose(torch.sigmoid(fair + bias), p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["logit", "prob"])
def test_symmetrize(generator, impl, mode):
    x = random_logits(generator, 21, 7)
    x = torch.sigmoid(x) if mode == "prob" else x
    p = symmetrize(x, mode, impl=impl)
    expected = (x + 1 - x.mT) / 2 if mode == "prob" else torch.sigmoid((x - x.mT) / 2)
    expected.diagonal(dim1=-2, dim2=-1).fill_(0.5)
    torch.testing.assert_close(p, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(p + p.mT, torch.ones_like(p), rtol=0, atol=3e-16)


def released_pipeline(c, eta):
    """NumPy transcript of what the released code does with one table of raw logits."""
    k = len(c)
    score = np.array([np.mean(c[i] - c[:, i]) for i in range(k)])
    p = 1 / (1 + np.exp(score[None, :] - score[:, None]))
    best, worst = score.argmax(), score.argmin()
    win = p.sum(axis=1) / k
    return win, eta * (win - 0.5), best, worst, p[best, worst]


@pytest.mark.parametrize("impl", IMPLS)
def test_uclaml_preset_is_the_released_pipeline(generator, impl):
    c = random_logits(generator, 40, 5)
    found = sppo_targets(c.numpy(), eta=250.0, preset="uclaml", logits=True, impl=impl)
    expected = [released_pipeline(game, 250.0) for game in c.numpy()]
    for name, values in zip(found._fields, zip(*expected, strict=True), strict=True):
        got = getattr(found, name)
        want = torch.as_tensor(np.array(values), dtype=got.dtype)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


def test_include_self_shrinks_by_k_minus_1_over_k(generator):
    p = random_games(generator, 9, 5)
    without, including = win_rates(p), win_rates(p, include_self=True)
    torch.testing.assert_close(including - 0.5, (without - 0.5) * 4 / 5, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_give_distinct_pairs(impl):
    p = torch.full((3, 4, 4), 0.5)
    p[1, 2, 0], p[1, 0, 2] = 0.6, 0.4
    p[2, :, 3], p[2, 3, :] = 0.9, 0.1  # past the length: must not become the worst
    lengths = torch.tensor([4, 4, 3])
    for by in ("win_rate", "score"):
        best, worst = select_pairs(p, by, lengths=lengths, impl=impl)
        assert best.tolist() == [0, 2, 0] and worst.tolist() == [3, 0, 2]


@pytest.mark.parametrize("impl", IMPLS)
def test_score_and_win_rate_may_choose_differently(impl):
    # Response 0 wins narrowly twice; response 1 beats 2 by far: mean log-odds prefer 1.
    p = torch.tensor([[0.5, 0.55, 0.95], [0.45, 0.5, 0.999], [0.05, 0.001, 0.5]])
    assert select_pairs(p, "win_rate", impl=impl).best == 0
    assert select_pairs(p, "score", impl=impl).best == 1
    c = torch.logit(p)
    assert select_pairs(c, "score", logits=True, impl=impl).best == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(generator, impl):
    x = random_logits(generator, 3, 4).requires_grad_()
    lengths = torch.tensor([4, 3, 2])

    def outputs(x, **options):
        found = sppo_targets(x, logits=True, eta=3.0, lengths=lengths, impl=impl, **options)
        return found.win_rate, found.target, found.chosen_prob

    cases = [
        outputs,
        lambda x: outputs(x, mode="prob", include_self=True),
        lambda x: outputs(x, preset="uclaml"),
        lambda x: win_rates(symmetrize(x, impl=impl), lengths, impl=impl),
        lambda x: symmetrize(torch.sigmoid(x), "prob", impl=impl),
    ]
    for case in cases:
        assert torch.autograd.gradcheck(case, x)
    assert torch.autograd.gradgradcheck(outputs, x)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(generator, dtype):
    x = random_logits(generator, 6, 5, dtype=dtype).requires_grad_()
    p = torch.sigmoid(x.detach() - x.detach().mT)
    lengths = random_lengths(generator, 6, 5)
    ops = torch.ops.sppo_kernels
    checks = [
        (ops.game_targets, (x, lengths, 2, False, 10.0)),
        (ops.game_targets, (x, None, 3, False, 10.0)),
        (ops.game_win_rates, (x, lengths, True)),
        (ops.game_symmetrize, (x, 2)),
        (ops.game_check, (x.detach(), lengths, 0.0, 1.0, True)),
        (ops.game_nash, (p, lengths, False, 1e-6, 100)),
        (ops.game_regularized_nash, (p, None, torch.zeros(1, 5, dtype=torch.float64), 0.1, 50)),
        (ops.game_bradley_terry, (p, lengths, torch.ones_like(p))),
        (ops.game_tournament, (p, lengths)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(generator, impl):
    x = random_logits(generator, 8, 5)
    lengths = random_lengths(generator, 8, 5)

    def everything(x, lengths):
        p = symmetrize(x, impl=impl)
        found = sppo_targets(x, logits=True, lengths=lengths, impl=impl)
        solved = (
            ()
            if impl == "reference"
            else (
                *nash(p, lengths, impl=impl),
                *regularized_nash(p, tau=0.1, lengths=lengths, impl=impl),
                *bradley_terry(p, lengths, impl=impl),
                *tournament(p, lengths, impl=impl),
            )
        )  # the reference solvers look at values to stop, which cannot be one graph
        trained = (
            preference_targets(x, by, logits=True, lengths=lengths, impl=impl)
            for by in (TARGETS[:3] if impl == "reference" else TARGETS)
        )
        rates = win_rates(p, lengths, impl=impl)
        return (*found, rates, *select_pairs(p, impl=impl), *solved, *trained)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, lengths), everything(x, lengths), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@needs_native
def test_compiled_with_inductor_trains(generator):
    x = random_logits(generator, 8, 5).requires_grad_()

    def loss(x):
        return sppo_targets(x, logits=True, eta=2.0).target.square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_a_person_would_pass(impl):
    nested = [[0.5, 0.8, 0.3], [0.2, 0.5, 0.6], [0.7, 0.4, 0.5]]
    expected = torch.tensor([0.55, 0.4, 0.55], dtype=torch.float64)
    for value in (nested, np.array(nested), np.float16(nested), torch.tensor(nested).bfloat16()):
        rates = win_rates(value, impl=impl)
        assert rates.shape == (3,)
        torch.testing.assert_close(rates.double(), expected, rtol=0, atol=2e-3)
    assert win_rates(np.array(nested), impl=impl).dtype == torch.float64
    batch = torch.tensor(nested, dtype=torch.float64).expand(2, 4, 3, 3)  # strides of 0
    rates = win_rates(batch, np.full((2, 4), 3), impl=impl)
    torch.testing.assert_close(rates, expected.expand(2, 4, 3))
    empty = sppo_targets(torch.empty(0, 4, 4), impl=impl)
    assert empty.win_rate.shape == (0, 4) and empty.best.shape == (0,)


BAD = torch.full((2, 3, 3), 0.5)


def bad(i, j, value):
    p = BAD.clone()
    p[1, i, j] = value
    return p


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda m: win_rates(bad(0, 2, 1.5), impl=m),
            ValueError,
            r"P: .*\[0, 1\].*1\.5.*\[1, 0",
        ),
        (lambda m: win_rates(bad(2, 0, -0.1), impl=m), ValueError, r"P: .*-0\.1.*\[1, 2, 0\]"),
        (lambda m: win_rates(bad(2, 1, float("nan")), impl=m), ValueError, r"P: .*nan"),
        (
            lambda m: sppo_targets(bad(0, 1, float("inf")), logits=True, impl=m),
            ValueError,
            "x: expected finite logits",
        ),
        (lambda m: win_rates(torch.zeros(3, 1, 1), impl=m), ValueError, "P: .*K = 1"),
        (lambda m: win_rates(torch.zeros(0, 0), impl=m), ValueError, "P: .*K = 0"),
        (lambda m: win_rates(torch.zeros(3, 4), impl=m), ValueError, r"P: .*\[\.\.\., K, K\]"),
        (lambda m: win_rates("table", impl=m), TypeError, "P: .*str"),
        (lambda m: win_rates(BAD, [3, 4], impl=m), ValueError, "lengths: .*K = 3, got 4"),
        (lambda m: win_rates(BAD, [1, 3], impl=m), ValueError, "lengths: .*got 1"),
        (lambda m: win_rates(BAD, [3], impl=m), ValueError, r"lengths: expected shape \[2\]"),
        (lambda m: win_rates(BAD, [2.0, 3.0], impl=m), TypeError, "lengths: expected integers"),
        (lambda m: symmetrize(BAD, "mean", impl=m), ValueError, "mode: .*'mean'"),
        (lambda m: select_pairs(BAD, "elo", impl=m), ValueError, "by: .*'elo'"),
        (lambda m: sppo_targets(BAD, preset="ucla", impl=m), ValueError, "preset: .*'ucla'"),
        (lambda m: sppo_targets(BAD, preset="uclaml", impl=m), ValueError, "logits=True"),
        (lambda m: win_rates(BAD, impl="fast"), ValueError, "impl: .*'fast'"),
    ],
)
def test_bad_input_is_named(impl, call, error, words):
    with pytest.raises(error, match=words):
        call(impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [3, 67])
def test_gap_is_reported_where_it_is_largest(impl, k):
    p = torch.full((2, 3, k, k), 0.5, dtype=torch.float64)
    p[0, 1, 0, 1], p[1, 2, 1, 2] = 0.6, 0.9
    for call in (win_rates, sppo_targets, preference_targets, nash):
        with pytest.warns(UserWarning, match=r"up to 0\.4, at \[1, 2, 1, 2\]") as said:
            call(p, impl=impl)
        assert [w.filename for w in said] == [__file__]  # once, and where the caller is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sppo_targets(p, mode="prob", impl=impl)
        win_rates(symmetrize(p, "prob", impl=impl), impl=impl)


@needs_native
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_properties(k, games, seed):
    generator = torch.Generator().manual_seed(seed)
    c = random_logits(generator, games, k, dtype=torch.float32)
    found = sppo_targets(c, logits=True)
    # Complement: swapping the order of every comparison turns w into 1 - w.
    swapped = sppo_targets(c.mT.contiguous(), logits=True)
    torch.testing.assert_close(swapped.win_rate, 1 - found.win_rate, rtol=0, atol=1e-6)
    # The win rates of a game average to 1/2.
    torch.testing.assert_close(
        found.win_rate.mean(-1), torch.full((games,), 0.5), rtol=0, atol=1e-6
    )
    # Renaming the responses renames the results.
    order = torch.randperm(k, generator=generator)
    renamed = sppo_targets(c[:, order][:, :, order], logits=True)
    torch.testing.assert_close(renamed.win_rate, found.win_rate[:, order], rtol=0, atol=1e-6)
    # A game inside a padded batch gives the same bits as alone.
    padded = torch.full((games, k + 3, k + 3), torch.nan)
    padded[:, :k, :k] = c
    ragged = sppo_targets(padded, logits=True, lengths=torch.full((games,), k))
    for a, b in zip(ragged, found, strict=True):
        assert torch.equal(a[..., :k] if a.dim() == 2 else a, b)
    # And so does every game by itself: no game depends on its neighbours in the vector.
    alone = sppo_targets(c[games // 2], logits=True)
    assert torch.equal(alone.win_rate, found.win_rate[games // 2])
