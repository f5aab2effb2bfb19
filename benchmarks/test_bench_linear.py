"""The loss path with a trainable head, for pytest-benchmark, each case gated against float64."""

from benchmarks.bench_cases import bench

test_linear = bench("trainable")
