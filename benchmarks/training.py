"""What the trainers' benchmarks share: one Llama, lengths of answers, TRL's trainer around it.

Lengths are log-normal, as those of real answers are (median 90 tokens, one in twenty over 300).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def llama(vocab: int, hidden: int = 256, layers: int = 4, **changes):
    """A Llama from random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, **settings | changes
        )
    )


def random_ids(vocab: int) -> Callable[[float], torch.Tensor]:
    """A function that draws token ids of a log-normal number with a given median."""
    g = torch.Generator().manual_seed(1)

    def ids(median: float) -> torch.Tensor:
        n = int((median * torch.exp(0.75 * torch.randn((), generator=g))).clamp(4, 600))
        return torch.randint(3, vocab, (n,), generator=g)

    return ids


def common(folder: str) -> dict:
    """Settings of every trainer here."""
    return {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def dpo_trainer(model, reference, folder: str, **settings):
    """TRL's DPOTrainer with `sppo_hard` and a dataset of one row, in whose place others come."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "a": 3}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    # transformers renamed it; TRL's default is on
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(n for n in names if n in DPOConfig.__dataclass_fields__)
    settings = {"loss_type": "sppo_hard", "max_length": None, checkpointing: False} | settings
    text = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a"}])
    return DPOTrainer(
        model, reference, args=DPOConfig(**common(folder), **settings), train_dataset=text,
        processing_class=tokenizer,
    )  # fmt: skip
