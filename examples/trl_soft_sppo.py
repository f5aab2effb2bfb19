"""A TRL DPO script turned into SPPO with soft win rates: two names differ from DPOTrainer's.

Without --model it trains a small Llama with a tokenizer of its own; with it, any causal language
model by name or path, with LoRA. Data: the llmfao data set where its folder is (--data FOLDER),
else the sample beside this file: prompts with several responses and their win rates.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from llmfao import load
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sppo_kernels.integrations.trl import SoftSPPOConfig, SoftSPPOTrainer

HERE = Path(__file__).resolve().parent


def small(rows: list[dict]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of random weights and a tokenizer trained on the rows."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = [text for row in rows for text in (row["prompt"], *row["responses"])]
    special = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<unk>", "<pad>", "</s>"])
    bpe.train_from_iterator(texts, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "sample")
    parser.add_argument("--model", help="name or path; default: a small random Llama")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--beta", type=float, default=0.005, help="1/eta")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        {"prompt": f"{p.text}\n", "responses": p.answers, "win_rate": p.win_rate}
        for p in load(options.data)
    ]
    if options.model is None:
        (model, tokenizer), peft = small(rows), None
        path = tempfile.mkdtemp()
        model.save_pretrained(path)  # TRL loads the reference from where the model came from
        model = path
    else:
        from peft import LoraConfig

        model, tokenizer = options.model, AutoTokenizer.from_pretrained(options.model)
        peft = LoraConfig(r=16, target_modules="all-linear")  # not the head

    args = SoftSPPOConfig(  # was: DPOConfig
        output_dir=options.output or tempfile.mkdtemp(),
        loss_type="sppo",
        beta=options.beta,
        loss_units="win_rate",
        max_length=256,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=2,
        learning_rate=1e-3 if peft is None else 1e-5,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        bf16=torch.cuda.is_available(),
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
    )
    trainer = SoftSPPOTrainer(  # was: DPOTrainer
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "sppo/residual_rms" in entry:
            print(
                f"epoch {entry['epoch']:g}: residual {entry['sppo/residual_rms']:.3f} nats, rank "
                f"correlation {entry['sppo/rank_correlation']:+.3f}"
            )


if __name__ == "__main__":
    main()
