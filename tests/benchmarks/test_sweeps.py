"""Scaling sweeps: inputs that mean the same to every provider, exponents, budget, files."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

pytest.importorskip("scipy")

from benchmarks import sweep_cases as cases
from benchmarks import sweeps
from benchmarks.harness import Refused
from benchmarks.sweep_cases import IGNORED, Point

CPU = torch.device("cpu")
SMALL = Point(40, 16, 211, prompt=0.3, spread=1.0, responses=4)


@pytest.mark.parametrize(
    "point",
    [
        Point(512, 8, 16),
        Point(512, 8, 16, spread=1.5),
        Point(7, 8, 16, spread=1.5, responses=7),  # one row each
        Point(1001, 8, 16, spread=0.5, responses=2),
    ],
    ids=str,
)
def test_lengths_add_up_and_spread_as_asked(point):
    found = cases.lengths(point)
    assert len(found) == point.responses and sum(found) == point.rows and min(found) >= 1
    if point.spread == 0:
        assert max(found) - min(found) <= 1
    elif point.rows > 100:
        logs = torch.tensor(found).double().log()
        normal = statistics.NormalDist()
        share = [normal.inv_cdf((i + 0.5) / point.responses) for i in range(point.responses)]
        assert logs.std(correction=0) == pytest.approx(
            point.spread * statistics.pstdev(share), rel=0.1
        )


def test_fewer_rows_than_responses_are_refused():
    with pytest.raises(ValueError, match="at least 8"):
        cases.lengths(Point(7, 8, 16))


def test_packed_and_padded_are_the_same_rows(generator):
    batch = cases.make(SMALL, torch.float32, CPU, generator.initial_seed())
    s, t, d = batch.padded.shape
    flat = batch.padded.detach().view(-1, d)
    assert torch.equal(flat[batch.at], batch.hidden.detach())
    assert torch.equal(batch.labels_padded.view(-1)[batch.at], batch.labels)
    outside = torch.ones(s * t, dtype=torch.bool)
    outside[batch.at] = False
    assert outside.any() and (flat[outside] == 0).all()
    assert (batch.labels_padded.view(-1)[outside] == IGNORED).all()
    share = 1 - batch.counted / SMALL.rows
    assert abs(share - SMALL.prompt) < 0.1
    firsts = batch.labels[batch.bounds[:-1]]
    assert (firsts == IGNORED).any(), "prompts come first"


@pytest.mark.parametrize("name", ["sppo-kernels native", "eager", "TRL chunked"])
def test_providers_pass_the_gate(name, generator):
    if name == "TRL chunked":
        pytest.importorskip("trl")
    loss = cases.losses(CPU, peers=True)[name]
    error = cases.gate(loss, SMALL, torch.float32, CPU, generator.initial_seed())
    assert error < 1e-4


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_provider_is_refused_and_its_row_says_so(wrong, monkeypatch):
    right = cases.ours
    monkeypatch.setattr(cases, "ours", lambda b, impl: right(b, impl) * wrong)
    with pytest.raises(Refused, match="wrong by"):
        cases.gate(cases.losses(CPU, False)["sppo-kernels native"], SMALL, torch.float32, CPU, 0)
    rows = sweeps.measure("N", 40, SMALL, torch.float32, CPU, 1)
    by_name = {r.provider: r for r in rows}
    assert "refused" in by_name["sppo-kernels native"].note
    assert not by_name["sppo-kernels native"].times and by_name["eager"].times


def test_a_point_has_times_flops_error_and_memory():
    rows = {r.provider: r for r in sweeps.measure("length spread", 1, SMALL, torch.float32, CPU, 2)}
    assert set(rows) == {"sppo-kernels native", "eager", "bare GEMMs"}
    batch = cases.make(SMALL, torch.float32, CPU, 0)
    for name, row in rows.items():
        assert len(row.times) == 2 and min(row.times) > 0 and row.extra_peak is not None
        assert row.x == batch.labels_padded.numel(), "the spread is fitted over padded rows"
        counted = batch.labels_padded.numel() if name == "eager" else batch.counted
        assert row.flops == 6 * counted * SMALL.dim * SMALL.vocab
        assert (row.error is None) == (name == "bare GEMMs")


def _rows(exponent, noise=0.0):
    return [
        sweeps.Row("N", x, x, "c", "float32", "p", [3 * x**exponent * (1 + noise * (-1) ** i), 1e9],
                   flops=5 * x**2, extra_peak=int(1000 * x))
        for i, x in enumerate((512.0, 1024.0, 2048.0, 4096.0))
    ]  # fmt: skip


def test_the_exponent_of_a_power_law_is_found():
    found = sweeps.fit("N", "p", "seconds", _rows(1.7))
    assert abs(found.exponent - 1.7) < 1e-9 and found.stderr < 1e-6 and found.r2 > 1 - 1e-9
    assert abs(found.expected - 2) < 1e-9 and found.points == 4
    noisy = sweeps.fit("N", "p", "seconds", _rows(1.0, noise=0.2))
    assert noisy.stderr > 0.01 and abs(noisy.exponent - 1.0) < 3 * noisy.stderr
    memory = sweeps.fit("N", "p", "extra_peak", _rows(1.7))
    assert abs(memory.exponent - 1) < 1e-3 and memory.expected is None
    assert sweeps.fit("N", "p", "seconds", _rows(1.0)[:1]) is None, "one point has no exponent"
    assert sweeps.fit("N", "p", "seconds", _rows(1.0)[:2]).stderr is None, "two have no error"
    absent = [replace(r, times=[]) for r in _rows(1.0)]
    assert sweeps.fit("N", "p", "seconds", absent) is None


def test_one_parameter_varies():
    base = Point(256, 64, 1000)
    assert sweeps.at("N", 512, base) == replace(base, rows=512)
    assert sweeps.at("V", 512, base) == replace(base, vocab=512)
    assert sweeps.at("D", 512, base) == replace(base, dim=512)
    assert sweeps.at("K", 16, base) == replace(base, rows=512, responses=16)
    for sweep, values in sweeps.VALUES.items():
        if sweep not in sweeps.GAMES:
            points = {sweeps.at(sweep, v, base) for v in values}
            assert len(points) == len(values)
    with pytest.raises(ValueError, match="expected one of"):
        sweeps.at("T", 1, base)


@pytest.mark.parametrize("name", ["nash", "win_rates"])
def test_games_are_gated(name, monkeypatch):
    games = cases.random_games(20, 5, seed=1)
    assert cases.game_gate(name, games, "native") <= 1e-10
    right = getattr(cases.sk, name)

    def wrong(p, **options):
        found = right(p, **options)
        return found._replace(strategy=found.strategy.flip(-1)) if name == "nash" else found + 1e-6

    monkeypatch.setattr(cases.sk, name, wrong)
    with pytest.raises(Refused, match="wrong by"):
        cases.game_gate(name, games, "native")
    (row,) = sweeps.measure_games(f"K of {name}", 5, 20, CPU, 1)
    assert "refused" in row.note and not row.times


def test_what_the_budget_has_no_room_for_is_named():
    found = list(sweeps.run(["N", "K of nash"], Point(64, 64, 512), torch.float32, CPU, 1, 0.0))
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
