"""SHA-256 of values and gradients, so that a change of structure shows that it changed no bit.

    python -m tests.pinned            # compare with tests/pinned.json
    python -m tests.pinned --write    # record this machine's

Bits depend on the processor, its BLAS and the libraries' versions, so hashes are kept a machine; on
one that is not in the file nothing is compared. What changes on purpose is recorded anew, and
docs/decisions.md says which and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sppo_kernels as sk

FILE = Path(__file__).with_suffix(".json")
BACKENDS = ("reference", "native", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def machine() -> str:
    """What decides the bits: instruction set and the versions that compute."""
    from importlib.metadata import version

    names = ("torch", "triton", "transformers")
    isa = torch.backends.cpu.get_cpu_capability()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else (platform.processor(),),
        "",
    )
    return ", ".join([model, isa, *(f"{name} {version(name)}" for name in names)])


def digest(values: Any) -> str:
    """Hash of tensors (shape, dtype, bytes), or of anything JSON can say, in order."""
    whole = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().flatten()
            whole.update(f"{tuple(value.shape)} {value.dtype}".encode())
            whole.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        else:
            whole.update(json.dumps(value, sort_keys=True).encode())

    add(values)
    return whole.hexdigest()


# --- log-probs and losses -------------------------------------------------------------------------


def problem(dtype: torch.dtype, rows: int = 3, steps: int = 9, dim: int = 16, vocab: int = 67):
    """hidden, weight, bias, labels (some ignored), logits, ref_logps, win_rate, upstream."""
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(rows, steps, dim, generator=g).to(dtype)
    weight = (torch.randn(vocab, dim, generator=g) / 2).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype)
    labels = torch.randint(0, vocab, (rows, steps), generator=g)
    labels[1, 2:5] = -100
    logits = (torch.randn(rows, steps, vocab, generator=g) * 3).to(dtype)
    ref, win = torch.randn(rows, generator=g) - 30, torch.rand(rows, generator=g)
    return hidden, weight, bias, labels, logits, ref, win, torch.randn(rows, steps, generator=g)


def graded(function: Callable[..., Any], *leaves: Tensor | None) -> list[Tensor]:
    """Outputs, and gradients of the leaves for the upstream gradient that the function names."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    value, upstream, *more = function(*leaves)
    value.backward(upstream.to(value.dtype))
    found = [value, *more, *(t.grad for t in leaves if t is not None and t.grad is not None)]
    return [t.detach() for t in found]


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.7},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "logit_scale": 1.3, "softcap": 4.0},
}


