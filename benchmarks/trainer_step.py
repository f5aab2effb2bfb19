"""SPPOTrainer against TRL's DPOTrainer, each in its own process with one thread, side by side.

    python -m benchmarks trainer [--json FILE]      both
    python -m benchmarks trainer ours|trl           one, in this process; prints a JSON line

Both train the same Llama on the same pairs of token ids with hard labels: `ours` is SPPOTrainer,
`trl` is TRL's DPOTrainer with `sppo_hard`. Reference log-probs are there before the clock starts.
`outside` is the share of our time spent neither in the model's forward with the loss, nor in
backward, nor in clipping and the optimizer's step: collation, bookkeeping and metrics.
Lengths are log-normal, as those of real answers are (median 90 tokens, one in twenty over 300).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.rows import OURS, ROOT, Row, environment, write_json

VOCAB, STEPS, PAIRS, BETA = 32000, 4, 4, 0.001
INPUTS = "random tokens, log-normal lengths: prompts of 60 and responses of 90 tokens in the median"


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


def make_rows(count: int) -> list[dict]:
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


def common(folder: str, steps: int) -> dict:
    return {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
        "max_steps": steps,
        "per_device_train_batch_size": PAIRS,
        "per_device_eval_batch_size": PAIRS,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
        "bf16": False,
    }


def ours(folder: str, steps: int):
    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

    args = SPPOConfig(**common(folder, steps), eta=1 / BETA)
    trainer = SPPOTrainer(make_model(), args, make_rows(steps * PAIRS))
    trainer.prepare()
    return trainer


def trl(folder: str, steps: int):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "a": 3}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    args = DPOConfig(
        **common(folder, steps),
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
    rows = make_rows(steps * PAIRS)
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


def clocked_steps(trainer) -> list[float]:
    """A list that gets the CPU seconds of every step but the first, collation included."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        before = None

        def on_step_end(self, args, state, control, **_):
            now = time.process_time()
            if self.before is not None:
                seconds.append(now - self.before)
            self.before = now

    trainer.add_callback(Clock())
    return seconds


def one(which: str, steps: int) -> dict:
    """Train with one of the two, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ours": ours, "trl": trl}[which](folder, steps)
        inside = timed_inside(trainer) if which == "ours" else None
        clocked = clocked_steps(trainer)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # give back what preparing freed
        before = current_rss()
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = make_rows(steps * PAIRS)
    tokens = [tokens_of(rows[i : i + PAIRS]) for i in range(0, len(rows), PAIRS)]
    found = {
        "which": which,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": sum(tokens) / wall,
        "tokens_per_cpu_second": sum(tokens) / cpu,
        "cpu_seconds_per_token": [s / n for s, n in zip(clocked, tokens[1:], strict=True)],
        "rss_before_mib": before / 2**20,
        "peak_extra_mib": (peak_rss() - before) / 2**20,
    }
    history = getattr(getattr(trainer, "state", None), "log_history", None)
    if inside is not None:
        found["outside"] = 1 - inside[0] / inside[1]
    if history:
        found["loss"] = history[0]["loss"]
    return found


def both(steps: int, seconds: float | None = None) -> dict[str, dict | str]:
    """Each trainer in a process and on a core of its own, side by side; a text says what failed."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {
        which: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.trainer_step", which, "--steps", str(steps)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for which in ("ours", "trl")
    }  # fmt: skip
    end, found = None if seconds is None else time.monotonic() + seconds, {}
    for which, process in running.items():
        left = None if end is None else max(1.0, end - time.monotonic())
        try:
            out, errors = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found[which] = "not measured: the time budget was spent"
            continue
        lines = (out if process.returncode == 0 else errors).strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        found[which] = json.loads(last) if process.returncode == 0 else f"cannot run: {last[:120]}"
    return found


def rows_of(found: dict[str, dict | str], steps: int) -> list[Row]:
    """Rows of both trainers; TRL's are refused when its steps were not the same steps as ours."""
    case = f"Llama of 4 layers, D=256, V={VOCAB}, {PAIRS} pairs a step"
    names = {"ours": f"{OURS} SPPOTrainer", "trl": "TRL DPOTrainer"}
    out = []
    for which, result in found.items():
        row = Row("trainer", case, "float32", names[which], per="token", inputs=INPUTS)
        out.append(row)
        if isinstance(result, str):
            row.note = result
            continue
        row.times = result["cpu_seconds_per_token"]
        row.extra_peak = max(0, int(result["peak_extra_mib"] * 2**20))
        row.note = f"CPU time, one thread, steps 2 to {steps}"
        if "outside" in result:
            row.note += f"; {result['outside']:.1%} of it outside model, loss and optimizer"
    ours, theirs = found.get("ours"), found.get("trl")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        # The paper's units (eta = 1000), and a sum over the pair instead of the mean.
        same = 2 * ours["loss"] / BETA**2
        out[1].error = abs(theirs["loss"] - same) / same
        if not out[1].error <= 1e-3:
            out[1].times = []
            out[1].note = f"refused: its loss differs by {out[1].error:.1e}, more than 1e-03"
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks trainer", description=__doc__)
    parser.add_argument("which", nargs="?", choices=("ours", "trl"), help="one, in this process")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="time budget")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, got {args.steps}")
    if args.which:
        print(json.dumps(one(args.which, args.steps)))
        return 0
    rows = rows_of(both(args.steps, args.seconds), args.steps)
    if args.json:
        write_json(args.json, rows, environment())
    from benchmarks.render import compact

    print(compact(rows))
    return 0


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
    sys.exit(main())
