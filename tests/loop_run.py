"""A whole run of `sppo iterate` on a tiny model whose words, weights and judge are made here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{n}" for n in range(40)]
JUDGE = "tests.loop_run:judge"


def judge(prompt: str, first: str, second: str) -> float:
    """More different words, and a bonus for being shown first."""
    return 0.4 * (len(set(first.split())) - len(set(second.split()))) + 0.2


def save_start(folder: Path) -> None:
    """A random Llama and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: n for n, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def run_loop(**changes: Any) -> dict[str, Any]:
    """Answers, judgements, weights and results of two rounds, as values."""
    from safetensors.torch import load_file

    from sppo_kernels.cli import main
    from sppo_kernels.data.rows import read_parquet

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_start(folder / "start")
        prompts = [{"prompt": f"{WORDS[n]} {WORDS[(3 * n) % 40]}"} for n in range(20)]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        settings = {
            **{"model": folder / "start", "prompts": folder / "prompts.jsonl"},
            **{"run_dir": folder / "run", "judge": JUDGE, "rounds": 2, "num_responses": 3},
            **{"max_new_tokens": 6, "generate_batch_size": 4, "eval_prompts": 6},
            **{"eval_samples": 2, "engine": "transformers", "device": "cpu", "use_cpu": True},
            **{"disable_tqdm": True, "max_length": 64, "eta": 10, "learning_rate": 1e-2},
            **{"num_train_epochs": 1, "per_device_train_batch_size": 2, "logging_steps": 1},
        }
        flags = [w for k, v in (settings | changes).items() for w in (f"--{k}", str(v))]
        assert main(["iterate", *flags]) == 0
        rounds = [folder / "run" / "sppo" / f"round-{t}" for t in (1, 2)]
        results = json.loads((folder / "run" / "results.json").read_text())["sppo"]
        columns = ("id", "prompt", "prompt_ids", "responses", "response_ids", "finished")
        judged = ("win_matrix", "win_rate", "judge")
        return {
            "answers": [_columns(read_parquet(r / "responses.parquet"), columns) for r in rounds],
            "judged": [_columns(read_parquet(r / "judged.parquet"), judged) for r in rounds],
            "held out": [_columns(read_parquet(r / "held-out.parquet"), columns) for r in rounds],
            "weights": [
                value
                for r in rounds
                for _, value in sorted(load_file(r / "model" / "model.safetensors").items())
            ],
            "results": [{k: r[k] for k in ("win_rate", "low", "high")} for r in results],
        }


def _columns(rows: list[dict], names: tuple[str, ...]) -> list[dict]:
    return [{name: row[name] for name in names} for row in rows]
