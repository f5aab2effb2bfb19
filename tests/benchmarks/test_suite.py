"""The suite: plans within a budget, jobs that hang or fail, and the run on a GPU."""

import importlib.util
import io
import json
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu, suite
from benchmarks.core import Task
from benchmarks.harness import SPENT
from benchmarks.rows import Row, read_json
from tests.benchmarks.test_results import ENV, sample, validate


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("budget", [100, 300, 600])
@pytest.mark.parametrize("plan", [suite.cpu_plan(), suite.cuda_plan()], ids=["cpu", "cuda"])
def test_a_plan_stays_within_its_budget(plan, budget):
    clock, given, kept = Clock(), [], []

    def execute(job, seconds):
        given.append((job, seconds))
        clock.now += seconds  # a device so slow that every job takes all it may
        return [Row(g, job.name(g), job.dtype, "eager", [1.0]) for g in job.groups]

    rows = suite.run_plan(plan, budget, execute, clock=clock, after=lambda r: kept.append(len(r)))
    assert clock.now - 100 <= budget + 1e-6
    assert given[0][0] is plan[0]
    assert [job for job, _ in given] == plan[: len(given)]
    assert all(seconds <= job.share * budget for job, seconds in given)
    assert len(rows) == sum(len(job.groups) for job in plan)
    late = [r for r in rows if not r.times]
    assert {r.note for r in late} <= {SPENT}
    assert len(late) == sum(len(job.groups) for job in plan[len(given) :])
    assert len(kept) == len(plan)


def test_a_fast_device_gets_the_whole_plan():
    clock = Clock()

    def execute(job, seconds):
        clock.now += 1
        return []

    rows = suite.run_plan(suite.cuda_plan(), 480, execute, clock=clock)
    assert rows == []


def test_plans_hold_the_shapes_that_count(tmp_path):
    shapes = [j.name(j.groups[0]) for j in suite.cuda_plan()]
    assert shapes[0] == "N=8192 V=128256 D=4096"
    for title in ("N=8192 V=151936 D=896", "N=4096 V=256000 D=3584 softcap=30",
                  "N=16384 V=128256 D=2048"):  # fmt: skip
        assert title in shapes
    groups = {g for j in suite.cpu_plan() for g in j.groups}
    assert groups == set(suite.ALL_GROUPS)
    for job in (*suite.cpu_plan(), *suite.cuda_plan()):
        if job.task:  # a process understands what it is given
            assert Task.parse(job.command(tmp_path, 1.0)[-1]) == job.task
    cut = suite.select(suite.cpu_plan(), ["forward"], ["bfloat16"])
    assert {j.groups for j in cut} == {("forward",)}
    assert not any("trainable" in j.task.text() for j in cut)
    assert sum(j.share for j in cut) == pytest.approx(1)  # nothing else needs the time
    assert suite.select(suite.cpu_plan(), [], []) == suite.cpu_plan()


def test_run_measures_and_writes_everything(tmp_path, capsys):
    """The whole way on a tiny case: processes, gate, memory, file, table, plots."""
    status = command.main(
        ["run", "--case", "64", "16", "401", "--groups", "logits-forward", "--providers", "native",
         "eager", "--prompt-share", "0", "--budget", "2000", "--out", str(tmp_path)]
    )  # fmt: skip
    assert status == 0, (tmp_path / "log.txt").read_text()
    data = json.loads((tmp_path / "results.json").read_text())
    validate(data)
    rows, _ = read_json(tmp_path / "results.json")
    ours = next(r for r in rows if r.provider == "sppo-kernels native")
    assert ours.times
    assert ours.error < 1e-2
    assert ours.inputs.startswith("zipf, all 64 rows count; mean log p of a label -")
    assert sys.platform != "linux" or all(r.extra_peak is not None for r in rows if r.times)
    assert "sppo-kernels native" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ratios.svg").exists() == (
        importlib.util.find_spec("matplotlib") is not None
    )
    assert "written:" in capsys.readouterr().out


@pytest.mark.parametrize("code, seconds, note", [
    ("import time; time.sleep(600)", 2.0, SPENT),
    ("raise SystemExit(3)", 600.0, "failed with status 3"),  # a busy machine starts it late
])  # fmt: skip
def test_a_job_that_hangs_or_fails_becomes_rows_that_say_so(code, seconds, note, monkeypatch):
    job = suite.Job(1.0, Task(suite.Case(64, 8, 9), ("trainable", "frozen")))
    monkeypatch.setattr(suite.Job, "command", lambda *_: [sys.executable, "-c", code])
    log = open("/dev/null", "w")  # noqa: SIM115
    began = time.monotonic()
    rows = suite.in_process(job, seconds, log)
    log.close()
    assert time.monotonic() - began < 300  # half of the sleep: it was not waited for
    assert [r.group for r in rows] == ["trainable", "frozen"]
    assert all(note in r.note for r in rows)


def gpu_run(monkeypatch, out, rows, takes, measuring=None):
    """The run on a GPU with its commands and measurements replaced: passed, text, commands, time.

    `takes` gives a command's status and seconds from what it may take; `measuring` are seconds,
    all that are given without.
    """
    clock, commands = Clock(), []

    def call(argv, seconds):
        commands.append((argv, seconds))
        status, spent = takes(argv, seconds)
        clock.now += spent
        return status

    def run(plan, budget, out, env, log):
        assert budget <= 480 * (1 - (gpu.BUILD_SHARE + gpu.TEST_SHARE) * (measuring is None))
        clock.now += budget if measuring is None else measuring
        return rows

    monkeypatch.setattr(gpu, "run", run)
    passed, text = gpu.measure(call, suite.cuda_plan(), 480.0, out, ENV, io.StringIO(), clock)
    assert clock.now - 100 <= 480
    return passed, text, commands


def test_the_gpu_run_reports_within_its_budget_and_lines(tmp_path, monkeypatch):
    rows = sample() * 20
    rows[0].times, rows[0].note = [], "refused: wrong by 1"
    passed, text, commands = gpu_run(
        monkeypatch, tmp_path, rows,
        lambda argv, seconds: (None if "pytest" in argv else 0, seconds),  # tests do not finish
    )  # fmt: skip
    assert not passed
    assert len(text.splitlines()) <= gpu.LINES
    assert "tests marked gpu: time was up" in text
    assert "REFUSED trainable" in text
    assert commands[0][0][1:] == ["setup.py", "build_ext", "--inplace"]
    files = [a for a in commands[1][0] if a.startswith(("tests/", "benchmarks/"))]
    assert "tests/logps/test_triton_gpu.py" in files
    assert "benchmarks/test_bench_games.py" in files


def test_time_left_on_a_gpu_tunes_within_the_budget(tmp_path, monkeypatch):
    passed, text, commands = gpu_run(monkeypatch, tmp_path, sample(), lambda *_: (0, 20), 300)
    assert passed and "tuned configurations: ok" in text
    argv, seconds = commands[-1]
    assert argv[1:4] == ["-m", "sppo_kernels", "tune"]
    assert seconds == 480 - gpu.RESERVE - (300 + 2 * 20)
    assert float(argv[argv.index("--budget") + 1]) < seconds


def test_the_gpu_run_refuses_a_machine_without_one(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
