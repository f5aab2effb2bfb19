"""How time and memory grow: one parameter varies, the others stay, an exponent is fitted.

    python -m benchmarks.sweeps --json FILE [--budget 120] [--only N V] [--peers]

Ours, the bare products and eager PyTorch (and TRL with --peers) run in turn at every point, each
gated against float64 at the point first. On the CPU points that the budget has no room for are left
out and named. FILE.png and FILE.svg are plots on logarithmic axes. docs/tuning.md explains FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import sweep_cases as cases
from benchmarks.harness import (
    Refused,
    clock,
    cuda_extra_peak,
    environment,
    resident_extra_peak,
)
from benchmarks.sweep_cases import Point
from benchmarks.sweep_fit import Fit, Row, fit, fits

CPU_BASE = Point(256, 128, 16384)
CUDA_BASE = Point(4096, 2048, 65536)
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
GAMES = {"K of nash": "nash", "K of win_rates": "win_rates"}
CALLS_BESIDE = 3  # of a point: warm-ups and the memory's


def at(sweep: str, value: float, base: Point) -> Point:
    """The base with one parameter changed. "K" keeps the rows of a response and adds responses."""
    if sweep == "N":
        return replace(base, rows=int(value))
    if sweep == "V":
        return replace(base, vocab=int(value))
    if sweep == "D":
        return replace(base, dim=int(value))
    if sweep == "prompt share":
        return replace(base, prompt=value)
    if sweep == "length spread":
        return replace(base, spread=value)
    if sweep == "K":
        each = base.rows // base.responses
        return replace(base, rows=each * int(value), responses=int(value))
    raise ValueError(f"sweep: expected one of {list(VALUES)}, got {sweep!r}")


def extra_peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond what was held before; on the CPU resident ones, freed memory returned first."""
    if device.type == "cuda":
        return cuda_extra_peak(run)
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a libc without it keeps freed pages
        ctypes.CDLL(None).malloc_trim(0)
    return resident_extra_peak(run)


def measure(
    sweep: str,
    value: float,
    point: Point,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    peers: bool = False,
    seed: int = 0,
) -> list[Row]:
    """Every provider at one point: gated, timed in turn, then its memory."""
    batch = cases.make(point, dtype, device, seed)
    x = {"prompt share": batch.counted, "length spread": batch.labels_padded.numel()}.get(
        sweep, value
    )
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str) -> Row:
        rows[name] = row = Row(
            sweep, value, float(x), _title(point), str(dtype)[6:], name,
            flops=cases.flops(name, batch),
        )  # fmt: skip
        return row

    for name, loss in cases.losses(device, peers).items():
        row = add(name)
        try:
            row.error = cases.gate(loss, point, dtype, device, seed + 1)
            runs[name] = cases.step(loss, batch)
        except Refused as refusal:
            row.note = f"refused: {refusal}"
        except Exception as error:  # a peer that is missing or cannot: the row says so
            row.note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    add("bare GEMMs")
    runs["bare GEMMs"] = cases.gemms(batch)
    _time(rows, runs, repeats, device)
    for name, run in runs.items():
        batch.clear()
        if rows[name].times:
            rows[name].extra_peak = extra_peak(run, device)
    return list(rows.values())


def clock_name(device: torch.device) -> str:
    """What the seconds are of; with one thread the time that others take of a core is left out."""
    if device.type == "cuda":
        return "device events"
    return "CPU time of the thread" if torch.get_num_threads() == 1 else "wall"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the clock of `clock_name`."""
    if device.type == "cuda" or torch.get_num_threads() != 1:
        return clock(run, device)
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def _time(rows: dict[str, Row], runs: dict, repeats: int, device: torch.device) -> None:
    """Times in turn; a provider that has no room on the device is taken out, with a note."""
    for name in list(runs) * 2:
        if name not in runs:
            continue
        try:
            runs[name]()
        except RuntimeError as error:  # out of memory, mostly eager
            rows[name].note = f"cannot run: {str(error).splitlines()[0][:90]}"
            del runs[name]
    gc.collect()
    for _ in range(repeats):
        for name, call in runs.items():
            rows[name].times.append(seconds(call, device))


def measure_games(sweep: str, k: int, games: int, device: torch.device, repeats: int) -> list[Row]:
    """Nash equilibria or win rates of a batch of games; seconds of the whole batch."""
    name = GAMES[sweep]
    batch = cases.random_games(games, k, seed=k).to(device)
    row = Row(sweep, k, float(k), f"{games} games of K={k}", "float64", "sppo-kernels native")
    if name == "win_rates":
        row.bytes = float(games * (k * k + k) * 8)
    else:
        row.flops = float(games * 2 * k**3)  # about k pivots of a k x k tableau
    try:
        row.error = cases.game_gate(name, batch[: min(games, 256)], "native")
    except Refused as refusal:
        row.note = f"refused: {refusal}"
        return [row]
    run = cases.game_step(name, batch, "native")
    _time({row.provider: row}, {row.provider: run}, repeats, device)
    row.extra_peak = extra_peak(run, device)
    return [row]


def _title(p: Point) -> str:
    title = f"N={p.rows} D={p.dim} V={p.vocab} responses={p.responses}"
    return title + f" prompt={p.prompt:g} spread={p.spread:g}"


def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Flop/s of a product, for the estimate of what fits the budget."""
    a, b = (torch.randn(256, 1024, dtype=dtype, device=device) for _ in range(2))
    best = min(clock(lambda: torch.mm(a, b.t()), device) for _ in range(5))
    return 2 * 256 * 1024 * 256 / best


