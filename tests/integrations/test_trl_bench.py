"""The TRL benchmark's own proofs: it refuses what is wrong, and reports what it says."""

import pytest

pytest.importorskip("datasets")
pytest.importorskip("trl")

from benchmarks import trl_step
from benchmarks.harness import Refused
from sppo_kernels.integrations.trl import function


def test_small_case_passes_the_gate_and_reports_ratios():
    results = trl_step.measure(vocab=211, pairs=1, batches=1, repeats=1)
    assert {(r.group, r.provider) for r in results} == {
        (f"trl-dpo-{what}", name) for what in ("head", "step") for name in trl_step.PROVIDERS
    }
    assert all(r.error < 1e-4 for r in results if r.provider != "trl")
    for r in results:
        r.extra_peak = 2 if r.provider == "patched" else 5
        r.times = [1.0 if r.provider == "patched" else 7.0]
    found = trl_step.ratios(results)
    assert found["trl-dpo-head: trl / patched, time"] == 7.0
    assert found["trl-dpo-step: trl, compact / patched, memory"] == 2.5


def test_a_wrong_function_is_refused(monkeypatch, tmp_path):
    """A gradient off by 1e-3 where only a trainer comes: what patch() and the probe let through."""
    trainer, batches = trl_step.build(211, 1, 1, str(tmp_path))
    right = function.FusedLogProbs.apply

    def wrong(self, hidden, *rest):
        logps, *others = right(self, hidden, *rest)
        off = 0.001 if hidden.shape[0] > 3 else 0.0
        return (logps + off * (logps - logps.detach()), *others)

    monkeypatch.setattr(function.FusedLogProbs, "apply", wrong)
    with pytest.raises(Refused, match="is wrong by"):
        trl_step.gate(trainer, batches[0], "patched")
