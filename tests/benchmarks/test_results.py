"""Results files, comparisons, plots, tables, the planning within a budget, and the GPU run's."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, core, game_cases, providers, readme, render, trainer_step
from benchmarks.inputs import Case
from benchmarks.rows import (
    RESULTS,
    ROOT,
    Row,
    ceiling_ratio,
    environment,
    machine_slug,
    read_json,
    write_json,
)  # fmt: skip

SCHEMA = json.loads((ROOT / "benchmarks/schema.json").read_text())
ENV = {
    "machine": {"cpu": "Some CPU (R) 7", "cores": 2, "threads": 2, "gpu": None, "build": None},
    "versions": {"python": "3.11", "torch": "2.13"},
    "commit": "0123456789abcdef+changes",
    "date": "2026-01-02T03:04:05+00:00",
}


def sample(slow: float = 1.0, inputs: str = "zipf, all 64 rows count") -> list[Row]:
    """Two cases: a ceiling, ours (times `slow`), eager, and a provider that is absent."""
    rows = []
    for group, ceiling, amount in (("trainable", "bare GEMMs (3)", "flops"),
                                   ("logits", "copy of the logits", "bytes")):  # fmt: skip

        def row(name, times, peak=None, note="", group=group, amount=amount):
            return Row(
                group, "N=64 V=401 D=16", "bfloat16", name, times, extra_peak=peak, note=note,
                inputs=inputs, **{amount: 1e9},
            )  # fmt: skip

        rows += [
            row("sppo-kernels native", [slow * t for t in (0.011, 0.0102, 0.0105)], 20 << 20),
            row("eager", [0.021, 0.0201, 0.022], 80 << 20),
            row("QuACK cross-entropy", [], note="cannot run: it needs a CUDA device"),
            row(ceiling, [0.0101, 0.01, 0.0102], 10 << 20),
        ]
    return rows


def validate(data: dict) -> None:
    pytest.importorskip("jsonschema").validate(data, SCHEMA)


def test_files_are_whole_and_of_the_schema(tmp_path):
    path = tmp_path / "results" / "run.json"
    write_json(path, sample(), ENV)
    validate(json.loads(path.read_text()))
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]
    rows, env = read_json(path)
    assert rows == sample()
    assert {k: env[k] for k in ENV} == ENV
    first = json.loads(path.read_text())["rows"][0]
    assert first["best"] == 0.0102
    assert first["median"] == 0.0105
    assert first["spread"] == pytest.approx((0.011 - 0.0102) / 2 / 0.0105)
    assert first["tflops"] == pytest.approx(1e9 / 0.0102 / 1e12)
    assert first["ceiling_ratio"] == pytest.approx(0.01 / 0.0102)


def test_the_schema_refuses_what_is_not_said(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    write_json(tmp_path / "a.json", sample(), ENV)
    good = json.loads((tmp_path / "a.json").read_text())
    for spoil in (
        lambda d: d["rows"][2].update(note=""),  # absent without a reason
        lambda d: d["rows"][0].update(times=[0.0]),
        lambda d: d["rows"][0].update(group="other"),
        lambda d: d["rows"][0].pop("inputs"),
        lambda d: d.pop("commit"),
        lambda d: d["rows"][0].update(surprise=1),
    ):
        bad = json.loads(json.dumps(good))
        spoil(bad)
        with pytest.raises(jsonschema.ValidationError):
            validate(bad)


def test_committed_results_are_of_the_schema():
    found = sorted(RESULTS.glob("*/*.json"))
    assert found
    for path in found:
        data = json.loads(path.read_text())
        if data.get("schema") == 2:
            validate(data)
            for row in read_json(path)[0]:
                assert row.times or row.note


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 1, "results": []}')
    with pytest.raises(ValueError, match="expected schema 2, got 1"):
        read_json(tmp_path / "old.json")


def test_environment_and_the_folder_of_a_machine():
    env = environment()
    assert env["machine"]["cpu"]
    assert env["versions"]["torch"] == torch.__version__
    assert env["commit"]
    validate({"schema": 2, **env, "rows": []})
    assert machine_slug(ENV["machine"]) == "some-cpu-r-7-2-threads"
    assert machine_slug({**ENV["machine"], "gpu": "NVIDIA H200"}) == "nvidia-h200"


def verdicts(a, b, **options):
    return {(c.row.group, c.row.provider): c.verdict for c in compare.compare(a, b, **options)}


def test_equal_runs_agree_and_a_slower_one_is_flagged():
    assert set(verdicts(sample(), sample()).values()) == {"agrees", "measure"}
    found = verdicts(sample(), sample(slow=1.5))
    assert found["trainable", "sppo-kernels native"] == "slower"
    assert found["trainable", "eager"] == "agrees"
    assert verdicts(sample(1.5), sample())["logits", "sppo-kernels native"] == "faster"


def test_a_slower_machine_is_not_a_regression_but_in_seconds():
    slower = sample()
    for row in slower:
        row.times = [2 * t for t in row.times]
    assert set(verdicts(sample(), slower).values()) == {"agrees", "measure"}
    assert set(verdicts(sample(), slower, absolute=True).values()) == {"slower"}


def test_what_the_spread_explains_is_not_flagged():
    noisy = sample()
    for row in noisy:
        if row.provider == "sppo-kernels native":
            row.times = [0.0115, 0.0135, 0.014]  # 13 % slower at best, and 17 % apart
    assert verdicts(sample(), noisy)["trainable", "sppo-kernels native"] == "agrees"
    for row in noisy:
        if row.provider == "sppo-kernels native":
            row.times = [0.0115, 0.01152, 0.0116]  # as slow, and steadily so
    assert verdicts(sample(), noisy)["trainable", "sppo-kernels native"] == "slower"


def test_memory_and_missing_rows_are_regressions():
    more = sample()
    more[0].extra_peak = 40 << 20
    assert verdicts(sample(), more)["trainable", "sppo-kernels native"] == "more memory"
    refused = sample()
    refused[0].times, refused[0].note = [], "refused: wrong by 1e-01"
    assert verdicts(sample(), refused)["trainable", "sppo-kernels native"] == "gone"
    assert verdicts(sample(), sample(inputs="flat, 3 rows"))["logits", "eager"] in ("gone", "new")
    new = sample()
    new[2].times = [0.5]
    assert verdicts(sample(), new)["trainable", "QuACK cross-entropy"] == "new"


def test_compare_exits_with_the_verdict(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "results.json", sample(), ENV)
    write_json(tmp_path / "b.json", sample(1.5), ENV)
    a, b = str(tmp_path / "a"), str(tmp_path / "b.json")
    assert command.main(["compare", a, a]) == 0
    assert "6 agrees" not in capsys.readouterr().out  # 4 providers agree, 2 ceilings measure
    assert command.main(["compare", a, b]) == 1
    assert "| sppo-kernels native | 1.02 | 1.53 | +50 %" in capsys.readouterr().out


def test_a_deliberately_slowed_provider_is_flagged_in_real_runs():
    """Two runs of the same provider agree; the third has it slowed down.

    On a clock that only calls advance: on a busy machine the same provider differs from itself.
    """
    task = core.Task(Case(512, 64, 3001), dtype="float32", repeats=15, memory=False)
    ours = next(q for q in providers.of_group("forward") if q.name == "sppo-kernels native")

    now = [0.0]

    def read():
        now[0] += 1e-3
        return now[0]

    def slowed(inputs):
        now[0] += 0.1
        return ours.loss(inputs)

    slow = providers.Provider(ours.name, slowed, ours.groups)
    runs = [core.run_case("forward", task, found=[q], timer=read) for q in (ours, ours, slow)]
    same = verdicts(runs[0], runs[1])["forward", ours.name]
    assert same == "agrees", [r.times for run in runs[:2] for r in run]
    assert verdicts(runs[0], runs[2])["forward", ours.name] == "slower"


def test_the_ceilings_share_is_one_for_the_ceiling():
    rows = sample()
    for row in rows:
        share = ceiling_ratio(rows, row)
        assert (share is None) == (not row.times)
        if row.is_ceiling:
            assert share == 1


def test_tables_say_ratios_and_reasons():
    rows = sample()
    table = render.document(rows, ENV)
    assert "| eager | 20.1 ms |" in table
    assert "| 98 % | 1.00 |" in table
    assert "cannot run: it needs a CUDA device" in table
    assert "zipf, all 64 rows count" in table
    text = render.compact(rows * 20, most=50)
    assert len(text.splitlines()) == 50
    assert text.endswith("lines more in table.md")


@pytest.mark.parametrize(
    "value, text", [(0.25, "250 ms"), (1.5, "1.5 s"), (2e-5, "20 µs"), (28e-9, "28 ns")]
)
def test_seconds_in_a_readable_unit(value, text):
    assert render.seconds(value) == text


def test_plots_are_written_and_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    write_json(tmp_path / "results.json", sample(), ENV)
    sums = []
    for _ in range(2):
        assert command.main(["plot", str(tmp_path)]) == 0
        files = [tmp_path / f"{n}.{k}" for n in ("ratios", "memory") for k in ("png", "svg")]
        sums.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
    assert sums[0] == sums[1]
    svg = (tmp_path / "ratios.svg").read_text()
    assert "bare GEMMs (3): 0.98" in svg
    assert "hidden-in, trainable head" in svg
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_readme_lines_come_from_the_rows(tmp_path, monkeypatch):
    folder = tmp_path / "some-cpu"
    write_json(folder / "results.json", sample(), ENV)
    write_json(folder / "ignored.json", sample(9.0), ENV)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.block()
    assert (
        "**Some CPU (R) 7, 2 threads** (torch 2.13, commit 0123456789ab+changes, 2026-01-02)"
        in text
    )
    assert (
        "| trainable head, bfloat16, zipf, all rows, N=64 V=401 D=16 | 98 % | 1.97 | 0.25 |" in text
    )
    assert text.count("trainable head, bf") == 1


def test_commands_are_dispatched(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("run", "compare", "render", "plot", "readme", "sweep", "kernels", "games",
                 "trainer", "trl", "gpu"):  # fmt: skip
        assert f"  {name} " in text
    assert command.main(["nothing"]) == 2
    assert command.main([]) == 2


def test_game_rows(tmp_path):
    pytest.importorskip("evalica")
    cases = [
        game_cases.targets_case(60, 5), game_cases.nash_case(40, 5),
        game_cases.win_rates_case(9, 3), game_cases.bradley_terry_case(60, 5),
        game_cases.aggregate_case(60, 5, 20), game_cases.tournament_case(60, 5),
        game_cases.nash_case(2, 40, peers=False, methods=("simplex", "mirror")),
        *game_cases.linearity_cases(4, 20),
    ]  # fmt: skip
    rows = [row for case in cases for row in case.measure(2)]
    assert not [r.note for r in rows if not r.times]
    write_json(tmp_path / "games.json", rows, ENV)
    validate(json.loads((tmp_path / "games.json").read_text()))
    names = {r.provider for r in rows}
    assert names >= {
        "sppo-kernels native", "lean eager", "evalica", "choix", "nashpy", "scipy linprog",
    }  # fmt: skip
    ours = [r for r in rows if r.provider == game_cases.NATIVE and r.per != "comparison"]
    assert all(r.error is not None and r.error < 1e-5 for r in ours)


@pytest.mark.parametrize("name", ["nash", "win_rates"])
def test_a_wrong_game_is_refused(name, monkeypatch):
    def wrong(p, **options):
        found = right(p, **options)
        if name == "win_rates":
            return found + 1e-6
        strategy = found.strategy.clone()
        strategy[7] = strategy[7].flip(0)  # of one game only
        return found._replace(strategy=strategy)

    right = getattr(game_cases, name)
    monkeypatch.setattr(game_cases, name, wrong)
    rows = getattr(game_cases, f"{name}_case")(40, 5).measure(1)
    assert rows[0].note.startswith("refused: wrong by") and not rows[0].times
    assert all(r.times for r in rows[1:])


def test_a_games_peer_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(game_cases, "missing", lambda name: f"{name} is not installed")
    rows = game_cases.bradley_terry_case(20, 5).measure(1)
    assert [r.note for r in rows] == [
        "", "cannot run: evalica is not installed", "cannot run: choix is not installed",
    ]  # fmt: skip


def test_trainer_rows_are_refused_when_the_steps_were_others():
    def result(which, loss):
        return {
            "which": which, "cpu_seconds_per_token": [1e-3, 2e-3], "peak_extra_mib": 100.0,
            "loss": loss,
        }  # fmt: skip

    same = trainer_step.rows_of({"ours": result("ours", 0.25), "trl": result("trl", 5e5)}, 3)
    assert [bool(r.times) for r in same] == [True, True]
    other = trainer_step.rows_of({"ours": result("ours", 0.25), "trl": result("trl", 5.1e5)}, 3)
    assert other[1].times == []
    assert other[1].note.startswith("refused: its loss differs")
    absent = trainer_step.rows_of({"ours": result("ours", 0.25), "trl": "cannot run: no trl"}, 3)
    assert absent[1].note == "cannot run: no trl"


def test_results_folder_has_no_stray_files():
    assert all(p.is_dir() for p in Path(RESULTS).iterdir())