def estimate(point: Point, flops_per_second: float, repeats: int, providers: int) -> float:
    """Seconds of a point's products alone, eager's padding among them."""
    padded = max(cases.lengths(point)) * point.responses
    work = 6.0 * point.dim * point.vocab * (point.rows * providers + padded)
    return (repeats + CALLS_BESIDE) * work / flops_per_second


def run(
    only: list[str],
    base: Point,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    budget: float | None,
    peers: bool = False,
    games: int = 2000,
) -> Iterator[list[Row] | str]:
    """Rows of each point, and in their place a text for each that was left out."""
    begin = time.monotonic()
    speed = rate(dtype, device)
    small = Point(base.responses * 4, 64, 512)  # loads libraries and starts threads
    measure("N", 0, small, dtype, device, 1, peers)
    scale = 1.0  # how much longer a point takes than its products alone
    for number, sweep in enumerate(only):
        start = time.monotonic()
        left = math.inf if budget is None else budget - (start - begin)
        share = left / (len(only) - number)  # what is left, in equal parts
        done = 0
        for value in sorted(VALUES[sweep]):
            spent = time.monotonic() - start
            game = sweep in GAMES
            point = None if game else at(sweep, value, base)
            work = 0.0 if game else estimate(point, speed, repeats, 2 + peers)
            # An exponent takes two points, so the first two may use time of later sweeps.
            if spent + scale * work > min(left, share if done > 1 else 2 * share):
                yield f"{sweep} = {value:g}: about {scale * work:.0f} s, which the budget has not"
                continue
            if game:
                yield measure_games(sweep, int(value), games, device, repeats)
            else:
                yield measure(sweep, value, point, dtype, device, repeats, peers)
                scale = max(1.0, (time.monotonic() - start - spent) / work)
            done += 1
            gc.collect()


def write(path: Path, rows: list[Row], left_out: list[str], clock: str, env: dict) -> None:
    """The whole run in one file, written whole or not at all."""
    content = {
        "schema": 1,
        "kind": "sweeps",
        "clock": clock,
        **env,
        "rows": [asdict(r) for r in rows],
        "fits": [asdict(f) for f in fits(rows)],
        "left_out": left_out,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def text(found: list[Fit], left_out: list[str]) -> str:
    """The fits as a table, and what was left out."""
    lines = [f"{'sweep':16}{'provider':22}{'of':12}{'exponent':>16}{'r2':>7}{'counted':>9}  points"]
    for f in found:
        error = "" if f.stderr is None else f" ± {f.stderr:.2f}"
        exponent = f"{f.exponent:.2f}{error}"
        expected = "-" if f.expected is None else f"{f.expected:.2f}"
        lines.append(
            f"{f.sweep:16}{f.provider:22}{f.quantity:12}{exponent:>16}{f.r2:7.3f}"
            f"{expected:>9}  {f.points}"
        )
    return "\n".join([*lines, *(f"left out: {line}" for line in left_out)])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--base", nargs=3, type=int, metavar=("N", "D", "V"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, help="seconds; default: 120 on the CPU, else none")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--games", type=int, default=2000, help="games of a batch")
    parser.add_argument("--peers", action="store_true", help="TRL's chunked head too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    env = environment()  # of the code that runs, whatever changes meanwhile
    base = CPU_BASE if device.type == "cpu" else CUDA_BASE
    base = Point(*args.base) if args.base else base
    budget = 120.0 if args.budget is None and device.type == "cpu" else args.budget
    rows: list[Row] = []
    left_out: list[str] = []
    for found in run(
        args.only, base, getattr(torch, args.dtype), device, args.repeats, budget, args.peers,
        args.games,
    ):  # fmt: skip
        if isinstance(found, str):
            left_out.append(found)
            continue
        rows += found
        print(f"{found[0].sweep} = {found[0].value:g}", file=sys.stderr, flush=True)
    write(args.json, rows, left_out, clock_name(device), env)
    print(text(fits(rows), left_out))
    from benchmarks.sweep_plot import plot

    plot(json.loads(args.json.read_text(encoding="utf-8")), args.json.with_suffix(""))
    return 0


__all__ = ["Fit", "Point", "Row", "fit", "fits", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
