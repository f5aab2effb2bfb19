"""The loss path against its ceilings and peers: hidden-in, frozen head, forward only, logits-in.

python -m benchmarks.core --groups trainable logits --dtypes bfloat16 --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import providers as p
from benchmarks.harness import (
    Refused,
    Result,
    cuda_extra_peak,
    environment,
    in_fresh_process,
    interleaved,
    resident_extra_peak,
    write_json,
)
from sppo_kernels.testing import relative_error

CPU_CASE = (2048, 1024, 50304)  # rows, hidden size, vocabulary
CUDA_CASES = [
    (8192, 4096, 128256),
    (8192, 896, 151936),
    (4096, 3584, 256000),
    (16384, 2048, 128256),
]
GROUPS = ("trainable", "frozen", "forward", "logits", "logits-forward")
GATE_ROWS = 64
# Largest relative error of a gradient against float64: a few roundings of the dtype.
GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Loss = Callable[[p.Inputs], Tensor]


def losses(group: str, device: torch.device) -> dict[str, Loss]:
    """The providers of a group by name, ours first."""
    impl = p.fast_impl(device)
    if group.startswith("logits"):
        found: dict[str, Loss] = {
            f"sppo-kernels {impl}": lambda i: p.ours_logits(i, impl),
            "eager": p.eager_logits,
            "eager, float32 log-probs": p.eager_float_logits,
            "torch.compile": lambda i: p.compiled(p.eager_logits)(i),
        }
        if group == "logits":
            found[f"sppo-kernels {impl}, in place"] = lambda i: p.ours_logits(i, impl, True)
        return found
    found = {
        f"sppo-kernels {impl}": lambda i: p.ours_linear(i, impl),
        "eager": p.eager_linear,
        "eager, float32 log-probs": p.eager_float_linear,
        "torch.compile": lambda i: p.compiled(p.eager_linear)(i),
        "TRL chunked": p.trl_linear,
    }
    if group == "trainable":
        found["Liger sppo_hard"] = p.liger_linear
    return found


def prepare(group: str, inputs: p.Inputs) -> p.Inputs:
    """Freeze what the group freezes."""
    if group == "frozen":
        inputs.weight.requires_grad_(False)
    if group.endswith("forward"):
        for leaf in inputs.leaves():
            leaf.requires_grad_(False)
    return inputs


def step(name: str, loss: Loss, inputs: p.Inputs, group: str) -> Callable[[], object]:
    """One call to time: the loss, and its backward where the group has one."""
    given = inputs.logits
    if name.endswith("in place"):  # its gradient replaces the logits: it works on a copy of its own
        inputs = replace(inputs, logits=given.detach().clone().requires_grad_())

    def run() -> None:
        if group.endswith("forward"):
            with torch.no_grad():
                loss(inputs)
            return
        p.clear(inputs)
        loss(inputs).backward()

    def setup() -> None:  # unclocked
        inputs.logits.grad = None
        inputs.logits.detach().copy_(given.detach())

    if inputs.logits is not given:
        run.setup = setup
    return run


def gate(name: str, loss: Loss, group: str, case: tuple[int, int, int], dtype, device) -> float:
    """Relative error of the gradients (or of the loss) against float64 on fewer rows."""
    rows, dim, vocab = min(GATE_ROWS, case[0]), case[1], case[2]
    kind = "logits" if group.startswith("logits") else "linear"
    inputs = prepare(group, p.make_inputs(kind, rows, dim, vocab, dtype, device))
    if name.startswith("Liger"):  # hard labels, no reference
        inputs.ref = torch.zeros_like(inputs.ref)
        inputs.win = (torch.arange(len(inputs.win), device=device) < len(inputs.win) // 2).float()
    exact = p.Inputs(
        inputs.labels, inputs.ref.double(), inputs.win.double(),
        *(
            None if t is None else t.detach().double().requires_grad_(t.requires_grad)
            for t in (inputs.hidden, inputs.weight, inputs.logits)
        ),
    )  # fmt: skip
    truth = p.eager_logits_exact(exact) if kind == "logits" else p.eager_linear_exact(exact)
    value = loss(inputs)
    error = relative_error(value, truth)
    if not group.endswith("forward"):
        truth.backward()
        value.backward()
        for got, want in zip(inputs.leaves(), exact.leaves(), strict=True):
            error = max(error, relative_error(got.grad, want.grad))
    if not error <= GATE[dtype]:
        raise Refused(f"wrong by {error:.1e}, more than {GATE[dtype]:.0e}")
    return error


def counted(group: str, case: tuple[int, int, int], dtype) -> tuple[float | None, float | None]:
    """Flops of the products, or bytes of the logits that must move, of one step."""
    rows, dim, vocab = case
    if group.startswith("logits"):
        passes = 1 if group.endswith("forward") else 3
        return None, float(rows * vocab * dtype.itemsize * passes)
    parts = {"trainable": 3, "frozen": 2, "forward": 1}[group]
    return 2.0 * rows * dim * vocab * parts, None


def run_case(
    group: str,
    case: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    memory: bool,
    only: list[str] | None = None,
) -> list[Result]:
    """Gate, then time every provider of a group in turn, then measure memory."""
    torch._dynamo.reset()
    p.compiled.cache_clear()
    title = f"N={case[0]} V={case[2]}" + ("" if group.startswith("logits") else f" D={case[1]}")
    kind = "logits" if group.startswith("logits") else "linear"
    flops, moved = counted(group, case, dtype)
    results: dict[str, Result] = {}
    runs: dict[str, Callable[[], object]] = {}
    inputs = prepare(group, p.make_inputs(kind, *case, dtype, device))
    for name, loss in losses(group, device).items():
        if only and not any(word in name for word in only):
            continue
        result = Result(group, title, str(dtype)[6:], name, flops=flops, bytes=moved)
        results[name] = result
        try:
            result.error = gate(name, loss, group, case, dtype, device)
        except Refused as refusal:
            result.note = f"refused: {refusal}"
        except Exception as error:
            result.note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
        else:
            runs[name] = step(name, loss, inputs, group)
    if kind == "linear":
        parts = {"trainable": 3, "frozen": 2, "forward": 1}[group]
        name = f"bare GEMMs ({parts})"
        runs[name] = p.gemms(inputs, parts)
    else:
        name = "copy of the logits"
        runs[name] = lambda: inputs.logits.detach().clone()
    results[name] = Result(group, title, str(dtype)[6:], name, flops=flops, bytes=moved)
    for name, times in interleaved(runs, repeats, device).items():
        results[name].times = times
    if memory:
        p.clear(inputs)
        for name in runs:
            if device.type == "cuda":
                results[name].extra_peak = cuda_extra_peak(runs[name])
                p.clear(inputs)
                continue
            try:
                results[name].extra_peak = in_fresh_process(
                    "benchmarks.core", "--memory-of", name, "--groups", group,
                    "--dtypes", str(dtype)[6:], "--case", *map(str, case),
                )["extra_peak"]  # fmt: skip
            except Refused as refusal:
                results[name].note = f"memory: {refusal}"
    return list(results.values())


def memory_of(name: str, group: str, case: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Extra resident memory of one step of one provider; meant for a fresh process."""
    device = torch.device("cpu")
    kind = "logits" if group.startswith("logits") else "linear"
    small = prepare(group, p.make_inputs(kind, 8, case[1], 512, dtype, device))
    inputs = prepare(group, p.make_inputs(kind, *case, dtype, device))
    found = losses(group, device)
    if name in found:
        step(name, found[name], small, group)()  # loads libraries and starts threads
        run = step(name, found[name], inputs, group)
    elif name.startswith("bare"):
        run = p.gemms(inputs, int(name[-2]))
    else:
        run = lambda: inputs.logits.detach().clone()  # noqa: E731
    return resident_extra_peak(run)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"],
        choices=["bfloat16", "float16", "float32"],
    )  # fmt: skip
    parser.add_argument("--case", nargs=3, type=int, metavar=("N", "D", "V"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="providers whose name has one of these words")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Result]:
    args = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = (
        [tuple(args.case)] if args.case else ([CPU_CASE] if device.type == "cpu" else CUDA_CASES)
    )
    dtypes = [getattr(torch, name) for name in args.dtypes]
    if args.memory_of:
        bytes_ = memory_of(args.memory_of, args.groups[0], cases[0], dtypes[0])
        print(json.dumps({"extra_peak": bytes_}))
        return []
    results = []
    for case in cases:
        for dtype in dtypes:
            for group in args.groups:
                print(f"{group} {case} {dtype}", file=sys.stderr, flush=True)
                results += run_case(
                    group, case, dtype, device, args.repeats, not args.no_memory, args.only
                )
    if args.json:
        write_json(args.json, results, environment())
    from benchmarks.render import print_table

    print_table(results)
    return results


if __name__ == "__main__":
    main()
