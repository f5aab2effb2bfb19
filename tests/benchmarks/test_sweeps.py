"""Scaling sweeps: inputs that mean the same to every provider, exponents, budget, files."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

pytest.importorskip("scipy")

from benchmarks import providers, sweeps
from benchmarks.harness import CPU
from benchmarks.inputs import IGNORED, Case, lengths, make_inputs
from benchmarks.sweep_fit import SweepRow, fit
from tests.benchmarks.test_benchmarks import gate, quick

SMALL = Case(40, 16, 211, prompt=0.3, spread=1.0, responses=4)
BASE = Case(256, 64, 1000, prompt=0.0, spread=0.0)
PLAN = sweeps.Plan(BASE, "float32", repeats=1)


@pytest.mark.parametrize("changes", [
    {}, {"spread": 1.5}, {"rows": 7, "spread": 1.5, "responses": 7},  # one row each
    {"rows": 1001, "spread": 0.5, "responses": 2},
])  # fmt: skip
def test_lengths_add_up_and_spread_as_asked(changes):
    case = BASE._replace(**{"rows": 512} | changes)
    found = lengths(case)
    assert len(found) == case.responses and found.sum() == case.rows and found.min() >= 1
    if case.spread == 0:
        assert found.max() - found.min() <= 1
    elif case.rows > 100:
        logs = found.double().log()
        normal = statistics.NormalDist()
        share = [normal.inv_cdf((i + 0.5) / case.responses) for i in range(case.responses)]
        assert logs.std(correction=0) == pytest.approx(
            case.spread * statistics.pstdev(share), rel=0.1
        )


def test_fewer_rows_than_responses_are_refused():
    for case in (BASE._replace(rows=7), Case(7, 8, 16)):
        with pytest.raises(ValueError, match="at least 8"):
            make_inputs("linear", case, torch.float32, CPU)


def test_packed_and_padded_are_the_same_rows(generator):
    inputs = make_inputs("linear", SMALL, torch.float32, CPU, generator.initial_seed())
    packed = inputs.packed()
    at = [(s, t) for s, n in enumerate(inputs.ends) for t in range(n)]
    assert packed.labels.tolist() == [int(inputs.labels[i]) for i in at]
    assert torch.equal(packed.hidden, torch.stack([inputs.hidden[i] for i in at]))
    assert packed.bounds.tolist() == [0, *inputs.ends.cumsum(0)] and len(packed.labels) == 40
    outside = torch.arange(inputs.labels.shape[1]) >= inputs.ends[:, None]
    assert outside.any() and (inputs.labels[outside] == IGNORED).all()
    assert packed.count == inputs.count and abs(1 - inputs.count / 40 - SMALL.prompt) < 0.1
    assert (packed.labels[packed.bounds[:-1]] == IGNORED).any(), "prompts come first"


@pytest.mark.parametrize("gate_rows", [None, 16])
def test_providers_pass_the_gate_packed_and_padded(gate_rows):
    for q in quick("trainable"):
        assert gate(q, "trainable", SMALL, gate_rows) < 1e-4


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_provider_is_refused_and_its_row_says_so(wrong, monkeypatch):
    right = providers.ours_linear
    monkeypatch.setattr(providers, "ours_linear", lambda i, impl: right(i, impl) * wrong)
    rows = {r.provider: r for r in sweeps.measure("N", 40, SMALL, PLAN)}
    assert rows["sppo-kernels native"].note.startswith("refused: wrong by")
    assert not rows["sppo-kernels native"].times and rows["eager"].times


def test_a_point_has_times_flops_error_and_memory():
    plan = replace(PLAN, repeats=2)
    rows = {r.provider: r for r in sweeps.measure("length spread", 1, SMALL, plan)}
    assert set(rows) == {"sppo-kernels native", "eager", "bare GEMMs (3)"}
    inputs = make_inputs("linear", SMALL, torch.float32, CPU)
    for name, row in rows.items():
        assert len(row.times) == 2 and min(row.times) > 0 and row.extra_peak is not None
        assert row.x == inputs.labels.numel(), "the spread is fitted over padded rows"
        counted = inputs.labels.numel() if name == "eager" else inputs.count
        assert row.flops == pytest.approx(6 * counted * SMALL.dim * SMALL.vocab)
        assert (row.error is None) == name.startswith("bare GEMMs")


def _rows(exponent, noise=0.0):
    return [
        SweepRow("N", "c", "float32", "p", [3 * x**exponent * (1 + noise * (-1) ** i), 1e9],
                 flops=5 * x**2, extra_peak=int(1000 * x), value=x, x=x)
        for i, x in enumerate((512.0, 1024.0, 2048.0, 4096.0))
    ]  # fmt: skip


def test_the_exponent_of_a_power_law_is_found():
    found = fit("seconds", _rows(1.7))
    assert abs(found.exponent - 1.7) < 1e-9 and found.stderr < 1e-6 and found.r2 > 1 - 1e-9
    assert abs(found.expected - 2) < 1e-9 and found.points == 4
    noisy = fit("seconds", _rows(1.0, noise=0.2))
    assert noisy.stderr > 0.01 and abs(noisy.exponent - 1.0) < 3 * noisy.stderr
    memory = fit("extra_peak", _rows(1.7))
    assert abs(memory.exponent - 1) < 1e-3 and memory.expected is None
    assert fit("seconds", _rows(1.0)[:1]) is None, "one point has no exponent"
    assert fit("seconds", _rows(1.0)[:2]).stderr is None, "two have no error"
    absent = [replace(r, times=[]) for r in _rows(1.0)]
    assert fit("seconds", absent) is None


def test_one_parameter_varies():
    assert sweeps.at("N", 512, BASE) == BASE._replace(rows=512)
    assert sweeps.at("V", 512, BASE) == BASE._replace(vocab=512)
    assert sweeps.at("D", 512, BASE) == BASE._replace(dim=512)
    assert sweeps.at("K", 16, BASE) == BASE._replace(rows=512, responses=16)
    for sweep, values in sweeps.VALUES.items():
        if sweep not in sweeps.GAMES:
            assert len({sweeps.at(sweep, v, BASE) for v in values}) == len(values)
    with pytest.raises(ValueError, match="expected one of"):
        sweeps.at("T", 1, BASE)


def test_what_the_budget_has_no_room_for_is_named():
    plan = replace(PLAN, base=BASE._replace(rows=64, vocab=512))
    found = list(sweeps.run(["N", "K of nash"], plan, 0.0))
    assert all(isinstance(f, str) for f in found)
    assert len(found) == len(sweeps.VALUES["N"]) + len(sweeps.VALUES["K of nash"])
    assert found[0].startswith("N = 512: about")


def test_the_command_writes_rows_fits_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sweeps, "VALUES",
        {"N": (64, 128), "length spread": (0.0, 1.0), "K of win_rates": (2, 4)},
    )  # fmt: skip
    out = tmp_path / "found" / "s.json"
    threads = torch.get_num_threads()
    args = ["--json", str(out), "--only", "N", "length spread", "K of win_rates"]
    args += ["--base", "64", "16", "211", "--dtype", "float32", "--repeats", "2", "--games", "50"]
    try:
        assert sweeps.main([*args, "--budget", "3000"]) == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads(out.read_text())
    assert {r["sweep"] for r in data["rows"]} == {"N", "length spread", "K of win_rates"}
    assert all(r["times"] for r in data["rows"]) and data["left_out"] == []
    assert data["clock"] and data["machine"]["cpu"] and data["commit"] and data["versions"]["torch"]
    by_key = {(f["sweep"], f["provider"], f["quantity"]): f for f in data["fits"]}
    assert by_key["N", "sppo-kernels native", "seconds"]["expected"] == pytest.approx(1)
    assert by_key["length spread", "sppo-kernels native", "seconds"]["expected"] == pytest.approx(0)
    assert by_key["length spread", "eager", "seconds"]["expected"] == pytest.approx(1)
    names = {p.name for p in out.parent.iterdir()}
    assert names == {"s.json", "s.png", "s.svg"}
    svg = (out.parent / "s.svg").read_text()
    assert (
        svg.lstrip().startswith("<?xml") and (out.parent / "s.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert "exponent" in capsys.readouterr().out
