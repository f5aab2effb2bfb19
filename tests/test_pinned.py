"""No bit of any result changed unless tests/pinned.json says so, on machines that it knows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("triton")

from tests import pinned

ROOT = Path(__file__).resolve().parent.parent


def test_values_and_gradients_are_those_recorded():
    if pinned.machine() not in json.loads(pinned.FILE.read_text()):
        pytest.skip(
            f"no hashes of this machine ({pinned.machine()}): python -m tests.pinned --write"
        )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pinned"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_digest_tells_values_shapes_and_types_apart():
    import torch

    x = torch.arange(6.0)
    others = [x + 1e-7 * x, x.view(2, 3), x.double(), x.bfloat16(), [x, x]]
    assert len({pinned.digest(v) for v in [x, *others]}) == 6
    assert pinned.digest([x, {"a": 1}]) == pinned.digest((x.clone(), {"a": 1}))