def log_prob_cases(impl: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, dtype in DTYPES.items():
        hidden, weight, bias, labels, logits, ref, win, up = problem(dtype)

        def tokens(logits=logits, labels=labels, up=up, **options):
            return graded(lambda z: (sk.token_logps(z, labels, impl=impl, **options), up), logits)

        yield f"token_logps {name}", tokens
        yield f"token_logps in place {name}", lambda t=tokens: t(inplace_backward=True)

        def sequences(logits=logits, labels=labels, up=up):
            cu = torch.tensor([0, 4, 4, 20, 27])
            return graded(
                lambda z: (sk.sequence_logps(z, labels.view(-1), cu, impl=impl), up.view(-1)[:4]),
                logits.flatten(0, 1),
            )

        yield f"sequence_logps packed {name}", sequences

        def fused(logits=logits, labels=labels, ref=ref, win=win, units="log_ratio"):
            def run(z):
                out = sk.fused_sppo_loss(
                    z, labels, ref, win, eta=20.0, units=units, impl=impl,
                    weights=torch.tensor([1.0, 0.0, 2.5]),
                )  # fmt: skip
                return out.loss, torch.tensor(3.0), out.logps

            return graded(run, logits)

        yield f"fused_sppo_loss {name}", fused
        yield f"fused_sppo_loss win_rate units {name}", lambda f=fused: f(units="win_rate")

        for head, options in HEADS.items():
            options = dict(options)
            given = bias if options.pop("bias", False) else None

            def linear(options=options, given=given, h=hidden, w=weight, y=labels, up=up, **more):
                def run(h, w, b=None):
                    out = sk.linear_token_logps(h, w, y, bias=b, impl=impl, **options, **more)
                    return out, up

                return graded(run, h, w, *([] if given is None else [given]))

            yield f"linear_token_logps {head} {name}", linear
        yield f"linear_token_logps over budget {name}", lambda f=linear: f(memory_budget=2000)

        def frozen(h=hidden, w=weight, y=labels, up=up):
            run = lambda h: (sk.linear_sequence_logps(h, w, y, impl=impl), up[:, 0])  # noqa: E731
            return graded(run, h)

        yield f"linear_sequence_logps frozen {name}", frozen

        def shared_rows(h=hidden, w=weight, y=labels, up=up):
            rows = torch.tensor([3, 0, 3, 7, 7, 7, 20, 1, 2])
            cu = torch.tensor([0, 3, 9])

            def run(h, w):
                out = sk.linear_sequence_logps(h, w, y[2], cu, rows=rows, impl=impl)
                return out, up[0, :2]

            return graded(run, h, w)

        yield f"linear_sequence_logps rows {name}", shared_rows

        def stats(h=hidden, w=weight, b=bias, y=labels, up=up, grad=False):
            outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

            def run(h, w, b):
                s = sk.linear_token_stats(
                    h, w, y, bias=b, softcap=6.0, outputs=outputs, entropy_grad=grad, impl=impl
                )
                total = s.logps * up + (s.entropy * up.flip(0) if grad else 0)
                return total.sum(), torch.tensor(1.0), *s

            return graded(run, h, w, b)

        yield f"linear_token_stats {name}", stats
        yield f"linear_token_stats entropy gradient {name}", lambda s=stats: s(grad=True)

        for kind, budget in (("whole", None), ("groups", 10 * 67 * 4)):
            for units in ("log_ratio", "win_rate"):

                def loss(
                    h=hidden, w=weight, b=bias, y=labels, ref=ref, win=win, budget=budget, u=units
                ):
                    def run(h, w, b):
                        out = sk.fused_linear_sppo_loss(
                            h, w, y, ref, win, bias=b, eta=20.0, units=u, memory_budget=budget,
                            weights=torch.tensor([1.0, 0.5, 2.0]), impl=impl,
                        )  # fmt: skip
                        return out.loss, torch.tensor(2.0), out.logps

                    return graded(run, h, w, b)

                yield f"fused_linear_sppo_loss {kind} {units} {name}", loss


def loss_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from sppo_kernels.loss.objectives import KINDS

    g = torch.Generator().manual_seed(5)
    a, b, c, d, e, f = (torch.randn(6, generator=g) * 4 - 40 for _ in range(6))
    wins = torch.rand(2, 6, generator=g)
    lengths = torch.randint(1, 30, (2, 6), generator=g)
    tensors = {
        **{"ref_chosen_logps": c, "ref_rejected_logps": d},
        **{"previous_chosen_logps": e, "previous_rejected_logps": f},
        **{"chosen_win": wins[0], "rejected_win": wins[1], "kl": torch.tensor(0.3)},
        **{"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]},
    }
    needed = {"alpha": 0.4, "reference_share": 0.3, "label_smoothing": 0.1}

    for kind, objective in KINDS.items():
        given = {n: tensors[n] for n in objective.needs}
        given |= {n: needed[n] for n, default in objective.settings.items() if default is None}

        def run(kind=kind, given=given):
            return graded(
                lambda x, y: (sk.pairwise_loss(x, y, kind=kind, **given), torch.tensor(1.5)), a, b
            )

        yield f"pairwise_loss {kind}", run

    def sppo(units: str):
        run = lambda x: (sk.sppo_loss(x, c, wins[0], eta=30.0, units=units), torch.tensor(1.0))  # noqa: E731
        return graded(run, a)

    for units in ("log_ratio", "win_rate"):
        yield f"sppo_loss {units}", lambda u=units: sppo(u)


# --- games ----------------------------------------------------------------------------------------


def game_cases(impl: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    g = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(21, 5, 5, generator=g)
    lengths = torch.randint(2, 6, (21,), generator=g)
    P = sk.symmetrize(logits, impl="reference")
    counts = torch.randint(1, 9, (21, 5, 5), generator=g).double()
    counts = counts + counts.mT
    i, j = torch.randint(0, 4, (2, 80), generator=g)
    j = torch.where(i == j, 4, j)
    game = torch.randint(0, 9, (80,), generator=g)
    outcome = torch.rand(80, generator=g)

    def targets(**options):
        def run(x):
            out = sk.sppo_targets(x, logits=True, lengths=lengths, impl=impl, **options)
            value = (out.win_rate * 2 + out.target).sum() + out.chosen_prob.sum()
            return value, torch.tensor(1.0), *out

        return graded(run, logits)

    yield "sppo_targets", targets
    yield "sppo_targets uclaml", lambda: targets(preset="uclaml")
    yield (
        "sppo_targets with self, by probabilities",
        lambda: targets(mode="prob", include_self=True),
    )
    yield "symmetrize", lambda: sk.symmetrize(logits, impl=impl)
    yield "win_rates", lambda: sk.win_rates(P, lengths, impl=impl)
    yield "select_pairs", lambda: sk.select_pairs(P, lengths=lengths, impl=impl)
    yield "nash", lambda: sk.nash(P, lengths, impl=impl)
    yield "nash by mirror descent", lambda: sk.nash(P, method="mirror", max_iter=200, impl=impl)
    yield "regularized_nash", lambda: sk.regularized_nash(P, tau=0.05, lengths=lengths, impl=impl)
    yield "bradley_terry", lambda: sk.bradley_terry(P, lengths, counts=counts, impl=impl)
    yield "tournament", lambda: sk.tournament(P, lengths, impl=impl)
    yield "aggregate", lambda: sk.aggregate(i, j, outcome, game=game, impl=impl)


# --- trainer and loop -----------------------------------------------------------------------------


def trainer_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from tests.trainer_models import build, rows

    def step(family: str, **changes: Any) -> list[Tensor]:
        from sppo_kernels.trainer import SPPOConfig, SPPOTrainer

        torch.manual_seed(7)
        model = build(family)
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                **{"output_dir": folder, "use_cpu": True, "report_to": "none", "max_steps": 2},
                **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, "eta": 30.0},
                **{"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
            }
            args = SPPOConfig(**(settings | changes))
            trainer = SPPOTrainer(model, args, rows(torch.Generator().manual_seed(2), 4, 3))
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            trainer.release()
        return [losses, *(p for _, p in sorted(model.state_dict().items()))]

    yield "trainer, packed", lambda: step("llama-tied", packing="shared")
    yield "trainer, padded, scaled head", lambda: step("cohere-scale", packing="padded")
    yield "trainer, logits", lambda: step("gemma2-softcap", head="logits", packing="padded")
    yield "trainer, dpo", lambda: step("llama-untied", objective="dpo", packing="padded")


def loop_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Columns of the files that a whole run of `sppo iterate` leaves."""
    from tests.loop_run import run_loop

    done: dict[str, Any] = {}

    def files() -> dict[str, Any]:
        if not done:
            done.update(run_loop())
        return done

    names = ("answers", "judged", "held out", "weights", "results")
    for name in names:
        yield f"loop, {name}", lambda n=name: files()[n]


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for impl in BACKENDS:
        for name, run in log_prob_cases(impl):
            yield f"{impl}: {name}", run
    for impl in ("reference", "native"):
        for name, run in game_cases(impl):
            yield f"{impl}: {name}", run
    yield from loss_cases()
    yield from trainer_cases()
    yield from loop_cases()


def current(only: str = "") -> dict[str, str]:
    """Every case's hash (of names that hold `only`), here and now, on one thread."""
    torch.set_num_threads(1)
    return {name: digest(run()) for name, run in cases() if only in name}


def differences(found: dict[str, str], recorded: dict[str, str]) -> list[str]:
    names = sorted(set(found) | set(recorded))
    return [name for name in names if found.get(name) != recorded.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record this machine's hashes")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    write = args.write
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    found, recorded = current(args.only), table.get(machine())
    if recorded is not None:
        recorded = {name: value for name, value in recorded.items() if args.only in name}
    if recorded is not None:
        for name in differences(found, recorded):
            print(f"differs: {name}")
    if write:
        table[machine()] = table.get(machine(), {}) | found if args.only else found
        FILE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(found)} cases, {machine()}")
    if recorded is None and not write:
        print("this machine has no recorded hashes: nothing was compared")
    return bool(recorded is not None and differences(found, recorded) and not write)


if __name__ == "__main__":
    sys.exit(main())
