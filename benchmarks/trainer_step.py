"""One trainer, one process: `python -m benchmarks.trainer_step ours|trl` prints a JSON line.

All train the same Llama on the same pairs of token ids with hard labels: `ours` is SPPOTrainer,
`trl` is TRL's DPOTrainer with `sppo_hard`. Reference log-probs are there before the clock starts.
`outside` is the share of our time spent neither in the model's forward with the loss, nor in
backward, nor in clipping and the optimizer's step: collation, bookkeeping and metrics.
Lengths are log-normal, as those of real answers are (median 90 tokens, one in twenty over 300).
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
import tempfile
import time

import torch

VOCAB, STEPS, PAIRS, BETA = 32000, 6, 4, 0.001


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


def make_rows(count: int = STEPS * PAIRS) -> list[dict]:
    g = torch.Generator().manual_seed(1)

    def ids(median: float) -> list[int]:
        n = int((median * torch.exp(0.75 * torch.randn((), generator=g))).clamp(4, 600))
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    return [
        {
            "prompt_ids": ids(60),
            "response_ids": [ids(90), ids(90)],
            "win_rate": [1.0, 0.0],
        }
        for _ in range(count)
    ]


def tokens_of(rows: list[dict]) -> int:
    """Tokens of prompts and responses, the prompt counted for each, whatever a trainer computes."""
    return sum(len(r["prompt_ids"]) + len(y) for r in rows for y in r["response_ids"])


def common(folder: str) -> dict:
    return {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS,
        "per_device_eval_batch_size": PAIRS,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
        "bf16": False,
    }


def ours(folder: str):
    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

    args = SPPOConfig(**common(folder), eta=1 / BETA)
    trainer = SPPOTrainer(make_model(), args, make_rows())
    trainer.prepare()
    return trainer


def trl(folder: str):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "a": 3}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    args = DPOConfig(
        **common(folder),
        loss_type="sppo_hard",
        beta=BETA,
        max_length=None,
        gradient_checkpointing=False,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a"}])
    model = make_model()
    # Any reference will do: its log-probs come as columns, and it is dropped.
    other = make_model()
    trainer = DPOTrainer(model, other, args=args, train_dataset=text, processing_class=tokenizer)
    trainer.ref_model, trainer.precompute_ref_logps = None, True
    del other
    rows = make_rows()
    data = []
    with torch.no_grad():
        for row in rows:
            logps = []
            for y in row["response_ids"]:
                logits = model(torch.tensor([row["prompt_ids"] + y])).logits
                logp = logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1]
                logps.append(float(logp.gather(-1, torch.tensor(y)[:, None]).sum()))
            data.append(
                {
                    "prompt_ids": row["prompt_ids"],
                    "chosen_ids": row["response_ids"][0],
                    "rejected_ids": row["response_ids"][1],
                    "ref_chosen_logps": logps[0],
                    "ref_rejected_logps": logps[1],
                }
            )
    trainer.train_dataset = Dataset.from_list(data)
    return trainer


def timed_inside(trainer) -> list[float]:
    """Make the trainer add up, in a list, CPU seconds of its real work, and of all work."""
    total = [0.0]

    def timed(owner, name: str) -> None:
        work = getattr(owner, name)

        def wrapper(*args, **kwargs):
            began = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                total[0] += time.process_time() - began

        setattr(owner, name, wrapper)

    timed(trainer._forward, "loss")
    timed(trainer.accelerator, "backward")
    timed(trainer.accelerator, "clip_grad_norm_")
    trainer.create_optimizer()
    timed(trainer.optimizer, "step")

    from transformers import TrainerCallback

    class Window(TrainerCallback):
        """From the second step to the end: what starting a run costs is not a step's."""

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                total[0], self.began = 0.0, time.process_time()

        def on_train_end(self, args, state, control, **_):
            total.append(time.process_time() - self.began)

    trainer.add_callback(Window())
    return total


def main(which: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ours": ours, "trl": trl}[which](folder)
        inside = timed_inside(trainer) if which == "ours" else None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # give back what preparing freed
        before = current_rss()
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = tokens_of(make_rows())
    found = {
        "which": which,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "rss_before_mib": before / 2**20,
        "peak_extra_mib": (peak_rss() - before) / 2**20,
    }
    history = getattr(getattr(trainer, "state", None), "log_history", None)
    if inside is not None:
        found["outside"] = 1 - inside[0] / inside[1]
    if history:
        found["loss"] = history[0]["loss"]
    print(json.dumps(found))


def current_rss() -> int:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    """Forget the peak so far, so that preparing does not count (Linux)."""
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")


def peak_rss() -> int:
    with open("/proc/self/status") as handle:
        line = next(x for x in handle if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
