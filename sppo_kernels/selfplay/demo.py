"""Self-play of a small Llama on CPU, with iterative DPO beside it.

The model first learns the sentences of this package's own documentation. Then it plays three
rounds against itself. The judge likes distinct known words, and beside that plays rock, paper,
scissors with lengths: medium beats short, long beats medium, short beats long. No ranking of
answers explains such preferences.
"""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sppo_kernels.data.collate import pad
from sppo_kernels.files import whole_folder
from sppo_kernels.optional import require
from sppo_kernels.selfplay.iterate import Run, iterate
from sppo_kernels.selfplay.options import (
    GenerateOptions,
    JudgeOptions,
    LoopOptions,
    ModelOptions,
    setting,
)
from sppo_kernels.selfplay.stages import derive_seed

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass
class DemoOptions:
    """The size of the demo."""

    run_dir: str = setting("runs/demo", "Folder of the run; one that exists is gone on with.")
    seed: int = setting(0, "Of everything random.")
    rounds: int = setting(3, "Rounds of self-play.")
    prompts_per_round: int = setting(256, "Prompts of a round.")
    eval_prompts: int = setting(160, "Held-out prompts.")
    warmup_steps: int = setting(400, "Steps of learning the package's sentences.")
    hidden_size: int = setting(128, "Of the model.")
    baseline: str = setting("dpo", "'dpo', or '' for none.")
    quiet: bool = setting(False, "No progress bars.")


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences of the docstrings and messages of this package."""
    found: dict[str, None] = {}
    for file in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for piece in re.split(r"(?<=[.;:])\s+|\n\s*\n", node.value):
                words = re.findall(r"[a-z]+", piece.lower())
                if 5 <= len(words) <= 30:
                    found[" ".join(words)] = None
    return tuple(found)


@functools.cache
def known_words() -> frozenset[str]:
    """Words of the sentences."""
    return frozenset(word for s in sentences() for word in s.split())


def quality(text: str) -> float:
    """Distinct known words, at most 10, less what is repeated or no word."""
    words = text.split()
    known = [w for w in words if w in known_words() and len(w) > 1]
    return min(10, len(set(known))) - 0.5 * (len(words) - len(set(known)))


def style(text: str) -> int:
    """0 short, 1 medium, 2 long."""
    count = len(text.split())
    return 0 if count < 6 else 1 if count < 9 else 2


def judge(prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> torch.Tensor:
    """Log-odds [n, K, K] as described above, with 0.3 for the first position."""
    q = torch.tensor([[quality(y) for y in ys] for ys in responses])
    s = torch.tensor([[style(y) for y in ys] for ys in responses])
    cycle = torch.tensor([0.0, 1.0, -1.0])[(s[:, :, None] - s[:, None, :]) % 3]
    return 0.5 * (q[:, :, None] - q[:, None, :]) + cycle + 0.3


judge.batched = True


def make_tokenizer(vocabulary: int = 512) -> Any:
    """A small byte-pair tokenizer of the sentences, whose first tokens are those of SPECIAL."""
    transformers = require("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    raw.train_from_iterator(sentences(), trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def make_prompts(count: int, seed: int) -> list[dict[str, Any]]:
    """Beginnings of sentences: two to four words."""
    rng = random.Random(derive_seed(seed, "prompts"))
    found: dict[str, None] = {}
    while len(found) < count:
        words = rng.choice(sentences()).split()
        begin = rng.randrange(max(1, len(words) - 4))
        found[" ".join(words[begin : begin + rng.randint(2, 4)])] = None
    return [{"id": k, "prompt": text} for k, text in enumerate(found)]


def warm_up(folder: Path, options: DemoOptions) -> None:
    """Train a small Llama on the sentences by next-token prediction and save it."""
    transformers = require("transformers")
    from tqdm import tqdm

    tokenizer = make_tokenizer()
    torch.manual_seed(derive_seed(options.seed, "weights"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **{f"{name}_id": n for n, name in enumerate(SPECIAL) if name != "unk_token"},
    )
    model = transformers.LlamaForCausalLM(config)
    texts = [[*tokenizer(s)["input_ids"][:62], 2] for s in sentences()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.warmup_steps)
    rng = random.Random(derive_seed(options.seed, "warm-up"))
    model.train()
    bar = tqdm(range(options.warmup_steps), desc="warm-up", disable=options.quiet)
    for _ in bar:
        batch = sorted(rng.sample(texts, 32), key=len)
        ids, mask = pad(batch, 0)
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demo(options: DemoOptions) -> dict[str, Any]:
    """Warm up, play, measure; returns the results of `iterate`."""
    from sppo_kernels.trainer import SPPOConfig

    # The work of a step is milliseconds: on busy cores more threads wait for each other.
    torch.set_num_threads(1)
    folder = Path(options.run_dir)
    start = whole_folder(folder / "warm-start", lambda path: warm_up(path, options))
    prompts = make_prompts(
        options.eval_prompts + options.rounds * options.prompts_per_round, options.seed
    )
    args = SPPOConfig(
        **{"output_dir": str(folder / "trainer"), "use_cpu": True, "disable_tqdm": options.quiet},
        **{"report_to": "none", "save_strategy": "no", "logging_steps": 6, "seed": options.seed},
        **{"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "max_length": 96},
        **{"num_train_epochs": 6, "learning_rate": 1e-3, "lr_scheduler_type": "linear"},
        **{"eta": 100.0, "dpo_beta": 0.1},
    )
    loop = LoopOptions(
        run_dir=str(folder),
        rounds=options.rounds,
        eval_prompts=options.eval_prompts,
        baseline=options.baseline,
        loop_seed=options.seed,
    )
    model = ModelOptions(model=str(start), device="cpu", dtype="float32")
    sampling = GenerateOptions(
        num_responses=5, max_new_tokens=32, generate_batch_size=64, engine="transformers"
    )
    judging = JudgeOptions(judge=f"{__name__}:judge", judge_batch_size=256)
    return iterate(Run(loop, model, sampling, judging, args), prompts)
