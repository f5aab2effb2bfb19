"""Aggregation of comparison tables, and the loader."""

import numpy as np
import pytest
import torch

from sppo_kernels.games.comparisons import aggregate, load_comparisons
from tests.game_inputs import IMPLS, needs_native

evalica = pytest.importorskip("evalica")


def random_comparisons(generator, n, games, k):
    """Unsorted games, ties, zero weights; the last game and the last response never appear."""
    game = torch.randint(0, games - 1, (n,), generator=generator)
    i = torch.randint(0, k - 1, (n,), generator=generator)
    j = (i + torch.randint(1, k - 1, (n,), generator=generator)) % (k - 1)
    outcome = torch.randint(0, 3, (n,), generator=generator).double() / 2
    weight = torch.randint(0, 4, (n,), generator=generator).double() / 3
    return game, i, j, outcome, weight


def brute_force(game, i, j, outcome, weight, games, k):
    wins, counts = np.zeros((games, k, k)), np.zeros((games, k, k))
    for g, a, b, o, w in zip(game, i, j, outcome, weight, strict=True):
        wins[g, a, b] += w * o
        wins[g, b, a] += w * (1 - o)
        counts[g, a, b] += w
        counts[g, b, a] += w
    p = np.divide(wins, counts, where=counts > 0, out=np.full_like(wins, 0.5))
    met = (counts > 0).sum(-1)
    macro = np.full((games, k), 0.5)
    macro = np.divide((p * (counts > 0)).sum(-1), met, where=met > 0, out=macro)
    total, micro = counts.sum(-1), np.full((games, k), 0.5)
    micro = np.divide(wins.sum(-1), total, where=total > 0, out=micro)
    return p, counts, macro, micro, total


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["game", "indptr"])
def test_aggregate_against_brute_force(generator, impl, form):
    game, i, j, outcome, weight = random_comparisons(generator, 400, 6, 7)
    expected = brute_force(*(t.tolist() for t in (game, i, j, outcome, weight)), 6, 7)
    where = {"game": game, "num_games": 6}
    if form == "indptr":
        order = torch.argsort(game, stable=True)
        i, j, outcome, weight = i[order], j[order], outcome[order], weight[order]
        where = {"indptr": torch.searchsorted(game[order], torch.arange(7))}
    found = aggregate(i, j, outcome, weight=weight, size=7, impl=impl, **where)
    for name, got, want in zip(found._fields, found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15, err_msg=name)
    assert (found.win_rate[5] == 0.5).all() and (found.count[5] == 0).all()  # never compared
    assert (found.win_rate[:, 6] == 0.5).all() and (found.count[:, 6] == 0).all()
    assert not torch.equal(found.win_rate, found.win_rate_micro)


@pytest.mark.parametrize("impl", IMPLS)
def test_macro_rates_are_evalicas(generator, impl):
    _, i, j, outcome, _ = random_comparisons(generator, 120, 2, 6)
    found = aggregate(i.numpy(), j.tolist(), outcome, impl=impl)
    words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    theirs = evalica.average_win_rate(i.tolist(), j.tolist(), [words[o] for o in outcome.tolist()])
    np.testing.assert_allclose(found.win_rate[0], theirs.scores.sort_index(), atol=1e-13)


