"""SPPOTrainer against TRL's DPOTrainer, each in its own process with one thread, side by side.

    python -m benchmarks trainer [--json FILE]      both
    python -m benchmarks trainer ours|trl           one, in this process; prints a JSON line

Both train the same Llama on the same pairs of token ids with hard labels: `ours` is SPPOTrainer,
`trl` is TRL's DPOTrainer with `sppo_hard`. Reference log-probs are there before the clock starts.
`outside` is the share of our time spent neither in the model's forward with the loss, nor in
backward, nor in clipping and the optimizer's step: collation, bookkeeping and metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

import torch

from benchmarks.harness import SPENT, Process, extra_peak, passed, resident, within
from benchmarks.render import finish, outputs
from benchmarks.rows import OURS, Row
from benchmarks.training import common, dpo_trainer, llama, random_ids

VOCAB, STEPS, PAIRS, BETA = 32000, 4, 4, 0.001
INPUTS = "random tokens, log-normal lengths: prompts of 60 and responses of 90 tokens in the median"


def make_rows(count: int) -> list[dict]:
    ids = random_ids(VOCAB)
    return [
        {
            "prompt_ids": ids(60).tolist(),
            "response_ids": [ids(90).tolist(), ids(90).tolist()],
            "win_rate": [1.0, 0.0],
        }
        for _ in range(count)
    ]


def tokens_of(rows: list[dict]) -> int:
    """Tokens of prompts and responses, the prompt counted for each, whatever a trainer computes."""
    return sum(len(r["prompt_ids"]) + len(y) for r in rows for y in r["response_ids"])


def settings(steps: int) -> dict:
    return {
        "logging_steps": 2,
        "max_steps": steps,
        "per_device_train_batch_size": PAIRS,
        "per_device_eval_batch_size": PAIRS,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
    }


def ours(folder: str, steps: int):
    from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

    args = SPPOConfig(**common(folder), **settings(steps), eta=1 / BETA)
    trainer = SPPOTrainer(llama(VOCAB), args, make_rows(steps * PAIRS))
    trainer.prepare()
    return trainer


def trl(folder: str, steps: int):
    from datasets import Dataset

    model = llama(VOCAB)
    # Any reference will do: its log-probs come as columns, and it is dropped.
    trainer = dpo_trainer(model, llama(VOCAB), folder, beta=BETA, **settings(steps))
    trainer.ref_model, trainer.precompute_ref_logps = None, True
    data = []
    with torch.no_grad():
        for row in make_rows(steps * PAIRS):
            data.append({"prompt_ids": row["prompt_ids"]})
            for which, y in zip(("chosen", "rejected"), row["response_ids"], strict=True):
                logits = model(torch.tensor([row["prompt_ids"] + y])).logits
                logp = logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1]
                logp = float(logp.gather(-1, torch.tensor(y)[:, None]).sum())
                data[-1] |= {f"{which}_ids": y, f"ref_{which}_logps": logp}
    trainer.train_dataset = Dataset.from_list(data)
    return trainer


def clocked(trainer, inside: bool) -> dict[str, list[float]]:
    """CPU seconds, by the end of training: of "steps", each but the first with its collation.

    With `inside` also the sum over those steps of the "work" of the model, loss and optimizer.
    """
    from transformers import TrainerCallback

    found: dict[str, list[float]] = {"steps": [], "work": []}

    def timed(owner, name: str) -> None:
        work = getattr(owner, name)

        def wrapper(*args, **kwargs):
            began = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                found["work"].append(time.process_time() - began)

        setattr(owner, name, wrapper)

    if inside:
        trainer.create_optimizer()
        for owner, name in (
            (trainer._forward, "loss"), (trainer.accelerator, "backward"),
            (trainer.accelerator, "clip_grad_norm_"), (trainer.optimizer, "step"),
        ):  # fmt: skip
            timed(owner, name)

    class Clock(TrainerCallback):
        """From the end of the first step on: what starting a run costs is not a step's."""

        before = None

        def on_step_end(self, args, state, control, **_):
            now = time.process_time()
            if self.before is None:
                found["work"].clear()
            else:
                found["steps"].append(now - self.before)
            self.before = now

    trainer.add_callback(Clock())
    return found


def one(which: str, steps: int) -> dict:
    """Train with one of the two, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ours": ours, "trl": trl}[which](folder, steps)
        seconds = clocked(trainer, inside=which == "ours")
        before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        peak = extra_peak(trainer.train)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = make_rows(steps * PAIRS)
    tokens = [tokens_of(rows[i : i + PAIRS]) for i in range(0, len(rows), PAIRS)]
    found = {
        "which": which,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": sum(tokens) / wall,
        "tokens_per_cpu_second": sum(tokens) / cpu,
        "cpu_seconds_per_token": [s / n for s, n in zip(seconds["steps"], tokens[1:], strict=True)],
        "rss_before_mib": before / 2**20,
        "peak_extra_mib": peak / 2**20,
        "loss": trainer.state.log_history[0]["loss"],
    }
    if which == "ours":
        found["outside"] = 1 - sum(seconds["work"]) / sum(seconds["steps"])
    return found


def both(steps: int, seconds: float | None = None) -> dict[str, dict | str]:
    """Each trainer in a process and on a core of its own, side by side; a text says what failed."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {
        which: Process("benchmarks.trainer_step", which, "--steps", str(steps), env=env)
        for which in ("ours", "trl")
    }
    end = None if seconds is None else time.monotonic() + seconds
    found: dict[str, dict | str] = {}
    for which, process in running.items():
        status, out, why = process.finish(None if end is None else max(1.0, end - time.monotonic()))
        found[which] = SPENT if status is None else f"cannot run: {why[:120]}"
        if status == 0:
            found[which] = json.loads(out.strip().splitlines()[-1])
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
        row.extra_peak = int(result["peak_extra_mib"] * 2**20)
        row.note = f"CPU time, one thread, steps 2 to {steps}"
        if "outside" in result:
            row.note += f"; {result['outside']:.1%} of it outside model, loss and optimizer"
    if all(isinstance(result, dict) for result in found.values()):
        # The paper's units (eta = 1000), and a sum over the pair instead of the mean.
        same = 2 * found["ours"]["loss"] / BETA**2
        error = abs(found["trl"]["loss"] - same) / same
        if not passed(out[1], lambda: within(error, 1e-3, "its loss differs: ")):
            out[1].times = []
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks trainer", description=__doc__)
    parser.add_argument("which", nargs="?", choices=("ours", "trl"), help="one, in this process")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = outputs(parser).parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, got {args.steps}")
    if args.which:
        print(json.dumps(one(args.which, args.steps)))
        return 0
    finish(rows_of(both(args.steps, args.seconds), args.steps), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
