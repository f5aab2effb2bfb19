"""The benchmarks' gate and measurements: wrong providers are refused, figures are what they say."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import core, harness, memory, peers, providers
from benchmarks.core import Batch, Task
from benchmarks.harness import CPU, SPENT, Refused
from benchmarks.inputs import IGNORED, Case, make_inputs, prepare
from benchmarks.providers import Provider
from benchmarks.rows import GROUPS, ROOT, Row
from benchmarks.truth import Truth
from sppo_kernels.testing import relative_error

CASE = Case(64, 16, 401)
TASK = Task(CASE, dtype="float32", repeats=1, memory=False)


def quick(group):
    """Providers that run here at once: no compiling, no Triton interpreter."""
    found = [q for q in providers.of_group(group) if not q.compiles and "triton" not in q.name]
    return [q for q in found if q.why_not(CASE, torch.float32, CPU) is None]


def named(group, name):
    return next(q for q in quick(group) if q.name == name)


def gate(q, group, case=CASE, gate_rows=None):
    """The error of a provider, or of a loss in a provider's place, on a batch of its own."""
    q = q if isinstance(q, Provider) else Provider("wrong", q)
    batch = Batch(group, case, torch.float32, CPU, gate_rows)
    return batch.gate(q, core.step(q, prepare(group, batch.inputs), group), group)


@pytest.mark.parametrize("group", GROUPS)
def test_providers_pass_the_gate(group):
    found = quick(group)
    if group in providers.LINEAR and importlib.util.find_spec("liger_kernel"):
        liger = next(q for q in providers.of_group(group) if q.name.startswith("Liger"))
        loss = functools.partial(peers.liger_linear, compiled=False)
        found.append(dataclasses.replace(liger, loss=loss))
    assert {"sppo-kernels native", "sppo-kernels reference", "eager"} <= {q.name for q in found}
    for q in found:
        assert gate(q, group) < 1e-4, q.name


def test_the_table_names_every_peer():
    names = " ".join(q.name for q in providers.table())
    for peer in ("TRL", "Liger", "Apple CCE", "F.linear_cross_entropy", "QuACK", "released SPPO"):
        assert peer in names
    for group in GROUPS:
        names = [q.name for q in providers.of_group(group)]
        assert len(names) == len(set(names))


def test_peers_that_are_not_installed_become_rows_that_say_so(monkeypatch):
    """As on a machine with torch alone: no peer is imported, and ours and eager still run."""
    find = importlib.util.find_spec
    gone = ("trl", "liger_kernel", "cut_cross_entropy", "quack")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a)
    )
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    found = [q for q in providers.of_group("trainable") if q.name != "torch.compile"]
    rows = core.run_case("trainable", TASK, found=found)
    notes = {r.provider: r.note for r in rows if not r.times}
    for name, package in (("TRL chunked", "trl"), ("Liger sppo_hard", "liger_kernel"),
                          ("Apple CCE", "cut_cross_entropy")):  # fmt: skip
        assert notes[name] == f"cannot run: {package} is not installed"
    assert notes["F.linear_cross_entropy"].endswith("does not have it")
    assert {"sppo-kernels native", "eager"} <= {r.provider for r in rows if r.times}


def test_softcap_reaches_the_providers_that_have_it():
    case = CASE._replace(softcap=5.0)
    for q in quick("trainable"):
        if q.why_not(case, torch.float32, CPU) is not None:
            assert "softcap" in q.why_not(case, torch.float32, CPU)
            continue
        assert gate(q, "trainable", case) < 1e-4, q.name
        with pytest.raises(Refused, match="wrong by"):  # the cap matters to what the gate sees
            batch = Batch("trainable", case, torch.float32, CPU)
            batch.inputs.softcap = None
            batch.gate(q, core.step(q, batch.inputs, "trainable"), "trainable")


@pytest.mark.parametrize("group", ["trainable", "logits", "forward"])
def test_a_wrong_provider_is_refused(group):
    right = providers.ours_logits if group == "logits" else providers.ours_linear

    def wrong(inputs):
        return right(inputs, "native") * 1.01

    with pytest.raises(Refused, match="wrong by"):
        gate(wrong, group)


def test_wrong_gradients_are_refused():
    def wrong_weight(inputs):
        loss = providers.ours_linear(inputs, "native")
        return loss + 0.1 * (inputs.weight.sum() - inputs.weight.sum().detach())

    def wrong_outside(inputs):  # rows that do not count must get zero
        loss = providers.ours_linear(inputs, "native")
        extra = inputs.hidden[inputs.labels == IGNORED].sum()
        return loss + 1e3 * (extra - extra.detach())

    def last_chunk_forgotten(inputs):  # as code would that loses what lies beyond its first chunk
        labels = inputs.host_labels.clone()
        labels.view(-1)[-20:] = IGNORED
        return providers.ours_linear(dataclasses.replace(inputs, host_labels=labels), "native")

    for wrong in (wrong_weight, wrong_outside, last_chunk_forgotten):
        with pytest.raises(Refused, match="wrong by"):
            gate(wrong, "trainable")


