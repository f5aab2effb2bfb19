"""The benchmarks' own proofs: a wrong provider is refused, ratios and files are what they say."""

import json

import pytest
import torch

from benchmarks import core, harness, providers, render
from benchmarks.harness import Refused, Result

CASE = (64, 16, 401)
CPU = torch.device("cpu")


@pytest.mark.parametrize("group", core.GROUPS)
def test_providers_pass_the_gate(group):
    for name, loss in core.losses(group, CPU).items():
        if name == "torch.compile":
            continue  # minutes of compilation; the benchmark itself gates it
        assert core.gate(name, loss, group, CASE, torch.float32, CPU) < 1e-4, name


@pytest.mark.parametrize("group", ["trainable", "logits", "forward"])
def test_a_wrong_provider_is_refused(group):
    right = providers.ours_logits if group == "logits" else providers.ours_linear

    def wrong(inputs):
        return right(inputs, "native") * 1.01

    with pytest.raises(Refused, match="wrong by"):
        core.gate("wrong", wrong, group, CASE, torch.float32, CPU)


def test_a_wrong_gradient_is_refused():
    def wrong(inputs):
        loss = providers.ours_linear(inputs, "native")
        return loss + 0.1 * (inputs.weight.sum() - inputs.weight.sum().detach())

    with pytest.raises(Refused, match="wrong by"):
        core.gate("wrong", wrong, "trainable", CASE, torch.float32, CPU)


def test_nan_is_refused():
    with pytest.raises(Refused, match="wrong by nan"):
        core.gate(
            "nan", lambda i: providers.ours_linear(i, "native") * float("nan"), "forward", CASE,
            torch.float32, CPU,
        )  # fmt: skip


def test_run_case_gives_times_and_names_what_is_missing(monkeypatch):
    def missing(inputs):
        raise ImportError("no module named peer")

    found = core.losses("trainable", CPU)
    monkeypatch.setattr(
        core, "losses", lambda group, device: {
            "sppo-kernels native": found["sppo-kernels native"], "eager": found["eager"],
            "peer": missing,
        },
    )  # fmt: skip
    results = core.run_case("trainable", CASE, torch.float32, CPU, repeats=3, memory=False)
    by_name = {r.provider: r for r in results}
    assert set(by_name) == {"sppo-kernels native", "eager", "peer", "bare GEMMs (3)"}
    assert "cannot run: ImportError: no module named peer" in by_name["peer"].note
    assert all(len(r.times) == 3 for n, r in by_name.items() if n != "peer")
    assert by_name["eager"].flops == 2 * 64 * 16 * 401 * 3
    table = render.markdown(results)
    assert "no module named peer" in table
    assert table.count("\n") == 6


def test_interleaved_takes_turns():
    order = []
    harness.interleaved({n: lambda n=n: order.append(n) for n in "ab"}, 3, CPU)
    assert "".join(order) == "ababababab"


def test_memory_of_a_known_allocation():
    peak = harness.resident_extra_peak(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < peak < 140 << 20


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "results" / "run.json"
    harness.write_json(path, [Result("g", "c", "float32", "p", [0.2, 0.1, 0.3])], {"commit": "x"})
    data = json.loads(path.read_text())
    assert data["results"][0]["median"] == 0.2
    assert data["commit"] == "x"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_environment_names_machine_versions_and_commit():
    env = harness.environment()
    assert env["machine"]["cpu"]
    assert env["versions"]["torch"] == torch.__version__
    assert env["commit"]


def test_in_place_leaves_the_inputs_of_the_others_alone():
    """Timed in turn with others, it must not hand them its gradient as their logits."""
    inputs = core.prepare("logits", providers.make_inputs("logits", *CASE, torch.float32, CPU))
    before = inputs.logits.detach().clone()
    name = "sppo-kernels native, in place"
    run = core.step(name, core.losses("logits", CPU)[name], inputs, "logits")
    run.setup()
    run()
    assert torch.equal(inputs.logits.detach(), before)
