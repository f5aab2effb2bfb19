"""TRL's DPOTrainer with and without `patch()`: its head, a whole step, and peak memory.

python -m benchmarks trl --json benchmarks/results/<machine>/trl.json

The trainer, the weights and the batches are the same for all; only the functions differ:

    trl            as installed: on a CPU every position is scored
    trl, compact   TRL's own function on the positions that have a label, as it does on a GPU
    patched        sppo_kernels.integrations.trl.patched()

`head` is TRL's own fused forward on hidden states that are there already: the policy with the four
outputs DPO asks for, its backward, and the reference. `step` is `training_step` and the optimizer.
Lengths are log-normal, as in trainer_step. Times are of one batch after the other, the functions in
turn; the gate compares loss and all gradients before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Refused,
    Result,
    environment,
    in_fresh_process,
    interleaved,
    resident_extra_peak,
    write_json,
)
from sppo_kernels.testing import relative_error

VOCAB, PAIRS, BATCHES, BETA = 50257, 2, 1, 0.1
PROVIDERS = ("patched", "trl", "trl, compact")
GATE = 1e-4  # relative error of a float32 gradient; the two orders of summation differ by 1e-6


@contextlib.contextmanager
def provider(name: str):
    """TRL as `name` has it, within."""
    from trl.trainer import utils

    from sppo_kernels.integrations.trl import patched

    if name == "patched":
        with patched():
            yield
    elif name == "trl, compact":
        original = utils._use_triton
        utils._use_triton = lambda device: True
        try:
            yield
        finally:
            utils._use_triton = original
    else:
        yield


def make_model(vocab: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


def make_batches(vocab: int, pairs: int, count: int) -> list[dict[str, Tensor]]:
    """Batches as TRL's collator makes them: chosen rows first, padded, completions marked."""
    g = torch.Generator().manual_seed(1)

    def ids(median: float) -> Tensor:
        n = int((median * torch.exp(0.75 * torch.randn((), generator=g))).clamp(4, 600))
        return torch.randint(3, vocab, (n,), generator=g)

    batches = []
    for _ in range(count):
        prompts = [ids(60) for _ in range(pairs)]
        answers = [ids(90) for _ in range(2 * pairs)]
        rows = [torch.cat([prompts[i % pairs], y]) for i, y in enumerate(answers)]
        marks = [
            torch.cat([torch.zeros(len(row) - len(y)), torch.ones(len(y))]).long()
            for row, y in zip(rows, answers, strict=True)
        ]
        pad = nn.utils.rnn.pad_sequence
        batches.append(
            {
                "input_ids": pad(rows, batch_first=True),
                "attention_mask": pad([torch.ones_like(r) for r in rows], batch_first=True),
                "completion_mask": pad(marks, batch_first=True),
            }
        )
    return batches


