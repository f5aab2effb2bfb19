"""The loop as a library: parts, prompts, engines, targets, intervals."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sppo_kernels.selfplay import (
    GenerateOptions,
    LoopOptions,
    ModelOptions,
    OptionError,
    generate,
    mean_with_interval,
    split_prompts,
)
from sppo_kernels.selfplay.stages import derive_seed, in_parts

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
