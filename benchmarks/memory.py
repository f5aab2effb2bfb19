"""Extra resident memory of a step on the CPU, each provider in a process of its own (Linux).

One process makes the inputs on one thread and forks for every provider, so that each starts from
the same clean state and the inputs are made once:
python -m benchmarks.memory --group trainable --dtype bfloat16 --case '[2048, 1024, 50304, …]' NAME…
prints {"NAME": bytes, …}.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from benchmarks.rows import ROOT


def in_fresh_processes(
    names: Sequence[str], group: str, case: Sequence, dtype: str, timeout: float | None = None
) -> tuple[dict[str, int], str]:
    """Bytes by provider; those that are missing failed, or the time was up: the text says which."""
    command = [
        sys.executable, "-m", "benchmarks.memory", "--group", group, "--dtype", dtype,
        "--case", json.dumps(list(case)), "--threads", str(torch.get_num_threads()), "--", *names,
    ]  # fmt: skip
    worker = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = worker.communicate(timeout=timeout)
        why = errors.strip().splitlines()[-1] if errors.strip() else "it failed"
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, 9)  # the worker and what it forked
        out, _ = worker.communicate()
        why = "the time budget was spent"
    found: dict[str, int] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, why


def forked(measure: Callable[[], int]) -> int | None:
    """What `measure` returns in a forked child; None when the child fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, str(measure()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return int(text) if status == 0 else None


def measure(name: str, group: str, case: Sequence, inputs, small, threads: int) -> int:
    """Extra peak of one step of a provider, after a small one that loads its libraries."""
    from benchmarks import core
    from benchmarks import providers as p
    from benchmarks.harness import resident_extra_peak

    torch.set_num_threads(threads)
    if name == p.ceiling_name(group):
        run = p.ceiling(group, inputs)
        p.ceiling(group, small)()
    else:
        found = core.provider(name, group)
        core.step(name, found.loss, small, group)()  # loads libraries and starts threads
        run = core.step(name, found.loss, inputs, group)
        if found.compiles:  # what compiling takes is not a step's
            getattr(run, "setup", int)()
            run()
            p.clear(inputs)
    getattr(run, "setup", int)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_extra_peak(run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--group", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--case", required=True, type=json.loads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    from benchmarks import providers as p
    from benchmarks.inputs import Case, make_inputs, prepare

    case = Case(*args.case)
    kind = "logits" if args.group in p.LOGITS else "linear"
    dtype, cpu = getattr(torch, args.dtype), torch.device("cpu")
    inputs = prepare(args.group, make_inputs(kind, case, dtype, cpu))
    few = case._replace(rows=64, vocab=512)
    small = prepare(args.group, make_inputs(kind, few, dtype, cpu))
    for name in args.names:
        found = forked(
            lambda name=name: measure(name, args.group, case, inputs, small, args.threads)
        )
        if found is not None:
            print(json.dumps({name: found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
