"""Every Triton kernel compiles for three generations of GPUs, as wide and as small as it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import MAX_SHARED, TARGETS, cases

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """From a process of its own: this one may interpret Triton instead of compiling it."""
    found = tmp_path_factory.mktemp("aot") / "kernels.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--triton-only", "--json", found],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text())


def _failing(reports, wrong):
    return [(r["case"], r["target"]) for r in reports if wrong(r)]


def test_every_kernel_compiles_for_every_target(reports):
    expected = {(case.label, target) for case in cases() for target in TARGETS}
    assert {(r["case"], r["target"]) for r in reports} == expected


def test_every_kernel_of_the_package_is_covered():
    """A kernel that is launched anywhere and not in `cases` would go unchecked."""
    folder = ROOT / "sppo_kernels" / "logps" / "triton"
    launched = set()
    for path in folder.glob("*.py"):
        for line in path.read_text().splitlines():
            name, bracket, _ = line.strip().partition("_kernel[")
            if bracket:
                launched.add(name + "_kernel")
    assert launched and launched == {case.kernel for case in cases()}


def test_nothing_spills(reports):
    assert not _failing(reports, lambda r: r["stack"] or r["local_ops"])


def test_vocabulary_is_read_and_written_16_bytes_at_a_time(reports):
    """With rows of whole vectors, and with rows that start anywhere."""
    sweeping = [r for r in reports if r["sweeps"]]
    assert sweeping and not _failing(sweeping, lambda r: r["loads_128"] == 0)
    writing = [r for r in sweeping if r["writes"]]
    assert writing and not _failing(writing, lambda r: r["stores_128"] == 0)


def test_exponentials_are_hardware_instructions(reports):
    """One EX2 an element and sweep, and no polynomial in its place."""
    sweeping = [r for r in reports if r["sweeps"]]
    assert not _failing(sweeping, lambda r: r["ex2"] < r["block"] // (r["num_warps"] * 32))


def test_shared_memory_and_registers_fit_everywhere(reports):
    assert not _failing(reports, lambda r: r["shared"] > MAX_SHARED)
    assert not _failing(reports, lambda r: r["warps_per_sm"] < 16)


def test_the_documented_table_covers_the_kernels():
    """docs/kernels.md was written from this list of cases."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert "Nothing here was run on a GPU" in text
    missing = [c.label for c in cases() if text.count(f"| {c.label} |") < len(TARGETS)]
    assert not missing, "run python -m benchmarks.kernels --markdown docs/kernels.md"
