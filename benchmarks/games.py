"""Measures preference games on the CPU against eager torch, evalica and nashpy.

    python -m benchmarks.games [--games 100000] [--threads 1] [--json PATH]

Every figure passes a correctness check first. Competitors run in turns within one process, and the
best of many turns counts, since other work on the machine only ever slows a turn down. With one
thread (the default) the clock is the CPU time of that thread: what a core spends on a game.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sppo_kernels.comparisons import aggregate
from sppo_kernels.games import bradley_terry, nash, tournament
from sppo_kernels.preference import sppo_targets, symmetrize


def interleaved(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Best seconds of each call over `turns` rounds in which every call has one turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(turns):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def eager_targets(x: Tensor, eta: float) -> tuple[Tensor, ...]:
    """The leanest eager PyTorch for it: a dense batch, nothing checked, ties not kept apart."""
    k = x.shape[-1]
    p = torch.sigmoid((x - x.mT) / 2)
    win = (p.sum(-1) - 0.5) / (k - 1)  # the diagonal is sigmoid(0)
    best, worst = win.argmax(-1), win.argmin(-1)
    prob = p[torch.arange(len(x)), best, worst]
    return win, eta * (win - 0.5), best, worst, prob


def random_tables(games: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(games, k, k, generator=generator)


def measure_targets(games: int, k: int, turns: int = 15) -> dict:
    x = random_tables(games, k, k)
    ours, theirs = sppo_targets(x, logits=True, impl="native"), eager_targets(x, 1000.0)
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype == torch.int64:
            assert (a == b).float().mean() > 0.999  # win rates within rounding of each other
        else:
            close = (a - b).abs() <= 1e-3 * (1 + b.abs())
            assert close.float().mean() > 0.999
    seconds = interleaved(
        {
            "native": lambda: sppo_targets(x, logits=True, impl="native"),
            "reference": lambda: sppo_targets(x, logits=True, impl="reference"),
            "lean": lambda: eager_targets(x, 1000.0),
        },
        turns,
    )
    return {
        "ns_per_prompt": seconds["native"] / games * 1e9,
        "reference_ns_per_prompt": seconds["reference"] / games * 1e9,
        "lean_eager_ns_per_prompt": seconds["lean"] / games * 1e9,
        "times_faster_than_reference": seconds["reference"] / seconds["native"],
        "times_faster_than_lean_eager": seconds["lean"] / seconds["native"],
    }


def measure_nash(games: int, k: int, turns: int = 9) -> dict:
    import nashpy

    p = symmetrize(random_tables(games, k, k).double())
    found = nash(p, impl="native")
    payoffs = p - p.mT
    gain = (payoffs @ found.strategy[:, :, None]).amax((-1, -2)) / 2
    assert float(gain.max()) <= 1e-10
    sample = [nashpy.Game((game - 0.5).numpy()) for game in p[:20]]
    row, _ = sample[0].linear_program()
    assert float((payoffs[0].numpy() @ row).max()) < 1e-6

    seconds = interleaved(
        {
            "native": lambda: nash(p, impl="native"),
            "nashpy": lambda: [game.linear_program() for game in sample],
        },
        turns,
    )
    ours, theirs = seconds["native"] / games, seconds["nashpy"] / len(sample)
    return {
        "us_per_game": ours * 1e6,
        "largest_exploitability": float(gain.max()),
        "nashpy_us_per_game": theirs * 1e6,
        "times_faster_than_nashpy": theirs / ours,
    }


def measure_bradley_terry(games: int, k: int, turns: int = 7) -> dict:
    import evalica

    p = symmetrize(random_tables(games, k, k).double())
    off = (~torch.eye(k, dtype=torch.bool)).nonzero()
    xs, ys = off[:, 0].tolist(), off[:, 1].tolist()
    wins = [evalica.Winner.X] * len(xs)
    index = evalica.indexing(xs, ys)[2]
    weights = [game[off[:, 0], off[:, 1]].tolist() for game in p[:50]]

    def evalica_all(**options):
        return [
            evalica.bradley_terry(xs, ys, wins, index=index, weights=w, **options) for w in weights
        ]

    theirs = np.log(evalica_all(tolerance=1e-14, limit=10**6)[0].scores.sort_index().to_numpy())
    ours = bradley_terry(p, impl="native").strength
    assert np.abs(ours[0].numpy() - theirs + theirs.mean()).max() < 1e-8
    seconds = interleaved(
        {"native": lambda: bradley_terry(p, impl="native"), "evalica": evalica_all}, turns
    )
    mine, other = seconds["native"] / games, seconds["evalica"] / len(weights)
    return {
        "us_per_game": mine * 1e6,
        "evalica_us_per_game": other * 1e6,
        "times_faster_than_evalica": other / mine,
    }


def random_comparisons(games: int, k: int, each: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(each)
    n = games * each
    i = torch.randint(0, k, (n,), generator=generator)
    j = (i + torch.randint(1, k, (n,), generator=generator)) % k
    outcome = torch.randint(0, 3, (n,), generator=generator).double() / 2
    game = torch.arange(games).repeat_interleave(each)  # a table in the order of its prompts
    return i, j, outcome, game


def measure_aggregate(games: int, k: int, each: int, turns: int = 7) -> dict:
    import evalica

    i, j, outcome, game = random_comparisons(games, k, each)
    words = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    tables = []
    for g in range(50):
        rows = game == g
        wins = [words[o] for o in outcome[rows].tolist()]
        tables.append((i[rows].tolist(), j[rows].tolist(), wins))

    def ours():
        return aggregate(i, j, outcome, game=game, num_games=games, size=k, impl="native")

    def theirs():
        return [evalica.average_win_rate(*table) for table in tables]

    rates = ours().win_rate
    for g, result in enumerate(theirs()):
        scores = result.scores
        assert np.allclose(rates[g][list(scores.index)], scores.to_numpy(), atol=1e-12)
    seconds = interleaved({"native": ours, "evalica": theirs}, turns)
    mine, other = seconds["native"] / games, seconds["evalica"] / len(tables)
    return {
        "us_per_game": mine * 1e6,
        "ns_per_comparison": seconds["native"] / (games * each) * 1e9,
        "evalica_us_per_game": other * 1e6,
        "times_faster_than_evalica": other / mine,
    }


def measure_linearity(k: int = 16, turns: int = 7) -> dict:
    """Seconds for N, 2N, 4N, 8N comparisons of the same 2,000 games, and N times as much each."""
    seconds = {}
    for each in (250, 500, 1000, 2000):
        i, j, outcome, game = random_comparisons(2000, k, each)

        def call(i=i, j=j, outcome=outcome, game=game):
            return aggregate(i, j, outcome, game=game, num_games=2000, size=k, impl="native")

        assert float(call().count.sum()) == 2 * 2000 * each
        seconds[2000 * each] = interleaved({"native": call}, turns)["native"]
    return {f"ns_per_comparison_of_{n}": t / n * 1e9 for n, t in seconds.items()}


def measure_others(games: int, k: int, turns: int = 5) -> dict:
    p = symmetrize(random_tables(games, k, k).double())
    seconds = interleaved({"tournament": lambda: tournament(p, impl="native")}, turns)
    return {"tournament_us_per_game": seconds["tournament"] / games * 1e6}


def measure_large_nash(k: int = 128, turns: int = 3) -> dict:
    """What the limit of the simplex method is chosen by: exactness and time at large K."""
    p = symmetrize(random_tables(4, k, k).double())
    exact = nash(p, method="simplex", impl="native")
    rough = nash(p, method="mirror", impl="native")
    assert float(exact.residual.max()) <= 1e-10
    seconds = interleaved(
        {m: (lambda m=m: nash(p, method=m, impl="native")) for m in ("simplex", "mirror")}, turns
    )
    return {
        "simplex_ms_per_game": seconds["simplex"] / 4 * 1e3,
        "simplex_residual": float(exact.residual.max()),
        "mirror_ms_per_game": seconds["mirror"] / 4 * 1e3,
        "mirror_residual": float(rough.residual.max()),
    }


def machine() -> dict:
    """Processor, versions and commit, to stand beside the figures."""
    from sppo_kernels._C import build_info

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    versions = {}
    for name in ("torch", "numpy", "evalica", "nashpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "cpu": model,
        "python": platform.python_version(),
        "versions": versions,
        "build": dict(build_info()),
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", type=int, default=100_000, help="prompts a batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    games, tenth = options.games, max(100, options.games // 10)
    report = {
        "machine": machine(),
        "games": games,
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall",
        "fused path": {f"K={k}": measure_targets(games, k) for k in (5, 16)},
        "nash": {"K=5": measure_nash(games, 5), "K=8": measure_nash(games, 8)}
        | {"K=16": measure_nash(tenth, 16), "K=32": measure_nash(tenth // 10, 32, 5)},
        "nash, K=128": measure_large_nash(),
        "bradley_terry": {
            "K=5": measure_bradley_terry(games, 5),
            "K=16": measure_bradley_terry(tenth, 16),
        },
        "aggregate": {
            "K=5, 20 comparisons": measure_aggregate(games, 5, 20),
            "K=16, 240 comparisons": measure_aggregate(tenth, 16, 240),
        },
        "aggregate, linearity": measure_linearity(),
        "tournament": {f"K={k}": measure_others(tenth, k) for k in (5, 16)},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
