"""The targets of preference games, for pytest-benchmark: each fails when it is missed.

    python -m pytest benchmarks/test_bench_games.py                             small, seconds
    SPPO_KERNELS_BENCH=full python -m pytest benchmarks/test_bench_games.py     targets asserted

Results are checked in either; times only at full size. Figures for documents come from
`python -m benchmarks games --json PATH`, which shares the measuring code.
"""

import importlib.util

import pytest
import torch

from benchmarks import game_cases as bench
from benchmarks.bench_cases import FULL
from benchmarks.game_cases import times_faster
from sppo_kernels.backend import native_error
from sppo_kernels.games.solvers import nash
from sppo_kernels.games.targets import sppo_targets, symmetrize

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(
    native_error() is not None, reason=f"the compiled extension is not loaded: {native_error()}"
)
GAMES, TURNS = (100_000, 7) if FULL else (500, 2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(benchmark, cases, turns):
    """The rows of cases, their measurement itself the timed call."""
    rows = benchmark.pedantic(lambda: [r for c in cases for r in c.measure(turns)], rounds=1)
    assert not [r.note for r in rows if r.note.startswith("refused")]
    benchmark.extra_info.update({f"{r.provider}, s a {r.per}": r.best for r in rows if r.times})
    return rows


def faster(rows, provider, times):
    if FULL:
        assert times_faster(rows, provider) >= times


@pytest.mark.parametrize("k, times, limit_ns", [(5, 10, 40), (16, 4, None)])
def test_fused_path(benchmark, k, times, limit_ns):
    rows = record(benchmark, [bench.targets_case(GAMES, k)], 2 * TURNS)
    faster(rows, "sppo-kernels reference", times)
    if FULL and limit_ns is not None:
        assert rows[0].best <= limit_ns * 1e-9


@pytest.mark.parametrize("k, part, limit_us", [(5, 1, 0.5), (16, 10, 10.0)])
def test_nash(benchmark, k, part, limit_us):
    rows = record(benchmark, [bench.nash_case(GAMES // part, k)], TURNS)
    assert rows[0].error <= 1e-10
    if FULL:
        assert rows[0].best <= limit_us * 1e-6
    if k == 5 and importlib.util.find_spec("nashpy"):
        faster(rows, "nashpy", 1000)


def test_bradley_terry(benchmark):
    pytest.importorskip("evalica")
    rows = record(benchmark, [bench.bradley_terry_case(GAMES, 5)], 3)
    assert rows[0].error <= 1e-8
    faster(rows, "evalica", 20)


def test_aggregate(benchmark):
    pytest.importorskip("evalica")
    rows = record(benchmark, [bench.aggregate_case(GAMES, 5, 20)], 3)
    assert rows[0].error <= 1e-12
    faster(rows, "evalica", 20)


def test_aggregate_is_linear(benchmark):
    rows = record(benchmark, bench.linearity_cases(16, max(20, GAMES // 50)), TURNS)
    found = [r.best for r in rows]
    if FULL:
        assert max(found) <= 2 * min(found)  # over a factor of 8 in comparisons


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("what, least", [("fused", 100e6), ("nash", 20e6)])
def test_games_a_second_on_a_gpu(benchmark, what, least):
    """K = 5 on the device, by its own clock; the results equal those of the CPU first."""
    x = bench.random_tables(4_000_000, 5, 5)
    p = symmetrize(x)

    def call(x, p):
        return sppo_targets(x, logits=True) if what == "fused" else nash(p)

    there = x.cuda(), p.cuda()
    for a, b in zip(call(x[:1000], p[:1000]), call(*there), strict=True):
        assert torch.equal(a, b[:1000].cpu())
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*there)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    found = len(x) / min(times)
    benchmark.extra_info["games_per_second"] = found
    benchmark.pedantic(lambda: (call(*there), torch.cuda.synchronize()), rounds=5)
    assert found >= least
