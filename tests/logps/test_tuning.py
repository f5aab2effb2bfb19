"""Tuned tables: what is read, what is refused, that nothing is timed unasked or changes results."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from sppo_kernels.cli import env as cli_env
from sppo_kernels.cli import main as sppo
from sppo_kernels.logps.triton import config, row_logps, tables, token_logps, tuning
from sppo_kernels.testing import relative_error
from tests.triton_tools import DEVICE, IGNORE

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA Pretend 9000"
BF16 = torch.bfloat16
ENTRY = {
    "kernel": "row", "dtype": "bfloat16", "columns": 1000, "block": 256, "warps": 1,
    "device": GPU, "triton": triton.__version__,
}  # fmt: skip


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Tensors of this machine count as those of a GPU with a table; gives the user's file."""
    monkeypatch.setenv("SPPO_KERNELS_TUNED", str(tmp_path / "mine.json"))
    monkeypatch.setattr(tables, "device_name", lambda device: None if device is None else GPU)
    monkeypatch.setattr(tables, "package_file", lambda name: tmp_path / "none.json")
    tables.forget()
    yield tmp_path / "mine.json"
    tables.forget()


def _write(path, *entries, **head):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "entries": [ENTRY | e for e in entries]} | head))
    tables.forget()


def _block(kernel, n_cols=1000):
    return config.block(kernel, BF16, n_cols, torch.device(DEVICE))


def _row_block(n_cols=1000):
    return _block("row", n_cols)


def test_an_entry_serves_its_powers_of_two_and_the_nearest_one_wins(pretend):
    _write(pretend, {}, {"columns": 600, "block": 512}, {"dtype": "float16", "block": 512})
    assert _row_block(1000) == (256, 1)
    assert _row_block(1024) == (256, 1)
    assert _row_block(650).size == 512
    assert _row_block(1025) == config.block("row", BF16, 1025), "the next power of two: the default"
    assert config.block("row", BF16, 1000) == config.block("row", BF16, 1000, None), (
        "no device, no table"
    )
    assert config.block("split", BF16, 1000, torch.device(DEVICE)) == config.block(
        "split", BF16, 1000
    )


