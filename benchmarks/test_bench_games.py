"""The targets of preference games, for pytest-benchmark: each fails when it is missed.

Run with `python -m pytest benchmarks/test_bench_games.py`. Figures for documents come from
`python -m benchmarks.games --json PATH`, which shares the measuring code.
"""

import pytest
import torch

from benchmarks import games as bench
from sppo_kernels._backend import native_error
from sppo_kernels.games import nash
from sppo_kernels.preference import sppo_targets, symmetrize

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(
    native_error() is not None, reason=f"the compiled extension is not loaded: {native_error()}"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("k, times, limit_ns", [(5, 10, 40), (16, 4, None)])
def test_fused_path(benchmark, k, times, limit_ns):
    found = bench.measure_targets(100_000, k)  # checks the results before it times them
    benchmark.extra_info.update(found)
    x = bench.random_tables(100_000, k, k)
    benchmark.pedantic(lambda: sppo_targets(x, logits=True, impl="native"), rounds=5)
    assert found["times_faster_than_reference"] >= times
    if limit_ns is not None:
        assert found["ns_per_prompt"] <= limit_ns


@pytest.mark.parametrize("k, games, limit_us", [(5, 100_000, 0.5), (16, 10_000, 10.0)])
def test_nash(benchmark, k, games, limit_us):
    pytest.importorskip("nashpy")
    found = bench.measure_nash(games, k)
    benchmark.extra_info.update(found)
    p = symmetrize(bench.random_tables(games, k, k).double())
    benchmark.pedantic(lambda: nash(p, impl="native"), rounds=3)
    assert found["us_per_game"] <= limit_us
    assert found["largest_exploitability"] <= 1e-10
    if k == 5:
        assert found["times_faster_than_nashpy"] >= 1000


def test_bradley_terry(benchmark):
    pytest.importorskip("evalica")
    found = benchmark.pedantic(lambda: bench.measure_bradley_terry(100_000, 5, 3), rounds=1)
    benchmark.extra_info.update(found)
    assert found["times_faster_than_evalica"] >= 20


def test_aggregate(benchmark):
    pytest.importorskip("evalica")
    found = benchmark.pedantic(lambda: bench.measure_aggregate(100_000, 5, 20, 3), rounds=1)
    benchmark.extra_info.update(found)
    assert found["times_faster_than_evalica"] >= 20


def test_aggregate_is_linear(benchmark):
    found = benchmark.pedantic(bench.measure_linearity, rounds=1)
    benchmark.extra_info.update(found)
    assert max(found.values()) <= 2 * min(found.values())  # over a factor of 8 in comparisons


@pytest.mark.gpu
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