def test_nan_and_missing_gradients_are_refused():
    with pytest.raises(Refused, match="wrong by nan"):
        gate(lambda i: providers.ours_linear(i, "native") * float("nan"), "forward")

    def no_weight(inputs):
        inputs = dataclasses.replace(inputs, weight=inputs.weight.detach())
        return providers.ours_linear(inputs, "native")

    with pytest.raises(Refused, match="a gradient is missing"):
        gate(no_weight, "trainable")


@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("task", ["sppo", "on-policy", "hard", "cross-entropy"])
def test_truth_is_that_of_float64_autograd(kind, task, seed):
    case = CASE._replace(softcap=6.0 if kind == "linear" else None)
    inputs = make_inputs(kind, case, torch.float64, CPU, seed=seed)
    z = inputs.logits if kind == "logits" else providers.head(inputs)
    labels = inputs.labels
    logp = z.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    logps = (logp * (labels != IGNORED)).sum(-1)
    ref, win = inputs.ref.double(), inputs.win.double()
    if task == "on-policy":
        ref = logps.detach()
    if task == "hard":
        ref, win = torch.zeros(8), torch.tensor([1.0] * 4 + [0.0] * 4)
    loss = (logps - ref - 1000 * (win - 0.5)).square().mean()
    if task == "cross-entropy":
        loss = -logps.sum()
    loss.backward()
    truth = Truth(inputs)
    assert truth.error(loss, inputs, task) < 1e-12
    inputs.leaves()[-1].grad.view(-1)[7] += inputs.leaves()[-1].grad.norm()
    assert truth.error(loss, inputs, task) > 0.5


def test_inputs_look_like_life():
    case = Case(512, 64, 3001)
    for kind, nats in (("zipf", (0.5, 5.0)), ("flat", (7.0, 9.0))):
        inputs = make_inputs("linear", case._replace(inputs=kind), torch.float32, CPU)
        counts = (inputs.labels != IGNORED).sum(-1)
        assert (inputs.labels[:, :16] == IGNORED).all()  # a quarter is prompt
        assert counts.max() == 48
        assert counts.min() >= 24
        assert len(counts.unique()) > 1
        assert nats[0] < -Truth(inputs).mean_logp < nats[1]
        assert torch.equal(
            inputs.hidden,
            make_inputs("linear", case._replace(inputs=kind), torch.float32, CPU).hidden,
        )
    dense = make_inputs("logits", case._replace(prompt=0.0), torch.float32, CPU)
    assert dense.count == 512
    probability = dense.logits.softmax(-1).mean((0, 1)).sort(descending=True).values
    assert probability[:100].sum() > 0.5  # peaked


def test_run_case_gives_times_and_names_what_is_missing():
    def missing(inputs):
        raise ImportError("no module named peer")

    def wrong(inputs):
        return 1.1 * providers.eager(inputs)

    native, eager = named("trainable", "sppo-kernels native"), named("trainable", "eager")
    found = [
        native, eager, Provider("peer", missing), Provider("bad", wrong),
        Provider("never", eager.loss, why_not=lambda *_: "it is not for this"),
    ]  # fmt: skip
    rows = core.run_case("trainable", dataclasses.replace(TASK, repeats=3), found=found)
    by_name = {r.provider: r for r in rows}
    assert set(by_name) == {
        "sppo-kernels native", "eager", "peer", "bad", "never", "bare GEMMs (3)"
    }  # fmt: skip
    assert by_name["peer"].note == "cannot run: ImportError: no module named peer"
    assert by_name["never"].note == "cannot run: it is not for this"
    assert by_name["bad"].note.startswith("refused: wrong by")
    for name in ("peer", "bad", "never"):
        assert by_name[name].times == []
    for name in ("sppo-kernels native", "eager", "bare GEMMs (3)"):
        assert len(by_name[name].times) == 3
    count = int((make_inputs("linear", CASE, torch.float32, CPU).labels != IGNORED).sum())
    assert by_name["eager"].flops == 2 * count * 16 * 401 * 3


def test_a_spent_deadline_makes_rows_that_say_so():
    task = dataclasses.replace(TASK, repeats=9)
    rows = core.run_case("logits", task, deadline=0.0, found=quick("logits"))
    assert {r.note for r in rows if not r.is_ceiling} == {SPENT}
    assert len(next(r for r in rows if r.is_ceiling).times) == 2  # at least two rounds


