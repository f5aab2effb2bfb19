"""The loop as a library: parts, prompts, engines, targets, intervals."""

import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from sppo_kernels.data import DataError, canonical_row
from sppo_kernels.games import TARGETS, preference_targets
from sppo_kernels.selfplay import (
    GenerateOptions,
    JudgeOptions,
    LoopOptions,
    ModelOptions,
    OptionError,
    generate,
    judge_rows,
    mean_with_interval,
    split_prompts,
)
from sppo_kernels.selfplay.stages import derive_seed, in_parts, same_settings

pytest.importorskip("pyarrow")


def test_parts_go_on_where_they_stopped(tmp_path):
    calls = []

    def work(chunk, part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"x": x, "seed": derive_seed(1, part)} for x in chunk]

    path = tmp_path / "rows.parquet"
    with pytest.raises(KeyboardInterrupt):
        in_parts(list(range(7)), 2, path, work, "", quiet=True)
    assert not path.exists()
    rows = in_parts(list(range(7)), 2, path, work, "", quiet=True)
    assert calls == [0, 1, 2, 2, 3]
    assert [r["x"] for r in rows] == list(range(7))
    assert in_parts([], 2, path, work, "", quiet=True) == rows


def test_prompts_are_split_without_overlap():
    prompts = [{"id": i, "prompt": str(i)} for i in range(23)]
    held, splits = split_prompts(prompts, LoopOptions(rounds=3, eval_prompts=5))
    seen = [p["id"] for part in [held, *splits] for p in part]
    assert sorted(seen) == list(range(23))
    with pytest.raises(OptionError, match="at least 26"):
        split_prompts(prompts, LoopOptions(rounds=3, eval_prompts=23))


def test_interval_covers_the_mean_as_often_as_it_says(generator):
    hits = 0
    for _ in range(400):
        values = torch.rand(60, generator=generator, dtype=torch.float64).square()
        found = mean_with_interval(values)
        hits += found["low"] <= 1 / 3 <= found["high"]
    assert 0.90 <= hits / 400 <= 0.99


def test_vllm_is_given_ids_and_its_ids_are_kept(monkeypatch, tmp_path):
    """Against a stand-in with vLLM's names: prompts as ids, a seed a part, answers as they came."""
    calls = []

    class LLM:
        def __init__(self, model):
            self.model = model

        def generate(self, prompts, params):
            calls.append((prompts, params))
            answers = [SimpleNamespace(token_ids=(5 + k, 2 + k)) for k in range(params.n)]
            return [SimpleNamespace(outputs=answers) for _ in prompts]

    class Tokenizer:
        eos_token_id = 2

        def __call__(self, text):
            return {"input_ids": [len(text)]}

        def batch_decode(self, lines, skip_special_tokens):
            return [" ".join(str(t) for t in line if t != 2) for line in lines]

    transformers = pytest.importorskip("transformers")
    vllm = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Tokenizer())
    prompts = [{"id": n, "prompt": "x" * (n + 1)} for n in range(300)]
    options = GenerateOptions(num_responses=2, max_new_tokens=7, engine="vllm")
    rows = generate(ModelOptions("M"), prompts, tmp_path / "a.parquet", options, 3, quiet=True)
    assert [len(asked) for asked, _ in calls] == [256, 44]
    assert calls[0][0][:2] == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    assert [params.seed for _, params in calls] == [derive_seed(3, 0), derive_seed(3, 1)]
    assert calls[0][1].max_tokens == 7
    assert rows[299] == {
        **{"id": 299, "prompt": "x" * 300, "prompt_ids": [300], "responses": ["5", "6 3"]},
        **{"response_ids": [[5, 2], [6, 3]], "finished": [True, False]},
    }
    assert generate(ModelOptions("M"), prompts, tmp_path / "a.parquet", options) == rows
    assert len(calls) == 2  # what is there is read


def test_options_refuse_what_they_cannot_be():
    with pytest.raises(OptionError, match=r"--num_responses: expected at least 2, got 1"):
        GenerateOptions(num_responses=1)
    with pytest.raises(OptionError, match=r"--engine: expected 'auto', 'transformers' or 'vllm'"):
        GenerateOptions(engine="jax")
    with pytest.raises(OptionError, match=r"--baseline: expected 'dpo' or '', got 'ppo'"):
        LoopOptions(baseline="ppo")
    with pytest.raises(OptionError, match=r"--targets: expected 'win_rate', .* got 'elo'"):
        JudgeOptions(targets="elo")
    with pytest.raises(OptionError, match="'uclaml' averages over both orders"):
        JudgeOptions(targets="uclaml", debias=False)
    with pytest.raises(OptionError, match=r"--targets_tau: expected a number above 0, got 0"):
        JudgeOptions(targets_tau=0)


class Cyclic:
    """Rock, paper, scissors, with 1 for the first position."""

    def logits(self, prompts, responses):
        c = torch.tensor([[0.0, 3.0, -2.0], [-3.0, 0.0, 1.0], [2.0, -1.0, 0.0]]) + 1.0
        return c.expand(len(prompts), 3, 3)


@pytest.mark.parametrize("by", TARGETS)
def test_rows_hold_the_targets_that_are_asked_for(by, tmp_path):
    rows = [{"id": n, "prompt": str(n), "responses": ["r", "p", "s"]} for n in range(3)]
    options = JudgeOptions("M:F", judge_temperature=2.0, targets=by, targets_tau=0.3)
    path = tmp_path / "j.parquet"
    found = judge_rows(rows, Cyclic(), path, options, quiet=True)
    logits = Cyclic().logits(["0"], None) / 2.0
    expected = preference_targets(logits, by, logits=True, tau=0.3)[0]
    for row, given in zip(found, rows, strict=True):
        assert set(row) == {*given, "win_matrix", "win_rate", "judge"}
        assert canonical_row(row)["win_rate"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["win_matrix"][0][1] == pytest.approx(1 / (1 + math.exp(-1.5)))
        assert row["judge"] == "M:F"
    if by == "nash":  # each response of a full cycle draws with the equilibrium
        assert row["win_rate"] == pytest.approx([0.5] * 3, abs=1e-6)


def test_games_without_strengths_are_named(tmp_path):
    class Certain:
        def logits(self, prompts, responses):
            return torch.tensor([[[0.0, 500.0], [-500.0, 0.0]]])

    options = JudgeOptions(targets="bradley_terry")
    rows = [{"prompt": "p", "responses": ["a", "b"]}]
    with pytest.raises(DataError, match=r"--targets: bradley_terry: .*no finite strengths"):
        judge_rows(rows, Certain(), tmp_path / "j.parquet", options, quiet=True)


def test_a_run_from_before_a_setting_goes_on_with_its_default(tmp_path):
    path, now = tmp_path / "settings.json", asdict(JudgeOptions("M:F"))
    older = {name: value for name, value in now.items() if not name.startswith("targets")}
    same_settings(path, older, {})
    same_settings(path, now, asdict(JudgeOptions()))
    with pytest.raises(DataError, match=r"other targets \(targets: 'win_rate' then, 'nash' now\)"):
        same_settings(path, now | {"targets": "nash"}, asdict(JudgeOptions()))
