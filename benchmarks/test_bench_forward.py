"""The loss path without gradient, for pytest-benchmark, each case gated against float64."""

import pytest

from benchmarks import bench_cases

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize(
    "group, provider, kind, prompt, dtype", bench_cases.cases("forward", "logits-forward")
)
def test_forward(benchmark, group, provider, kind, prompt, dtype):
    bench_cases.run(benchmark, group, provider, kind, prompt, dtype)
