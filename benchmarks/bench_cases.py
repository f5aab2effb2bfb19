"""What the pytest-benchmark suites of the loss path share: small shapes, or those of a real run.

    python -m pytest benchmarks/test_bench_linear.py                       small, seconds
    SPPO_KERNELS_BENCH=full python -m pytest benchmarks/test_bench_linear.py

Every case is gated against float64 on all its rows before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import core
from benchmarks import providers as p
from benchmarks.harness import Refused
from benchmarks.inputs import Case, clear, prepare

FULL = os.environ.get("SPPO_KERNELS_BENCH") == "full"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = ((8192, 4096, 128256) if CUDA else (2048, 1024, 50304)) if FULL else (256, 64, 2003)
DTYPES = ("bfloat16", "float32")
_batches: dict[tuple, core.Batch] = {}


def cases(*groups: str) -> Iterator:
    """(group, provider, case, dtype): every provider once, ours on every kind of input."""
    for group in groups:
        for q in p.of_group(group):
            for kind, prompt in (("zipf", 0.25), ("zipf", 0.0), ("flat", 0.25)):
                ours = q.name.startswith("sppo-kernels")
                first = (kind, prompt) == ("zipf", 0.25)
                if not (ours or first) or (q.compiles and not FULL):
                    continue  # compiling takes longer than all the rest
                for dtype in DTYPES if ours and first else DTYPES[:1]:
                    name = f"{group}-{q.name}-{kind}-{prompt:g}-{dtype}".replace(" ", "_")
                    yield pytest.param(group, q, Case(*SHAPE, kind, prompt), dtype, id=name)


def bench(*groups: str) -> Callable:
    """The test of some groups: every provider gated, then timed with pytest-benchmark."""
    pytest.importorskip("pytest_benchmark")

    @pytest.mark.parametrize("group, q, case, dtype", [*cases(*groups)])
    def test(benchmark, group, q, case, dtype):
        run(benchmark, group, q, case, dtype)

    return test


def run(benchmark, group: str, q: p.Provider, case: Case, dtype: str) -> None:
    reason = q.why_not(case, getattr(torch, dtype), DEVICE)
    if reason is not None:
        pytest.skip(f"{q.name}: {reason}")
    key = (core.kind_of(group), case, dtype)
    if key not in _batches:
        _batches.clear()  # one batch at a time
        _batches[key] = core.Batch(group, case, getattr(torch, dtype), DEVICE)
    batch = _batches[key]
    inputs = prepare(group, batch.inputs)
    step = core.step(q, inputs, group)
    try:
        error = batch.gate(q, step, group)
    except Refused as refusal:
        pytest.fail(f"{q.name}: {refusal}")

    def call() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    flops, moved = p.counted(group, inputs)
    benchmark.group = f"{group} {case.title(group)} {dtype} {case.inputs} {case.prompt:g}"
    benchmark.extra_info.update(
        provider=q.name, inputs=batch.what, error=error, flops=flops, bytes=moved
    )
    benchmark.pedantic(call, setup=step.setup, rounds=5, warmup_rounds=1)
    clear(inputs)
