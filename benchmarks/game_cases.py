"""The cases of preference games: each checks the results of all providers, then times them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.game_timing import NATIVE, missing, rows_of, within
from benchmarks.rows import OURS, Row
from sppo_kernels.games.comparisons import aggregate
from sppo_kernels.games.solvers import bradley_terry, nash, tournament
from sppo_kernels.games.targets import sppo_targets, symmetrize


def random_tables(games: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(games, k, k, generator=generator)


def described(games: int, k: int) -> str:
    return f"{games} games of {k} with normal scores of deviation 2"


def eager_targets(x: Tensor, eta: float) -> tuple[Tensor, ...]:
    """The leanest eager PyTorch for it: a dense batch, nothing checked, ties not kept apart."""
    k = x.shape[-1]
    p = torch.sigmoid((x - x.mT) / 2)
    win = (p.sum(-1) - 0.5) / (k - 1)  # the diagonal is sigmoid(0)
    best, worst = win.argmax(-1), win.argmin(-1)
    prob = p[torch.arange(len(x)), best, worst]
    return win, eta * (win - 0.5), best, worst, prob


def measure_targets(games: int, k: int, turns: int = 15) -> list[Row]:
    """Symmetrise, win rates, best and worst, targets, in one pass; float32."""
    x = random_tables(games, k, k)
    truth = eager_targets(x.double(), 1000.0)
    providers = {
        NATIVE: lambda: sppo_targets(x, logits=True, impl="native"),
        f"{OURS} reference": lambda: sppo_targets(x, logits=True, impl="reference"),
        "lean eager": lambda: eager_targets(x, 1000.0),
    }
    errors = {}
    for name, call in providers.items():
        win, _, best, worst, _ = call()
        errors[name] = within(name, float((win - truth[0]).abs().max()), 1e-5)
        for got, want in ((best, truth[2]), (worst, truth[3])):  # equal but for near ties
            within(f"{name}, picks", float((got != want).double().mean()), 1e-3)
    calls = {name: (call, games) for name, call in providers.items()}
    return rows_of(
        f"fused path K={k}", calls, turns, dtype="float32", errors=errors, per="prompt",
        inputs=described(games, k),
    )  # fmt: skip


def exploitability(payoff: Tensor, strategy: Tensor) -> float:
    """Largest gain over a batch of strategies in symmetric games with payoff P − Pᵀ, halved."""
    return float((payoff @ strategy[..., None]).amax((-1, -2)).max()) / 2


def scipy_nash(payoff: np.ndarray) -> np.ndarray:
    """The equilibrium of a symmetric zero-sum game by scipy's linear programming."""
    from scipy.optimize import linprog

    k = len(payoff)
    cost = np.append(np.zeros(k), -1.0)  # maximise the value v with payoffᵀ x ≥ v
    found = linprog(
        cost, A_ub=np.hstack([-payoff.T, np.ones((k, 1))]), b_ub=np.zeros(k),
        A_eq=np.append(np.ones(k), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * k + [(None, None)],
    )  # fmt: skip
    return found.x[:k]


def measure_nash(games: int, k: int, turns: int = 9) -> list[Row]:
    """Exact equilibria; the error is the largest exploitability."""
    p = symmetrize(random_tables(games, k, k).double())
    payoff = p - p.mT
    tables = [g.numpy() for g in payoff[:20]]
    solvers: dict[str, Callable[[], list[np.ndarray]]] = {}
    absent = missing("nashpy", "scipy")
    if "nashpy" not in absent:
        import nashpy

        sample = [nashpy.Game(t / 2) for t in tables]
        solvers["nashpy"] = lambda: [g.linear_program()[0] for g in sample]
    if "scipy" not in absent:
        solvers["scipy linprog"] = lambda: [scipy_nash(t) for t in tables]
    found = nash(p, impl="native").strategy
    errors = {NATIVE: within(NATIVE, exploitability(payoff, found), 1e-10)}
    for name, call in solvers.items():
        strategy = torch.from_numpy(np.stack(call()))
        errors[name] = within(name, exploitability(payoff[: len(tables)], strategy), 1e-6)
    calls = {NATIVE: (lambda: nash(p, impl="native"), games)}
    calls |= {name: (call, len(tables)) for name, call in solvers.items()}
    return rows_of(
        f"nash K={k}", calls, turns, errors=errors, absent=absent, inputs=described(games, k)
    )


def measure_bradley_terry(games: int, k: int, turns: int = 7) -> list[Row]:
    """Maximum-likelihood strengths; the error is against the most exact of the peers."""
    p = symmetrize(random_tables(games, k, k).double())
    absent = missing("evalica", "choix")
    calls: dict[str, tuple[Callable[[], object], int]] = {
        NATIVE: (lambda: bradley_terry(p, impl="native"), games)
    }
    ours, errors = bradley_terry(p, impl="native").strength[0].numpy(), {}
    if "evalica" not in absent:
        import evalica

        off = (~torch.eye(k, dtype=torch.bool)).nonzero()
        xs, ys = off[:, 0].tolist(), off[:, 1].tolist()
        wins = [evalica.Winner.X] * len(xs)
        index = evalica.indexing(xs, ys)[2]
        weights = [game[off[:, 0], off[:, 1]].tolist() for game in p[:50]]

        def evalica_all(**options):
            return [
                evalica.bradley_terry(xs, ys, wins, index=index, weights=w, **options)
                for w in weights
            ]

        exact = evalica_all(tolerance=1e-14, limit=10**6)[0].scores.sort_index().to_numpy()
        errors[NATIVE] = within(NATIVE, _apart(ours, np.log(exact)), 1e-8)
        calls["evalica"] = (evalica_all, len(weights))
    if "choix" not in absent:
        import choix

        wins_of = [(g - torch.diag(torch.diagonal(g))).numpy() for g in p[:20]]
        theirs = choix.ilsr_pairwise_dense(wins_of[0], tol=1e-12)
        error = within(NATIVE, _apart(ours, theirs), 1e-8)
        errors[NATIVE] = max(errors.get(NATIVE, 0.0), error)
        calls["choix"] = (
            lambda: [choix.ilsr_pairwise_dense(w) for w in wins_of],
            len(wins_of),
        )
    return rows_of(
        f"bradley_terry K={k}", calls, turns, errors=errors, absent=absent,
        inputs=described(games, k),
    )  # fmt: skip


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of strengths, which have no origin."""
    return float(np.abs((a - a.mean()) - (b - b.mean())).max())


def random_comparisons(games: int, k: int, each: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(each)
    n = games * each
    i = torch.randint(0, k, (n,), generator=generator)
    j = (i + torch.randint(1, k, (n,), generator=generator)) % k
    outcome = torch.randint(0, 3, (n,), generator=generator).double() / 2
    game = torch.arange(games).repeat_interleave(each)  # a table in the order of its prompts
    return i, j, outcome, game


def measure_aggregate(games: int, k: int, each: int, turns: int = 7) -> list[Row]:
    """Win rates from single comparisons; the error is against evalica's average_win_rate."""
    i, j, outcome, game = random_comparisons(games, k, each)

    def ours():
        return aggregate(i, j, outcome, game=game, num_games=games, size=k, impl="native")

    calls, errors = {NATIVE: (ours, games)}, {}
    absent = missing("evalica")
    if not absent:
        import evalica

        words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
        tables = []
        for g in range(50):
            part = slice(g * each, (g + 1) * each)
            wins = [words[o] for o in outcome[part].tolist()]
            tables.append((i[part].tolist(), j[part].tolist(), wins))

        def theirs():
            return [evalica.average_win_rate(*table) for table in tables]

        rates = ours().win_rate
        apart = max(
            float(np.abs(rates[g][list(r.scores.index)].numpy() - r.scores.to_numpy()).max())
            for g, r in enumerate(theirs())
        )
        errors[NATIVE] = within(NATIVE, apart, 1e-12)
        calls["evalica"] = (theirs, len(tables))
    return rows_of(
        f"aggregate K={k}, {each} comparisons", calls, turns, errors=errors, absent=absent,
        inputs=f"{games} games of {k} with {each} random comparisons each",
    )  # fmt: skip


def measure_linearity(k: int = 16, turns: int = 7, games: int = 2000) -> list[Row]:
    """Aggregation of N, 2N, 4N, 8N comparisons, seconds a comparison: linear when they agree."""
    rows = []
    for each in (250, 500, 1000, 2000):
        i, j, outcome, game = random_comparisons(games, k, each)

        def call(i=i, j=j, outcome=outcome, game=game):
            return aggregate(i, j, outcome, game=game, num_games=games, size=k, impl="native")

        within("counts", abs(float(call().count.sum()) - 2 * games * each), 0.0)
        rows += rows_of(
            f"aggregate K={k}, {each} comparisons, each", {NATIVE: (call, games * each)}, turns,
            inputs=f"{games} games of {k} with {each} random comparisons each", per="comparison",
        )  # fmt: skip
    return rows


def measure_tournament(games: int, k: int, turns: int = 5) -> list[Row]:
    """Condorcet winner, Smith set, cycles; eager torch is the reference implementation."""
    p = symmetrize(random_tables(games, k, k).double())
    few = p[: max(10, games // 100)]
    ours, truth = tournament(few, impl="native"), tournament(few, impl="reference")
    wrong = float((ours.smith != truth.smith).double().mean())
    calls = {
        NATIVE: (lambda: tournament(p, impl="native"), games),
        f"{OURS} reference": (lambda: tournament(few, impl="reference"), len(few)),
    }
    return rows_of(
        f"tournament K={k}", calls, turns, errors={NATIVE: within(NATIVE, wrong, 0.0)},
        inputs=described(games, k),
    )  # fmt: skip


def measure_large_nash(k: int = 128, turns: int = 3) -> list[Row]:
    """What the limit of the simplex method is chosen by: exactness and time at large K."""
    p = symmetrize(random_tables(4, k, k).double())
    methods = {f"{NATIVE}, {m}": m for m in ("simplex", "mirror")}
    errors = {
        name: float(nash(p, method=m, impl="native").residual.max()) for name, m in methods.items()
    }
    within("simplex", errors[f"{NATIVE}, simplex"], 1e-10)
    calls = {
        name: ((lambda m=m: nash(p, method=m, impl="native")), 4) for name, m in methods.items()
    }
    return rows_of(f"nash K={k}", calls, turns, errors=errors, inputs=described(4, k))