def make_trainer(vocab: int, folder: str):
    """TRL's trainer on the model, its reference and no data: batches are given by hand."""
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
    args = DPOConfig(
        output_dir=folder,
        loss_type="sppo_hard",
        beta=BETA,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=None,
        **{checkpointing: False},
        disable_tqdm=True,
        learning_rate=0.0,  # the optimizer does its work, and the weights stay the same for all
        optim="adamw_torch",
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a"}])
    model = make_model(vocab)
    reference = copy.deepcopy(model)
    with torch.no_grad():  # a policy that has moved: log-ratios, and so the loss, are not constant
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    trainer = DPOTrainer(
        model, reference, args=args, train_dataset=text, processing_class=tokenizer
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets before it makes steps
    return trainer


def step_of(trainer, batches: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """One training step on every batch."""

    def step() -> Tensor:
        loss = torch.zeros(())
        for batch in batches:
            loss += trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        return loss

    return step


def head_of(trainer, batches: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """What a step does after the hidden states, forward and backward, on every batch."""
    work = []
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        hidden = []
        for model in (trainer.model, trainer.ref_model):
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            with torch.no_grad():
                hidden.append(model.base_model(**inputs).last_hidden_state)
        work.append((labels, hidden))

    def head() -> Tensor:
        total = torch.zeros(())
        for labels, hidden in work:
            policy, reference = trainer.model, trainer.ref_model
            states = hidden[0].clone().requires_grad_()
            with given(policy, states), given(reference, hidden[1]):
                logps = policy(labels=labels, fused_lm_head=True).log_probs.sum(1)
                with torch.no_grad():
                    ref = reference(labels=labels, fused_lm_head=True).log_probs.sum(1)
            chosen, rejected = (logps - ref).chunk(2)
            target = 0.5 / BETA
            loss = ((chosen - target) ** 2 + (rejected + target) ** 2).mean()
            loss.backward()
            total += loss.detach()
            policy.zero_grad()
        return total

    return head


@contextlib.contextmanager
def given(model, hidden: Tensor):
    """`model` with a base model that returns the hidden states."""
    model.base_model.forward = lambda **_: types.SimpleNamespace(last_hidden_state=hidden)
    try:
        yield
    finally:
        del model.base_model.forward


class Switch(contextlib.ExitStack):
    """Changes from provider to provider outside the clock."""

    def before(self, name: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def setup() -> None:
            self.close()
            self.enter_context(provider(name))

        function.setup = setup
        return function


def within(name: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with provider(name):
            return function()

    return run


def gate(trainer, batch: dict[str, Tensor], name: str) -> float:
    """Largest relative error of the loss and the gradients against TRL's own.

    Raises:
        Refused: it is above GATE.
    """
    found = []
    for which in ("trl", name):
        trainer.model.zero_grad()
        with provider(which):
            loss = trainer.training_step(trainer.model, dict(batch))
        found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        found[-1]["loss"] = loss
    trainer.model.zero_grad()
    errors = {n: relative_error(found[1][n], found[0][n]) for n in found[0]}
    worst = max(errors, key=errors.get)
    if not errors[worst] <= GATE:
        raise Refused(f"{name}: {worst} is wrong by {errors[worst]:.2e}")
    return errors[worst]


def build(vocab: int, pairs: int, batches: int, folder: str):
    """The trainer, made under the patch so that its models carry the guard, and the batches."""
    with provider("patched"):
        trainer = make_trainer(vocab, folder)
    return trainer, make_batches(vocab, pairs, batches)


def memory(name: str, vocab: int, pairs: int) -> dict[str, int]:
    """Bytes above what is there before, of a step and of its head, in this fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = build(vocab, pairs, 1, folder)
        short = [{k: v[:, :8].contiguous() for k, v in batches[0].items()}]
        short[0]["completion_mask"][:, -2:] = 1
        found = {}
        for what, make in (("step", step_of), ("head", head_of)):
            within(name, make(trainer, short))()  # loads code, makes the optimizer's state
            function = within(name, make(trainer, batches))
            ctypes.CDLL(None).malloc_trim(0)
            found[what] = resident_extra_peak(function)
        return found


def measure(vocab: int, pairs: int, batches: int, repeats: int) -> list[Result]:
    """Times of all providers, gated."""
    device, results = torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        trainer, data = build(vocab, pairs, batches, folder)
        errors = {name: gate(trainer, data[0], name) for name in PROVIDERS if name != "trl"}
        number = f"{batches} batches" if batches > 1 else "a batch"
        case = f"V={vocab}, {number} of {2 * pairs} rows"
        for what, make in (("head", head_of), ("step", step_of)):
            with Switch() as switch:
                functions = {n: switch.before(n, make(trainer, data)) for n in PROVIDERS}
                times = interleaved(functions, repeats, device)
            results += [
                Result(f"trl-dpo-{what}", case, "float32", n, times[n], error=errors.get(n))
                for n in PROVIDERS
            ]
    return results


def ratios(results: list[Result]) -> dict[str, float]:
    """TRL's time (and peak memory) over ours, per group."""
    found = {}
    for result in results:
        if result.provider == "patched":
            continue
        ours = next(r for r in results if (r.group, r.provider) == (result.group, "patched"))
        key = f"{result.group}: {result.provider} / patched"
        found[f"{key}, time"] = result.median / ours.median
        if ours.extra_peak and result.extra_peak:
            found[f"{key}, memory"] = result.extra_peak / ours.extra_peak
    return found


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_step", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", choices=PROVIDERS, help="print the peaks of one provider")
    args = parser.parse_args(argv)
    if args.memory:
        print(json.dumps(memory(args.memory, args.vocab, args.pairs)))
        return []
    results = measure(args.vocab, args.pairs, args.batches, args.repeats)
    sizes = ("--vocab", str(args.vocab), "--pairs", str(args.pairs))
    for name in PROVIDERS if sys.platform == "linux" else ():
        peaks = in_fresh_process("benchmarks.trl_step", "--memory", name, *sizes)
        for result in results:
            if result.provider == name:
                result.extra_peak = peaks[result.group.removeprefix("trl-dpo-")]
    for r in results:
        peak = "" if r.extra_peak is None else f", peak {r.extra_peak / 2**20:.0f} MiB"
        print(f"{r.group:14} {r.provider:14} {statistics.median(r.times):8.3f} s{peak}")
    found = ratios(results)
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    if args.json:
        write_json(args.json, results, environment())
    return results


if __name__ == "__main__":
    main()