@needs_native
def test_same_bits_from_any_thread_count_and_game_order(generator):
    game, i, j, outcome, _ = random_comparisons(generator, 20_000, 300, 9)
    weight = torch.rand(20_000, generator=generator, dtype=torch.float64)
    options = {"weight": weight, "num_games": 300, "size": 9}
    first = aggregate(i, j, outcome, game=game, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = aggregate(i, j, outcome, game=game, **options)
    finally:
        torch.set_num_threads(threads)
    order = torch.argsort(game, stable=True)
    indptr = torch.searchsorted(game[order], torch.arange(301))
    grouped = aggregate(
        i[order], j[order], outcome[order], indptr=indptr, weight=weight[order], size=9
    )
    for a, b, c in zip(first, again, grouped, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@needs_native
def test_opcheck_of_aggregation(generator):
    game, i, j, outcome, weight = random_comparisons(generator, 50, 4, 5)
    ops = torch.ops.sppo_kernels
    torch.library.opcheck(ops.game_group.default, (game, 4))
    indptr, order = ops.game_group(game, 4)
    assert torch.equal(order, torch.argsort(game, stable=True))
    for wide in (False, True):
        torch.library.opcheck(
            ops.game_aggregate.default, (i, j, outcome, weight, indptr, order, 5, wide)
        )
    with pytest.raises(RuntimeError, match=r"i, j: .*\[0, 3\)"):
        ops.game_aggregate(i, j, outcome, weight, indptr, order, 3, True)
    with pytest.raises(RuntimeError, match="game: "):
        ops.game_group(game, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"i": [0, -1]}, ValueError, r"i: .*\[0, 2\).*-1 in comparison 1"),
        ({"j": [1, 5], "size": 3}, ValueError, r"j: .*\[0, 3\), got 5 in comparison 1"),
        ({"j": [2, 0], "lengths": [3, 2]}, ValueError, None),
        (
            {"j": [1, 2], "i": [0, 0], "lengths": [3, 2]},
            ValueError,
            r"j: .*\[0, 2\), got 2.*game 1",
        ),
        ({"game": [0, 7], "num_games": 2}, ValueError, r"game: .*\[0, 2\), got 7"),
        ({"j": [0, 0]}, ValueError, "j: response 0 is compared with itself in comparison 0"),
        ({"outcome": [1.0, 1.2]}, ValueError, r"outcome: .*\[0, 1\], got 1.2"),
        ({"outcome": [1.0, float("nan")]}, ValueError, "outcome: .*nan"),
        ({"weight": [1.0, -1.0]}, ValueError, "weight: .*at least 0, got -1.0"),
        ({"weight": [1.0]}, ValueError, "weight: expected 2 entries"),
        ({"i": [0.0, 1.0]}, TypeError, "i: expected integers"),
        ({"i": [0, 0], "j": [0, 0], "size": 1}, ValueError, "size: .*K = 1"),
        ({"game": None, "indptr": [0, 3]}, ValueError, "indptr: .*N = 2"),
        ({"indptr": [0, 2]}, ValueError, "indptr: give either"),
        ({"lengths": [2, 2, 2]}, ValueError, "lengths: expected 2"),
        ({"outcome": None}, ValueError, "outcome: "),
    ],
)
def test_bad_comparisons_are_named(impl, change, error, words):
    good = {"i": [0, 1], "j": [1, 0], "outcome": [1.0, 0.5], "game": [0, 1]}
    if change.get("lengths") == [2, 2, 2]:
        good["num_games"] = 2
    arguments = {**good, **change}
    if words is None:  # the same columns, within the lengths: accepted
        aggregate(**arguments, impl=impl)
        return
    with pytest.raises(error, match=words):
        aggregate(**arguments, impl=impl)


def test_loader_reads_csv_frames_and_columns(tmp_path):
    columns = {
        "prompt": ["b", "b", "a", "a", "b"],
        "model_x": ["m1", "m2", "m9", "m8", "m3"],
        "model_y": ["m2", "m3", "m8", "m7", "m1"],
        "winner": ["left", "Tie", "right", "left", "0.25"],
        "w": [1, 2, 3, 4, 5],
    }
    path = tmp_path / "table.csv"
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [tuple(columns), *rows]))
    sources = [path, str(path), columns]
    try:
        import pandas
    except ImportError:
        pass
    else:
        sources.append(pandas.DataFrame(columns))
    for source in sources:
        table = load_comparisons(source, weight="w")
        assert table.games == ["b", "a"]
        assert table.responses == [["m1", "m2", "m3"], ["m9", "m8", "m7"]]
        assert table.game.tolist() == [0, 0, 1, 1, 0]
        assert table.i.tolist() == [0, 1, 0, 1, 2] and table.j.tolist() == [1, 2, 1, 2, 0]
        assert table.outcome.tolist() == [1.0, 0.5, 0.0, 1.0, 0.25]
        assert table.weight.tolist() == [1, 2, 3, 4, 5] and table.lengths.tolist() == [3, 3]
    pooled = aggregate(table)
    assert pooled.P[0, 2, 0] == 0.25 and pooled.P[1, 0, 1] == 0
    one = load_comparisons(columns, game=None)
    assert one.games == [0] and one.lengths.tolist() == [6]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"winner": ["left", "nobody"]}, "winner: .*'nobody' in row 1"),
        ({"winner": ["left"]}, "source: expected columns of one length"),
        ({"model_y": None}, r"source: .*\['model_y'\] missing"),
    ],
)
def test_loader_names_what_is_wrong(change, words):
    columns = {"prompt": [0, 0], "model_x": [1, 2], "model_y": [2, 3], "winner": ["tie", "left"]}
    columns = {k: v for k, v in {**columns, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        load_comparisons(columns)