def test_a_first_call_cannot_outlast_the_deadline(monkeypatch):
    def endless(inputs):
        time.sleep(600)

    began = time.monotonic()
    assert core.first_call_until(began + 0.2) <= began + 0.2
    # Replaced, because a busy machine may reach the call only after a short deadline.
    monkeypatch.setattr(core, "first_call_until", lambda deadline: time.monotonic() + 0.2)
    found = [Provider("endless", endless, ("forward",))]
    rows = core.run_case("forward", TASK, deadline=began + 3600, found=found)
    assert time.monotonic() - began < 300  # half of the sleep: it was not waited for
    assert "more of the time budget than it may" in rows[0].note


def test_interleaved_takes_turns():
    order = []
    calls = {n: lambda n=n: order.append(n) for n in "ab"}
    harness.interleaved(calls, 3)
    assert "".join(order) == "ababababab"
    order.clear()
    harness.interleaved(calls, {"a": 3, "b": 1}, warmups=0)
    assert "".join(order) == "abaa"


def test_memory_of_a_known_allocation():
    peak = harness.extra_peak(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < peak < 140 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_in_fresh_processes_counts_what_a_step_holds():
    """The gradient of 64 MiB of logits takes 64 MiB; in place it takes none; no name, no figure."""
    case = Case(512, 0, 32768)
    names = ["sppo-kernels native", "sppo-kernels native, in place", "copy of the logits", "nobody"]
    found, why = memory.in_fresh_processes(names, "logits", case, "float32")
    assert set(found) == set(names[:3]), why
    assert 60 << 20 < found["sppo-kernels native"] < 90 << 20
    assert found["sppo-kernels native, in place"] < 16 << 20
    assert 60 << 20 < found["copy of the logits"] < 70 << 20


def test_in_place_leaves_the_inputs_of_the_others_alone():
    """Timed in turn with others, it must not hand them its gradient as their logits."""
    inputs = prepare("logits", make_inputs("logits", CASE, torch.float32, CPU))
    before = inputs.logits.detach().clone()
    run = core.step(named("logits", "sppo-kernels native, in place"), inputs, "logits")
    run.setup()
    run()
    assert torch.equal(inputs.logits.detach(), before)
    assert run.inputs.logits.grad is not None


def test_bytes_and_flops_are_those_of_the_rows_that_count():
    inputs = prepare("logits", make_inputs("logits", CASE, torch.bfloat16, CPU))
    count = int((inputs.labels != IGNORED).sum())
    assert 0 < count < 64
    assert providers.counted("logits", inputs) == (None, (2 * count + 64) * 401 * 2)
    assert providers.counted("logits-forward", inputs) == (None, count * 401 * 2)
    assert providers.ceiling_counted("logits", inputs) == (None, 2 * 64 * 401 * 2)
    linear = make_inputs("linear", CASE, torch.bfloat16, CPU)
    assert providers.counted("frozen", linear) == (2.0 * count * 16 * 401 * 2, None)


def test_relative_error_of_the_gate_is_the_testing_modules():
    inputs = prepare("frozen", make_inputs("linear", CASE, torch.float32, CPU))
    truth = Truth(inputs)
    value, by_sequence = truth.loss("sppo")
    want = torch.zeros(64, 16, dtype=torch.float64)
    want[inputs.counted] = truth.unit_hidden * by_sequence[truth.sequence][:, None]
    got = want * (1 + 0.01 * torch.randn_like(want))
    inputs.hidden.grad = got.view_as(inputs.hidden).float()
    expected = relative_error(inputs.hidden.grad.view(64, 16), want)
    assert truth.error(value, inputs, "sppo") == pytest.approx(expected, rel=1e-6)


def test_suites_run(tmp_path):
    """A few pytest-benchmark cases of every group, so that they cannot rot."""
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "bench.json"
    # pytest-benchmark measures nothing when it believes itself inside a worker of xdist
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_I", "PYTEST_XDIST"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         f"--benchmark-json={out}", *(f"benchmarks/test_bench_{name}.py" for name in
         ("logits", "linear", "frozen", "forward", "games", "trainer")),
         "-k", "(native and zipf and bfloat16) or (eager and linear) or nash or trl"],
        cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())["benchmarks"]
    names = {b["name"].partition("[")[0] for b in found}
    assert names == {"test_logits", "test_linear", "test_frozen", "test_forward", "test_nash"}
    for b in found:
        if b["name"].startswith("test_linear"):
            assert b["extra_info"]["error"] <= 3e-2
            assert b["extra_info"]["flops"] > 0


def test_rows_without_times_are_not_measured():
    row = Row("g", "c", "float32", "p")
    assert (row.best, row.median, row.spread, row.rate) == (None,) * 4
