"""How time and memory grow: one parameter varies, the others stay, an exponent is fitted.

    python -m benchmarks.sweeps --json FILE [--budget 120] [--only N V] [--peers]

Ours, the bare products and eager PyTorch (and TRL with --peers) run in turn at every point, each
gated against float64 at the point first, with few rows. Ours gets the responses packed; the others
get them padded to the longest, as a trainer without packing would hold them. On the CPU points that
the budget has no room for are left out and named. FILE.png and FILE.svg are plots on logarithmic
axes. docs/tuning.md explains FILE.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from benchmarks import game_cases
from benchmarks import providers as p
from benchmarks.core import Batch, Task, run_case
from benchmarks.harness import CPU, clock, extra_peak, thread_timer
from benchmarks.inputs import Case, lengths
from benchmarks.render import columns
from benchmarks.rows import OURS, Row, environment
from benchmarks.sweep_fit import Fit, SweepRow, fits
from benchmarks.truth import DTYPES

CPU_BASE = Case(256, 128, 16384, prompt=0.0, spread=0.0)
CUDA_BASE = CPU_BASE._replace(rows=4096, dim=2048, vocab=65536)
VALUES: dict[str, tuple[float, ...]] = {
    "K of nash": (2, 4, 8, 16, 32),
    "K of win_rates": (2, 4, 8, 16, 32),
    "N": tuple(512 << i for i in range(7)),
    "V": (32768, 65536, 131072, 262144),
    "D": tuple(512 << i for i in range(5)),
    "prompt share": (0.0, 0.3, 0.6, 0.8, 0.9),
    "length spread": (0.0, 0.5, 1.0, 1.5),
    "K": (2, 4, 8, 16),
}
# A batch of games, and what it counts: about k pivots of a k x k tableau; reads and writes.
GAMES = {
    "K of nash": (partial(game_cases.nash_case, peers=False), "flops", lambda k: 2 * k**3),
    "K of win_rates": (game_cases.win_rates_case, "bytes", lambda k: 8 * (k * k + k)),
}
FIELDS = {
    "N": "rows",
    "V": "vocab",
    "D": "dim",
    "prompt share": "prompt",
    "length spread": "spread",
}
GATE_ROWS = 32
CALLS_BESIDE = 3  # of a point: warm-ups and the memory's


@dataclass(frozen=True)
class Plan:
    """What every point of a run shares; `games` is the number of games of a batch."""

    base: Case = CPU_BASE
    dtype: str = "bfloat16"
    device: torch.device = CPU
    repeats: int = 3
    peers: bool = False
    games: int = 2000

    @property
    def providers(self) -> list[p.Provider]:
        names = {f"{OURS} {p.fast_impl(self.device)}", "eager"}
        names |= {"TRL chunked"} if self.peers else set()
        return [q for q in p.of_group("trainable") if q.name in names]


def at(sweep: str, value: float, base: Case) -> Case:
    """The base with one parameter changed. "K" keeps the rows of a response and adds responses."""
    if sweep == "K":
        each = base.rows // base.responses
        return base._replace(rows=each * int(value), responses=int(value))
    if sweep not in FIELDS:
        raise ValueError(f"sweep: expected one of {list(VALUES)}, got {sweep!r}")
    name = FIELDS[sweep]
    return base._replace(**{name: type(getattr(base, name))(value)})


def measure(sweep: str, value: float, case: Case, plan: Plan) -> list[SweepRow]:
    """Every provider at one point: gated, timed in turn, then its memory."""
    dtype = getattr(torch, plan.dtype)
    batch = Batch("trainable", case, dtype, plan.device, GATE_ROWS)
    rows = run_case(
        "trainable", Task(case, dtype=plan.dtype, repeats=plan.repeats), plan.device, batch=batch,
        found=plan.providers, timer=thread_timer(), fresh=False,
    )  # fmt: skip
    padded = batch.inputs.labels.numel()
    for row in rows:
        if row.provider == "eager":  # it computes padding and prompts too
            row.flops *= padded / batch.inputs.count
    x = {"prompt share": batch.inputs.count, "length spread": padded}.get(sweep, value)
    return [of_sweep(row, sweep, value, x) for row in rows]


def measure_games(sweep: str, k: int, plan: Plan) -> list[SweepRow]:
    """Nash equilibria or win rates of a batch of games; seconds of the whole batch."""
    make, what, counted = GAMES[sweep]
    case = make(plan.games, k, plan.device)
    case.name, case.games = f"{plan.games} games of K={k}", 1  # the times are those of the batch
    rows = case.measure(plan.repeats, plan.device, partial(extra_peak, device=plan.device))
    for row in rows:
        setattr(row, what, float(plan.games * counted(k)))
    return [of_sweep(row, sweep, k, k) for row in rows]


def of_sweep(row: Row, sweep: str, value: float, x: float) -> SweepRow:
    found = {f.name: getattr(row, f.name) for f in fields(Row)}
    return SweepRow(**found | {"group": sweep}, value=value, x=float(x))


def clock_name(device: torch.device) -> str:
    """What the seconds are of."""
    if device.type == "cuda":
        return "device events"
    return "wall" if thread_timer() is time.perf_counter else "CPU time of the thread"


def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Flop/s of a product, for the estimate of what fits the budget."""
    a, b = (torch.randn(256, 1024, dtype=dtype, device=device) for _ in range(2))
    best = min(clock(lambda: torch.mm(a, b.t()), device) for _ in range(5))
    return 2 * 256 * 1024 * 256 / best


