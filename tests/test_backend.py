"""Imports, the choice of a backend, and a package without its extension."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sppo_kernels as sk
from sppo_kernels import backend

ROOT = Path(__file__).resolve().parent.parent


def python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_loads_torch_and_nothing_else():
    code = (
        "import sys, torch; before = set(sys.modules); import sppo_kernels; import json;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(python(code).stdout)
    roots = {name.split(".")[0] for name in loaded}
    heavy = {"triton", "transformers", "trl", "datasets", "peft", "pandas", "scipy", "matplotlib"}
    assert not roots & heavy
    assert "sppo_kernels._C" not in loaded


def test_without_the_extension_the_package_runs_and_says_so_once():
    code = """
import logging, torch
logging.basicConfig(format="LOG %(message)s")
import sppo_kernels as sk
z = torch.randn(2, 3, 7, requires_grad=True)
y = torch.randint(0, 7, (2, 3))
for _ in range(3):
    sk.sequence_logps(z, y).sum().backward()
h, w = torch.randn(2, 3, 4), torch.randn(7, 4, requires_grad=True)
out = sk.fused_linear_sppo_loss(h, w, y, torch.zeros(2), torch.rand(2))
out.loss.backward()
assert w.grad.isfinite().all()
try:
    sk.sequence_logps(z, y, impl="native")
except RuntimeError as error:
    print(error)
"""
    done = python(code, SPPO_KERNELS_NATIVE="0")
    assert done.stderr.count("LOG") == 1
    assert "'reference' (slower)" in done.stderr
    assert "pip install" in done.stderr
    assert "impl='native' cannot run here: SPPO_KERNELS_NATIVE=0 is set" in done.stdout


def test_auto_logs_choice_and_reason_once(caplog):
    backend._auto.cache_clear()
    z, y = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    with caplog.at_level(logging.INFO, logger="sppo_kernels"):
        sk.token_logps(z, y)
        sk.token_logps(z, y)
        sk.token_logps(z.double(), y)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert "'native'" in messages[0]
    assert "'reference'" in messages[1]
    assert "float64" in messages[1]


def test_explicit_choices():
    assert backend.resolve("reference", "cpu", torch.float64) == "reference"
    with pytest.raises(ValueError, match="impl: expected"):
        backend.resolve("fast", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="runs on the CPU"):
        backend.resolve("native", "cuda", torch.float32)


def test_triton_on_cpu_only_with_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="runs on CUDA devices"):
        backend.resolve("triton", "cpu", torch.float32)


def test_checks_that_synchronise_are_opt_in(monkeypatch):
    from sppo_kernels import checks

    class Elsewhere:
        device = torch.device("cuda")

    monkeypatch.delenv("SPPO_KERNELS_CHECK", raising=False)
    assert not checks.can_read(Elsewhere())
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    assert checks.can_read(Elsewhere())


def test_build_info():
    from sppo_kernels import _C

    info = _C.build_info()
    assert info["cpu_capability"] in ("default", "avx2", "avx512")
    assert isinstance(info["cuda"], bool)
