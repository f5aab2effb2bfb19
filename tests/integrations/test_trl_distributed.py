"""SoftSPPOTrainer in two processes on the CPU: DDP and FSDP give one process's numbers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from tests.trl_two_processes import start, summary


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.trl_two_processes", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith('{"ddp"')))
    expected = summary(start(False, str(tmp_path), 4))
    for name in ("ddp", "ddp cached"):
        for key, value in expected.items():
            assert found[name][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
    assert found["fsdp"] < 1e-5
