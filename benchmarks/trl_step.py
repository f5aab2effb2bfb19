"""TRL's DPOTrainer with and without `patch()`: its head, a whole step, and peak memory.

python -m benchmarks trl --json benchmarks/results/<machine>/trl.json

The trainer, the weights and the batches are the same for all; only the functions differ:

    trl            as installed: on a CPU every position is scored
    trl, compact   TRL's own function on the positions that have a label, as it does on a GPU
    patched        sppo_kernels.integrations.trl.patched()

`head` is TRL's own fused forward on hidden states that are there already: the policy with the four
outputs DPO asks for, its backward, and the reference. `step` is `training_step` and the optimizer.
Times are of one batch after the other, the functions in turn; the gate compares loss and all
gradients with TRL's own before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import tempfile
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import LINUX, Process, extra_peak, interleaved, passed, within
from benchmarks.render import finish, outputs
from benchmarks.rows import Row, same_case
from benchmarks.training import dpo_trainer, llama, random_ids
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


def make_batches(vocab: int, pairs: int, count: int) -> list[dict[str, Tensor]]:
    """Batches as TRL's collator makes them: chosen rows first, padded, completions marked."""
    ids, batches = random_ids(vocab), []
    for _ in range(count):
        prompts = [ids(60) for _ in range(pairs)]
        answers = [ids(90) for _ in range(2 * pairs)]
        rows = [torch.cat([prompts[i % pairs], y]) for i, y in enumerate(answers)]
        marks = [
            (torch.arange(len(row)) >= len(row) - len(y)).long()
            for row, y in zip(rows, answers, strict=True)
        ]
        names = {
            "input_ids": rows,
            "attention_mask": [torch.ones_like(r) for r in rows],
            "completion_mask": marks,
        }
        pad = nn.utils.rnn.pad_sequence
        batches.append({name: pad(found, batch_first=True) for name, found in names.items()})
    return batches


def make_trainer(vocab: int, folder: str):
    """TRL's trainer on the model, its reference and no data: batches are given by hand."""
    model = llama(vocab)
    reference = copy.deepcopy(model)
    with torch.no_grad():  # a policy that has moved: log-ratios, and so the loss, are not constant
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    # the optimizer does its work, and the weights stay the same for all
    trainer = dpo_trainer(
        model, reference, folder, beta=BETA, learning_rate=0.0, optim="adamw_torch"
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


WORK = {"head": head_of, "step": step_of}


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


def gate(trainer, batch: dict[str, Tensor], name: str) -> float | None:
    """Largest relative error of the loss and the gradients against TRL's own; of itself none.

    Raises:
        Refused: it is above GATE.
    """
    if name == "trl":
        return None
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
    return within(errors[worst], GATE, f"{name}: {worst} is ")


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
        for what in ("step", "head"):
            with provider(name):
                WORK[what](trainer, short)()  # loads code, makes the optimizer's state
            function = WORK[what](trainer, batches)
            with provider(name):
                found[what] = extra_peak(function)
        return found


def measure(
    vocab: int, pairs: int, batches: int, repeats: int, deadline: float | None = None
) -> list[Row]:
    """Times of all providers, gated."""
    number = f"{batches} batches" if batches > 1 else "a batch"
    case, rows = f"V={vocab}, {number} of {2 * pairs} rows", []
    with tempfile.TemporaryDirectory() as folder:
        trainer, data = build(vocab, pairs, batches, folder)
        verdict = functools.cache(functools.partial(gate, trainer, data[0]))
        for what, make in WORK.items():
            these = {n: Row(f"trl-dpo-{what}", case, "float32", n) for n in PROVIDERS}
            with Switch() as switch:
                calls = {
                    n: switch.before(n, make(trainer, data))
                    for n, row in these.items()
                    if passed(row, functools.partial(verdict, n))
                }
                for name, times in interleaved(calls, repeats, deadline=deadline).items():
                    these[name].times = times
            rows += these.values()
    return rows


def ratios(rows: list[Row]) -> dict[str, float]:
    """TRL's time (and peak memory) over ours, per group."""
    found = {}
    for row in rows:
        ours = next(r for r in same_case(rows, row) if r.provider == "patched")
        if row is ours or not (row.times and ours.times):
            continue
        key = f"{row.group}: {row.provider} / patched"
        found[f"{key}, time"] = row.median / ours.median
        if ours.extra_peak and row.extra_peak:
            found[f"{key}, memory"] = row.extra_peak / ours.extra_peak
    return found


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_step", description=__doc__)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", choices=PROVIDERS, help="print the peaks of one provider")
    args = outputs(parser).parse_args(argv)
    if args.memory:
        print(json.dumps(memory(args.memory, args.vocab, args.pairs)))
        return []
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    rows = measure(args.vocab, args.pairs, args.batches, args.repeats, deadline)
    sizes = ("--vocab", str(args.vocab), "--pairs", str(args.pairs))
    for name in PROVIDERS if LINUX else ():
        peaks = Process("benchmarks.trl_step", "--memory", name, *sizes).result()
        for row in rows:
            if row.provider == name and row.times:
                row.extra_peak = peaks[row.group.removeprefix("trl-dpo-")]
    finish(rows, args.json)
    for name, value in ratios(rows).items():
        print(f"{name}: {value:.2f}")
    return rows


if __name__ == "__main__":
    main()
