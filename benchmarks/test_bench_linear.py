"""The loss path with a trainable head, for pytest-benchmark, each case gated against float64."""

import pytest

from benchmarks import bench_cases

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("group, provider, kind, prompt, dtype", bench_cases.cases("trainable"))
def test_linear(benchmark, group, provider, kind, prompt, dtype):
    bench_cases.run(benchmark, group, provider, kind, prompt, dtype)
