"""SPPOTrainer against TRL's DPOTrainer: tokens a second, peak memory, and our own overhead.

Minutes, since TRL's steps are: SPPO_KERNELS_BENCH=full runs it, and asserts the targets.
"""

import sys

import pytest

from benchmarks import trainer_step
from benchmarks.bench_cases import FULL

pytest.importorskip("pytest_benchmark")
pytest.importorskip("trl")
pytest.importorskip("datasets")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.skipif(not FULL, reason="minutes: SPPO_KERNELS_BENCH=full runs it")
def test_against_trl(benchmark):
    found = benchmark.pedantic(trainer_step.both, args=(trainer_step.STEPS,), rounds=1)
    ours, theirs = trainer_step.rows_of(found, trainer_step.STEPS)
    assert ours.times, ours.note
    assert theirs.times, theirs.note  # refused when the losses differ: then other steps were made
    speed = theirs.best / ours.best
    memory = ours.extra_peak / theirs.extra_peak
    outside = found["ours"]["outside"]
    benchmark.extra_info.update(found, speed=speed, memory=memory)
    print(f"\nper CPU second {speed:.1f} x; peak memory {memory:.2f} x; outside {outside:.1%}")
    assert speed >= 1.5
    assert memory <= 0.7
    assert outside <= 0.03
