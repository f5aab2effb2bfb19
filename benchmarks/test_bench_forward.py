"""The loss path without gradient, for pytest-benchmark, each case gated against float64."""

from benchmarks.bench_cases import bench

test_forward = bench("forward", "logits-forward")
