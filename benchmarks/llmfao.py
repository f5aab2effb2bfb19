"""Training on real human preferences: `python -m benchmarks.llmfao FOLDER`.

The LLMFAO data (13 prompts with 59 responses and about 690 human comparisons each) as SPPO sees
them: all responses of a prompt, win rates from the observed opponents. A small Llama starts from
random weights; what is measured is how well the log-ratios of the responses follow the human win
rates, on training prompts (does training do what it says) and on held-out ones (a model of this
size is not expected to generalise, and the figure is printed whatever it shows).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.training import common, llama

HELD_OUT = 3


def by_id(path: Path, key: str, value: str) -> dict[str, str]:
    """One column of a JSON-lines file by another, both as text."""
    rows = map(json.loads, path.read_text().splitlines())
    return {str(row[key]): str(row[value]) for row in rows}


def load(folder: str | Path) -> list[dict]:
    """Rows `prompt, responses, win_rate` of the 13 prompts that people compared."""
    from sppo_kernels.games.comparisons import aggregate, load_comparisons

    folder = Path(folder)
    prompts = by_id(folder / "prompts.jsonl", "id", "text")
    texts = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts[str(row["prompt"]), str(row["model"])] = row["result"].strip()
    table = load_comparisons(folder / "crowd-comparisons.csv")
    rates = aggregate(table).win_rate
    rows = []
    for g, (game, names) in enumerate(zip(map(str, table.games), table.responses, strict=True)):
        kept = {
            k: texts[game, str(name)]
            for k, name in enumerate(names)
            if texts.get((game, str(name)))
        }
        rows.append(
            {
                "id": game,
                "prompt": prompts[game],
                "responses": list(kept.values()),
                "win_rate": [float(rates[g, k]) for k in kept],
            }
        )
    return rows


def in_chunks(rows: list[dict], size: int = 12) -> list[dict]:
    """The same responses in rows of at most `size` (and at least 2): more steps an epoch.

    Win rates stay those against all opponents, so the loss of a response does not change.
    """
    found = []
    for row in rows:
        parts = max(1, len(row["responses"]) // size)
        for k in range(parts):
            cut = {name: row[name][k::parts] for name in ("responses", "win_rate")}
            found.append(row | cut)
    return found


def tokenizer_of(rows: list[dict], vocabulary: int = 2048):
    """A byte-level BPE of the data."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    texts = [row["prompt"] for row in rows] + [y for row in rows for y in row["responses"]]
    special = ["<pad>", "<s>", "</s>"]
    raw.train_from_iterator(texts, vocabulary, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def train(rows: list[dict], held: list[dict], folder: str | Path, seconds: float, **changes):
    """Train for 30 epochs or until time is up; returns (train, held) metrics."""
    from transformers import PrinterCallback, TrainerCallback

    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

    tokenizer = tokenizer_of(rows + held)

    def fresh():
        return llama(
            len(tokenizer), 128, 2, intermediate_size=256, num_attention_heads=4,
            tie_word_embeddings=True,
        )  # fmt: skip

    model = fresh()
    settings = {
        **common(str(folder)),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 30,
        "logging_steps": 2 * len(rows),
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "eta": 30.0,
        "max_length": 2048,
    }
    pieces = in_chunks(rows)
    began = time.monotonic()

    class Stop(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            control.should_training_stop = time.monotonic() - began > seconds
            if "rank_correlation" in (logs or {}):
                shown = {k: round(logs[k], 3) for k in ("rank_correlation", "loss_win_rate")}
                print(f"{time.monotonic() - began:5.0f} s, epoch {state.epoch:.0f}: {shown}")

    trainer = SPPOTrainer(
        model, SPPOConfig(**(settings | changes)), pieces, rows, processing_class=tokenizer
    )
    trainer.add_callback(Stop())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    spent = time.monotonic() - began
    on_train = trainer.evaluate()
    # For held-out prompts the reference is π_0, which training has changed: build it again.
    held_settings = settings | changes | {"output_dir": str(Path(folder) / "held")}
    other = SPPOTrainer(
        model, SPPOConfig(**held_settings), None, held, processing_class=tokenizer,
        ref_model=fresh(),
    )  # fmt: skip
    trainer.release()
    return on_train, other.evaluate(), spent


def main() -> None:
    import tempfile

    rows = load(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/llmfao")
    with tempfile.TemporaryDirectory() as folder:
        fit, held, spent = train(rows[:-HELD_OUT], rows[-HELD_OUT:], folder, 240)
    for name, found in (("training", fit), ("held-out", held)):
        print(
            f"{name} prompts: rank correlation of human win rate and log-ratio "
            f"{found['eval_rank_correlation']:.3f}, loss {found['eval_loss_win_rate']:.4f}"
        )
    print(f"{spent:.0f} s of training on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