def test_the_user_s_file_comes_before_the_package_s(pretend, monkeypatch, tmp_path):
    _write(tmp_path / "package.json", {"block": 512})
    monkeypatch.setattr(tables, "package_file", lambda name: tmp_path / "package.json")
    _write(pretend, {})
    assert _row_block() == (256, 1) and str(pretend) in tables.table(GPU).source
    monkeypatch.setenv("SPPO_KERNELS_TUNED", "0")
    tables.forget()
    assert _row_block() == config.block("row", BF16, 1000), "0 turns tables off"
    monkeypatch.delenv("SPPO_KERNELS_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tables.forget()
    assert _row_block().size == 512, "no file of the user's: the package's"
    _write(tmp_path / "cache/sppo_kernels/tuned/nvidia-pretend-9000.json", {})
    assert _row_block() == (256, 1), "the cache folder's"


@pytest.mark.parametrize(
    "other", [{"device": "NVIDIA H100"}, {"triton": "99.0.0"}], ids=["device", "triton"]
)
def test_entries_of_another_device_or_triton_are_left_out(pretend, other, caplog):
    _write(pretend, other)
    with caplog.at_level(logging.INFO, "sppo_kernels"):
        assert _row_block() == config.block("row", BF16, 1000)
    assert "another device or Triton" in caplog.text and str(pretend) in caplog.text


BAD = {
    "not JSON": "{",
    "another program's JSON": '{"model": "llama"}',
    "a later schema": '{"schema": 2, "entries": []}',
    "no list": '{"schema": 1, "entries": {}}',
    "no settings": '{"schema": 1, "entries": [3]}',
    "a field is absent": '{"schema": 1, "entries": [{"kernel": "row"}]}',
    **{
        f"{field} = {value!r}": json.dumps({"schema": 1, "entries": [ENTRY | {field: value}]})
        for field, value in (
            ("block", 100), ("block", 1 << 20), ("warps", 0), ("warps", True), ("kernel", "mm"),
            ("dtype", "float64"), ("columns", 0), ("block", "256"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_corrupt_or_foreign_file_is_refused_by_name(pretend, content, caplog):
    pretend.write_text(content)
    tables.forget()
    with caplog.at_level(logging.WARNING, "sppo_kernels"):
        assert _row_block() == config.block("row", BF16, 1000)
        assert _row_block() == config.block("row", BF16, 1000)
    assert [str(pretend) in r.message for r in caplog.records] == [True], "once, naming the file"


def test_a_file_that_was_named_and_is_not_there_is_warned_of(pretend, caplog):
    with caplog.at_level(logging.WARNING, "sppo_kernels"):
        assert _row_block() == config.block("row", BF16, 1000)
    assert str(pretend) in caplog.text


def test_the_package_s_tables_can_be_read():
    files = sorted((ROOT / "sppo_kernels/logps/triton/tuned").glob("*.json"))
    assert tables.package_file("NVIDIA H200") in files
    for path in files:
        for entry in tables.read(path):
            assert tables.slug(entry["device"]) == path.stem
            assert entry["ms"] <= entry["default_ms"], "an entry is a measurement"


def test_launches_take_the_table_s_block(pretend, monkeypatch, generator):
    """The launcher hands the kernel what the table says, and the result is that of the block."""
    z = torch.randn((3, 700), generator=generator).to(DEVICE, BF16)
    labels = torch.tensor([1, IGNORE, 699], device=DEVICE)
    want = row_logps(z, labels, None, 1.0, None, IGNORE, False)
    with config.overridden(row=config.Block(256, 1)):
        same = row_logps(z, labels, None, 1.0, None, IGNORE, False)
    _write(pretend, {})
    seen, fit = [], config.fit
    monkeypatch.setattr(config, "fit", lambda b, n, v: seen.append(fit(b, n, v)) or seen[-1])
    got = row_logps(z, labels, None, 1.0, None, IGNORE, False)
    assert seen == [(256, 1)]
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True)), "same block, same bits"
    assert relative_error(got[0], want[0]) < 1e-6, "another block: rounding"


@pytest.mark.parametrize("kernel", tables.KERNELS)
def test_candidates_pass_the_gate_and_repeat_their_bits(kernel, generator):
    """As `sppo tune` gates them: whole and ragged rows, several tiles or slices."""
    torch.manual_seed(generator.initial_seed())
    vocab, device = 2501, torch.device(DEVICE)
    blocks = tuning.candidates(kernel, BF16, vocab)
    assert len(blocks) == len(set(blocks)) >= 4
    assert blocks[0] == config.block(kernel, BF16, vocab)
    for block in (blocks[0], min(blocks), max(blocks)):
        tuning.gate(kernel, block, BF16, vocab, device)
    problem = tuning.Problem.random(2, vocab, BF16, device)
    first, second = (
        tuning.call(kernel, min(blocks), tuning.Problem(problem.logits.clone(), problem.labels))()
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_the_gate_refuses_a_wrong_kernel(monkeypatch):
    def wrong(logits, labels, ignore_index):
        logp, norm = token_logps(logits, labels, ignore_index)
        return logp * (1 + 1e-5), norm

    monkeypatch.setattr(tuning, "token_logps", wrong)
    with pytest.raises(AssertionError, match=r"split .*log p"):
        tuning.gate("split", config.Block(256, 1), torch.float32, 300, torch.device(DEVICE))


def _search(clock, refused, left_out, seconds=600.0, shapes=((8, 300),)):
    return list(
        tuning.search(
            *(shapes, [BF16], torch.device(DEVICE), clock, time.monotonic() + seconds),
            *(refused, left_out),
        )
    )


def test_search_keeps_the_fastest_and_the_table_is_used(pretend, monkeypatch):
    few = {"split": [(512, 2), (256, 1)], "backward": [(512, 2), (64, 1)], "row": [(512, 2)]}
    monkeypatch.setattr(
        tuning, "candidates", lambda kernel, dtype, n: [config.Block(*b) for b in few[kernel]]
    )
    refused, gate = [], tuning.gate

    def strict(kernel, block, *rest):
        if block.size == 64:
            raise AssertionError("backward (64, 1): wrong")
        gate(kernel, block, *rest)

    monkeypatch.setattr(tuning, "gate", strict)

    def clock(functions):
        for function in functions.values():
            function()
        return {block: 1.0 + block.size * 1e-3 for block in functions}  # the smaller the faster

    found = _search(clock, refused, [])
    assert [(e["kernel"], e["block"]) for e in found] == [
        ("split", 256), ("backward", 512), ("row", 512),
    ]  # fmt: skip
    assert refused == ["backward (64, 1): wrong"]
    kept = [ENTRY | {"columns": 50}, ENTRY | {"kernel": "split", "columns": 300, "block": 32}]
    tuning.write(pretend, kept, [e | {"device": GPU, "triton": triton.__version__} for e in found])
    tables.forget()
    assert config.block("split", BF16, 300, torch.device(DEVICE)) == (256, 1)
    entries = json.loads(pretend.read_text())["entries"]
    assert [e["columns"] for e in entries] == [50, 300, 300, 300], "the old split is replaced"
    assert [p.name for p in pretend.parent.glob("mine*")] == ["mine.json"], "written whole"


def test_a_gain_within_the_margin_keeps_the_default(monkeypatch):
    blocks = [config.Block(512, 2), config.Block(256, 1)]
    monkeypatch.setattr(tuning, "candidates", lambda *a: blocks)
    monkeypatch.setattr(tuning, "gate", lambda *a: None)
    found = _search(lambda f: dict(zip(f, (1.0, 0.995), strict=True)), [], [])
    assert {e["block"] for e in found} == {512}


def test_no_time_is_said():
    left_out = []
    assert _search(None, [], left_out, seconds=-1.0) == []
    assert len(left_out) == len(tables.KERNELS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here tuning would run")
def test_without_a_gpu_tuning_refuses_by_name(capsys):
    assert sppo(["tune", "--shapes", "8x100"]) == 1
    assert "expected a CUDA device" in capsys.readouterr().err
    assert sppo(["tune", "--budget", "-1"]) == 1
    assert "--budget" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sppo(["tune", "--shapes", "8by100"])
    assert "ROWSxVOCABULARY" in capsys.readouterr().err


def test_nothing_is_timed_unasked():
    """Launches of every tuned kernel neither import the tuner nor touch a clock of the device."""
    code = """
import sys, time, torch
import sppo_kernels as sk
from sppo_kernels.logps.triton import config
def no(*args, **kwargs): raise AssertionError("a launch was timed")
torch.cuda.Event = no
z = torch.randn(2, 3, 40, requires_grad=True)
y = torch.randint(0, 40, (2, 3))
h, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
one = torch.ones(2)
sk.fused_sppo_loss(z, y, one, one / 2, impl="triton").loss.backward()
sk.fused_linear_sppo_loss(h, w, y, one, one / 2, impl="triton").loss.backward()
assert z.grad is not None and w.grad is not None
print(sorted(m for m in sys.modules if "tuning" in m or "autotuner" in m))
"""
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.strip()
    assert "sppo_kernels" not in loaded, loaded
    sources = (ROOT / "sppo_kernels").rglob("*.py")
    assert not [p.name for p in sources if "triton.autotune" in p.read_text(encoding="utf-8")]


def test_env_says_which_table():
    found = dict(cli_env.lines())
    assert found["Triton block table"] == tables.in_use()
    if not torch.cuda.is_available():
        assert found["Triton block table"] == "defaults (no CUDA device)"


@pytest.mark.gpu
def test_tune_on_this_gpu(tmp_path, monkeypatch):
    out = tmp_path / "tuned.json"
    outcome = tuning.tune([(1024, 32000)], [BF16], out, budget=60.0)
    assert outcome.path == out and len(tables.read(out)) == len(outcome.entries) >= 1
    for entry in outcome.entries:
        assert math.isfinite(entry["ms"]) and 0 < entry["ms"] <= entry["default_ms"]
    monkeypatch.setenv("SPPO_KERNELS_TUNED", str(out))
    tables.forget()
    assert str(out) in tables.in_use()
    tables.forget()