def estimate(case: Case, flops_per_second: float, plan: Plan) -> float:
    """Seconds of a point's products alone, eager's padding among them."""
    padded = int(lengths(case).max()) * case.responses
    work = 6.0 * case.dim * case.vocab * (case.rows * len(plan.providers) + padded)
    return (plan.repeats + CALLS_BESIDE) * work / flops_per_second


def run(only: list[str], plan: Plan, budget: float | None) -> Iterator[list[SweepRow] | str]:
    """Rows of each point, and in their place a text for each that was left out."""
    begin = time.monotonic()
    speed = rate(getattr(torch, plan.dtype), plan.device)
    small = plan.base._replace(rows=plan.base.responses * 4, dim=64, vocab=512)
    measure("N", 0, small, plan)  # loads libraries and starts threads
    scale = 1.0  # how much longer a point takes than its products alone
    for number, sweep in enumerate(only):
        start = time.monotonic()
        left = math.inf if budget is None else budget - (start - begin)
        share = left / (len(only) - number)  # what is left, in equal parts
        done = 0
        for value in sorted(VALUES[sweep]):
            spent = time.monotonic() - start
            case = None if sweep in GAMES else at(sweep, value, plan.base)
            work = 0.0 if case is None else estimate(case, speed, plan)
            # An exponent takes two points, so the first two may use time of later sweeps.
            if spent + scale * work > min(left, share if done > 1 else 2 * share):
                yield f"{sweep} = {value:g}: about {scale * work:.0f} s, which the budget has not"
                continue
            if case is None:
                yield measure_games(sweep, int(value), plan)
            else:
                yield measure(sweep, value, case, plan)
                scale = max(1.0, (time.monotonic() - start - spent) / work)
            done += 1
            gc.collect()


def write(path: Path, rows: list[SweepRow], left_out: list[str], clock: str, env: dict) -> dict:
    """The whole run in one file, written whole or not at all; what it holds."""
    from sppo_kernels import files

    content = {
        "schema": 1,
        "kind": "sweeps",
        "clock": clock,
        **env,
        "rows": [r.as_dict() for r in rows],
        "fits": [asdict(f) for f in fits(rows)],
        "left_out": left_out,
    }
    files.write_json(content, path)
    return content


def text(found: list[Fit], left_out: list[str]) -> str:
    """The fits as a table, and what was left out."""
    header = ("sweep", "provider", "of", "exponent", "r2", "counted", "points")
    rows = [
        (
            f.sweep, f.provider, f.quantity,
            f"{f.exponent:.2f}" + ("" if f.stderr is None else f" ± {f.stderr:.2f}"),
            f"{f.r2:.3f}", "-" if f.expected is None else f"{f.expected:.2f}", f.points,
        )
        for f in found
    ]  # fmt: skip
    return "\n".join([columns(header, rows), *(f"left out: {line}" for line in left_out)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--base", nargs=3, type=int, metavar=("N", "D", "V"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, help="seconds; default: 120 on the CPU, else none")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--games", type=int, default=2000, help="games of a batch")
    parser.add_argument("--peers", action="store_true", help="TRL's chunked head too")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    env = environment()  # of the code that runs, whatever changes meanwhile
    base = CPU_BASE if device.type == "cpu" else CUDA_BASE
    if args.base:
        base = base._replace(**dict(zip(("rows", "dim", "vocab"), args.base, strict=True)))
    plan = Plan(base, args.dtype, device, args.repeats, args.peers, args.games)
    budget = 120.0 if args.budget is None and device.type == "cpu" else args.budget
    rows: list[SweepRow] = []
    left_out: list[str] = []
    for found in run(args.only, plan, budget):
        if isinstance(found, str):
            left_out.append(found)
            continue
        rows += found
        print(f"{found[0].group} = {found[0].value:g}", file=sys.stderr, flush=True)
    data = write(args.json, rows, left_out, clock_name(device), env)
    print(text(fits(rows), left_out))
    from benchmarks.sweep_plot import plot

    plot(data, args.json.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
