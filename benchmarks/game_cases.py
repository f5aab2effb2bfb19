"""The cases of preference games: what is computed, by whom, and how a result is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import CPU, Call, interleaved, missing, passed, thread_timer, within
from benchmarks.rows import OURS, Row
from sppo_kernels.games.comparisons import aggregate
from sppo_kernels.games.solvers import bradley_terry, nash, tournament
from sppo_kernels.games.targets import sppo_targets, symmetrize, win_rates

NATIVE, REFERENCE = f"{OURS} native", f"{OURS} reference"


@dataclass
class GameCase:
    """Providers of one computation on the same games.

    Args:
        check: of a provider's name and result, the error, or Refused.
        games: how many a call plays; `sampled` gives the number of those who play fewer.
        peers: packages of other providers; those not installed become rows that say so.
    """

    name: str
    inputs: str
    games: int
    calls: dict[str, Callable[[], Any]]
    check: Callable[[str, Any], float | None]
    sampled: dict[str, int] = field(default_factory=dict)
    peers: Sequence[str] = ()
    dtype: str = "float64"
    per: str = "game"

    def measure(
        self,
        turns: int,
        device: torch.device = CPU,
        memory: Callable[[Call], int | None] = lambda call: None,
    ) -> list[Row]:
        """Check every provider, then time them in turn, seconds divided by the games of a call."""
        rows = {
            name: Row("games", self.name, self.dtype, name, inputs=self.inputs, per=self.per)
            for name in (*self.calls, *self.peers)
        }
        for name in self.peers:
            if why := missing(name):
                rows[name].note = f"cannot run: {why}"
                self.calls.pop(name, None)
        ready = {
            name: call
            for name, call in self.calls.items()
            if passed(rows[name], lambda name=name, call=call: self.check(name, call()))
        }
        found = interleaved(ready, turns, device, warmups=1, timer=thread_timer())
        for name, times in found.items():
            row, games = rows[name], self.sampled.get(name, self.games)
            row.times = [t / games for t in times]
            row.extra_peak = memory(ready[name])
            row.note = "" if games == self.games else f"timed on {games} of them"
        return list(rows.values())


def times_faster(rows: list[Row], provider: str) -> float:
    """How many times as long as ours a provider's best game takes."""
    best = {r.provider: r.best for r in rows}
    return best[provider] / best[NATIVE]


