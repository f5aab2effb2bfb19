"""The demo at a smaller size: self-play beats its start, and the judge is what it says."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from sppo_kernels.cli import main
from sppo_kernels.games.solvers import tournament
from sppo_kernels.judges import CallableJudge, win_matrices
from sppo_kernels.selfplay.demo import judge, known_words, make_prompts, quality, sentences, style


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_judge_is_partly_cyclic():
    words = [w for w in sorted(known_words()) if len(w) > 1]
    short, medium, long = (" ".join(words[:n]) for n in (5, 7, 9))
    matrix = win_matrices(CallableJudge(judge).logits(["p"], [[short, medium, long]]))[0]
    # Longer answers hold more known words, yet the short one holds its own against the long one.
    assert matrix[1, 0] > 0.5 and matrix[2, 1] > 0.5
    assert matrix[0, 2] > 1 - float(torch.sigmoid(torch.tensor(2.0)))
    # At equal quality the preferences are a cycle, which no ranking explains.
    repeated = [f"{short}", f"{short} {words[0]} x", f"{short} {words[0]} x {words[1]} x"]
    styles = [style(y) for y in repeated]
    assert styles == [0, 1, 2]
    q = torch.tensor([quality(y) for y in repeated])
    logits = CallableJudge(judge).logits(["p"], [repeated])[0]
    cyclic = win_matrices(logits - 0.5 * (q[:, None] - q[None, :]))
    assert int(tournament(cyclic).cycles) == 1
    assert int(tournament(cyclic).condorcet) == -1


def test_the_text_is_the_package_own():
    assert len(sentences()) > 300
    assert any("preference" in s for s in sentences())
    prompts = make_prompts(50, 1)
    assert len({p["prompt"] for p in prompts}) == 50
    assert prompts == make_prompts(50, 1)
    assert prompts != make_prompts(50, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_self_play_improves_clearly(seed, tmp_path, capsys):
    settings = {
        **{"run_dir": tmp_path, "seed": seed, "rounds": 2, "prompts_per_round": 80},
        **{"eval_prompts": 96, "warmup_steps": 120, "hidden_size": 64, "baseline": ""},
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main(["demo", "--quiet", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    print(json.dumps(results))
    assert results["sppo"][-1]["low"] > 0.5
    assert (tmp_path / "report.png").exists()
    assert str(tmp_path / "report.png") in capsys.readouterr().out
