"""The README's examples run, and so does the example script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_examples_run(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    words = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    scope = {
        "model": model,
        "reference": transformers.LlamaForCausalLM(config),
        "tokenizer": tokenizer,
        "ids": torch.randint(0, 32, (3, 7)),
        "labels": torch.randint(0, 32, (3, 7)),
        "win_rate": torch.tensor([0.2, 0.5, 0.8]),
    }
    found = blocks()
    assert len(found) == 4
    trl = pytest.importorskip("sppo_kernels.integrations.trl")
    pytest.importorskip("trl")
    try:
        for code in found:
            exec(code, scope)
    finally:
        trl.unpatch()
    assert scope["out"].loss.isfinite()
    assert scope["trainer"].state.global_step > 0
    assert scope["out"].logps.shape == (3,)


def test_example_script_trains_on_its_sample(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/train_llama.py", "--data", str(tmp_path / "absent"),
         "--epochs", "6"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    residuals = [float(x) for x in re.findall(r"residual ([0-9.]+)", done.stdout)]
    ranks = [float(x) for x in re.findall(r"correlation ([+-][0-9.]+)", done.stdout)]
    assert len(residuals) == 6
    assert residuals[-1] < 0.7 * residuals[0]
    assert ranks[-1] > 0.6
    assert "one fused step" in done.stdout
    assert "one eager step" in done.stdout


def test_example_stays_under_a_hundred_lines():
    assert len((ROOT / "examples/train_llama.py").read_text().splitlines()) < 100


def test_the_readmes_figures_are_those_of_the_committed_results():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme", "--check"], cwd=ROOT, check=False
    )
    assert done.returncode == 0, "run `python -m benchmarks.readme`"