def random_tables(games: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(games, k, k, generator=generator)


def probabilities(games: int, k: int, device: torch.device = CPU) -> Tensor:
    """[games, K, K] in float64 with P_ij + P_ji = 1."""
    return symmetrize(random_tables(games, k, k).double()).to(device)


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


def targets_case(games: int, k: int) -> GameCase:
    """Symmetrise, win rates, best and worst, targets, in one pass; float32."""
    x = random_tables(games, k, k)
    rates, _, *picks, _ = eager_targets(x.double(), 1000.0)

    def check(name: str, found: tuple[Tensor, ...]) -> float:
        win, _, *picked, _ = found
        for got, want in zip(picked, picks, strict=True):  # equal but for near ties
            within(float((got != want).double().mean()), 1e-3, "picks: ")
        return within(float((win - rates).abs().max()), 1e-5)

    calls = {
        f"{OURS} {impl}": partial(sppo_targets, x, logits=True, impl=impl)
        for impl in ("native", "reference")
    }
    calls["lean eager"] = partial(eager_targets, x, 1000.0)
    return GameCase(
        f"fused path K={k}", described(games, k), games, calls, check, dtype="float32", per="prompt"
    )


def win_rates_case(games: int, k: int, device: torch.device = CPU) -> GameCase:
    """Mean over opponents of the probability to win."""
    p = probabilities(games, k, device)

    def check(name: str, found: Tensor) -> float:
        others = p * (1 - torch.eye(k, dtype=p.dtype, device=device))
        return within(float((found - others.sum(-1) / (k - 1)).abs().max()), 1e-10)

    calls = {NATIVE: partial(win_rates, p, impl="native")}
    return GameCase(f"win_rates K={k}", described(games, k), games, calls, check)


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


def nash_case(
    games: int, k: int, device: torch.device = CPU, *, peers: bool = True,
    methods: Sequence[str] = (),
) -> GameCase:  # fmt: skip
    """Exact equilibria; the error is the largest exploitability.

    Args:
        methods: ours by each of them, which shows what the limit of the simplex method rests on.
    """
    p = probabilities(games, k, device)
    payoff = p - p.mT
    tables = [g.numpy() for g in payoff[:20]] if peers else []

    @cache
    def nashpy_games() -> list:
        import nashpy

        return [nashpy.Game(t / 2) for t in tables]

    def check(name: str, found: Any) -> float:
        exact = name.startswith(NATIVE)
        strategy = found.strategy if exact else torch.from_numpy(np.stack(found))
        error = exploitability(payoff[: len(strategy)], strategy)
        error = max(error, float((strategy.sum(-1) - 1).abs().max()))
        if "mirror" in name:  # says how exact it is, and is taken as it comes
            return error
        return within(error, 1e-10 if exact else 1e-6)

    if methods:
        calls = {f"{NATIVE}, {m}": partial(nash, p, method=m, impl="native") for m in methods}
    else:
        calls = {NATIVE: partial(nash, p, impl="native")}
    sampled = dict.fromkeys(("nashpy", "scipy linprog") if peers else (), len(tables))
    if peers:
        calls["nashpy"] = lambda: [g.linear_program()[0] for g in nashpy_games()]
        calls["scipy linprog"] = lambda: [scipy_nash(t) for t in tables]
    return GameCase(
        f"nash K={k}", described(games, k), games, calls, check, sampled,
        ("nashpy",) if peers else (),
    )  # fmt: skip


def bradley_terry_case(games: int, k: int) -> GameCase:
    """Maximum-likelihood strengths; the error is against the most exact of the peers."""
    p = probabilities(games, k)
    off = (~torch.eye(k, dtype=torch.bool)).nonzero()
    xs, ys = off[:, 0].tolist(), off[:, 1].tolist()
    weights = [game[off[:, 0], off[:, 1]].tolist() for game in p[:50]]
    wins = [(g - torch.diag(torch.diagonal(g))).numpy() for g in p[:20]]

    @cache
    def evalica_index() -> Any:
        import evalica

        return evalica.indexing(xs, ys)[2], [evalica.Winner.X] * len(xs)

    def evalica_all(tables=weights, **options):
        import evalica

        index, won = evalica_index()
        return [
            evalica.bradley_terry(xs, ys, won, index=index, weights=w, **options) for w in tables
        ]

    def choix_all(tables=wins, **options):
        import choix

        return [choix.ilsr_pairwise_dense(w, **options) for w in tables]

    def check(name: str, found: Any) -> float | None:
        if name != NATIVE:
            return None
        ours, errors = found.strength[0].numpy(), []
        if not missing("evalica"):
            exact = evalica_all(weights[:1], tolerance=1e-14, limit=10**6)[0]
            errors.append(_apart(ours, np.log(exact.scores.sort_index().to_numpy())))
        if not missing("choix"):
            errors.append(_apart(ours, choix_all(wins[:1], tol=1e-12)[0]))
        return max((within(e, 1e-8) for e in errors), default=None)

    calls = {
        NATIVE: partial(bradley_terry, p, impl="native"), "evalica": evalica_all,
        "choix": choix_all,
    }  # fmt: skip
    return GameCase(
        f"bradley_terry K={k}", described(games, k), games, calls, check,
        {"evalica": len(weights), "choix": len(wins)}, ("evalica", "choix"),
    )  # fmt: skip


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of strengths, which have no origin."""
    return float(np.abs((a - a.mean()) - (b - b.mean())).max())


def evalica_win_rates(i: Tensor, j: Tensor, outcome: Tensor) -> Any:
    """A call that gives evalica's win rates of one game's comparisons."""
    import evalica

    words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    table = i.tolist(), j.tolist(), [words[o] for o in outcome.tolist()]
    return lambda: evalica.average_win_rate(*table).scores.sort_index()


def aggregate_case(games: int, k: int, each: int, peers: bool = True) -> GameCase:
    """Win rates from single comparisons; the error is against evalica's average_win_rate."""
    generator = torch.Generator().manual_seed(each)
    n = games * each
    i = torch.randint(0, k, (n,), generator=generator)
    j = (i + torch.randint(1, k, (n,), generator=generator)) % k
    outcome = torch.randint(0, 3, (n,), generator=generator).double() / 2
    game = torch.arange(games).repeat_interleave(each)  # a table in the order of its prompts
    sampled = min(50, games)
    theirs = []
    if peers and not missing("evalica"):
        parts = [slice(g * each, (g + 1) * each) for g in range(sampled)]
        theirs = [evalica_win_rates(i[part], j[part], outcome[part]) for part in parts]

    def check(name: str, found: Any) -> float | None:
        if name != NATIVE:
            return None
        within(abs(float(found.count.sum()) - 2 * n), 0.0, "counts: ")
        apart = [
            float(np.abs(found.win_rate[g][list(r.index)].numpy() - r.to_numpy()).max())
            for g, r in enumerate(call() for call in theirs)
        ]
        return within(max(apart), 1e-12) if apart else None

    calls = {
        NATIVE: partial(aggregate, i, j, outcome, game=game, num_games=games, size=k, impl="native")
    }
    if peers:
        calls["evalica"] = lambda: [call() for call in theirs]
    return GameCase(
        f"aggregate K={k}, {each} comparisons",
        f"{games} games of {k} with {each} random comparisons each", games, calls, check,
        {"evalica": sampled}, ("evalica",) if peers else (),
    )  # fmt: skip


def linearity_cases(k: int = 16, games: int = 2000) -> list[GameCase]:
    """Aggregation of N, 2N, 4N, 8N comparisons, seconds a comparison: linear when they agree."""
    found = []
    for each in (250, 500, 1000, 2000):
        case = aggregate_case(games, k, each, peers=False)
        case.name += ", each"
        case.games, case.per = games * each, "comparison"
        found.append(case)
    return found


def tournament_case(games: int, k: int) -> GameCase:
    """Condorcet winner, Smith set, cycles; eager torch is the reference implementation."""
    p = probabilities(games, k)
    few = p[: max(10, games // 100)]
    truth = tournament(few, impl="reference").smith

    def check(name: str, found: Any) -> float:
        return within(float((found.smith[: len(few)] != truth).double().mean()), 0.0)

    calls = {
        NATIVE: partial(tournament, p, impl="native"),
        REFERENCE: partial(tournament, few, impl="reference"),
    }
    return GameCase(
        f"tournament K={k}", described(games, k), games, calls, check, {REFERENCE: len(few)}
    )
