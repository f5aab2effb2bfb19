"""The loss path with a frozen head, for pytest-benchmark, each case gated against float64."""

from benchmarks.bench_cases import bench

test_frozen = bench("frozen")
