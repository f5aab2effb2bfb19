"""The loss path from logits, for pytest-benchmark, each case gated against float64."""

from benchmarks.bench_cases import bench

test_logits = bench("logits")
