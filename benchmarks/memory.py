"""Extra resident memory of a step on the CPU, each provider in a process of its own (Linux).

One process makes the inputs on one thread and forks for every provider, so that each starts from
the same clean state and the inputs are made once:
python -m benchmarks.memory '[["NAME", …], "trainable", [2048, 1024, 50304, …], "bfloat16", 2]'
prints {"NAME": bytes} a line; the last value is the number of threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import Process, extra_peak, forked, set_up
from benchmarks.inputs import Case, Inputs


def in_fresh_processes(
    names: Sequence[str], group: str, case: Case, dtype: str, timeout: float | None = None
) -> tuple[dict[str, int], str]:
    """Bytes by provider; those that are missing failed, or the time was up: the text says which."""
    work = json.dumps([names, group, case, dtype, torch.get_num_threads()])
    _, out, why = Process("benchmarks.memory", work).finish(timeout)
    found: dict[str, int] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, why


def measure(name: str, group: str, inputs: Inputs, small: Inputs, threads: int) -> int:
    """Extra peak of one step of a provider, after a small one that loads its libraries."""
    from benchmarks import core
    from benchmarks import providers as p

    torch.set_num_threads(threads)
    if name == p.ceiling_name(group):
        p.ceiling(group, small)()
        return extra_peak(p.ceiling(group, inputs))
    found = next(q for q in p.of_group(group) if q.name == name)
    core.step(found, small, group)()  # loads libraries and starts threads
    run = core.step(found, inputs, group)
    if found.compiles:  # what compiling takes is not a step's
        set_up(run)()
    return extra_peak(set_up(run))


def main(argv: list[str] | None = None) -> int:
    names, group, case, dtype, threads = json.loads((sys.argv[1:] if argv is None else argv)[0])
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    from benchmarks.core import kind_of
    from benchmarks.inputs import make_inputs, prepare

    def inputs(case: Case) -> Inputs:
        found = make_inputs(kind_of(group), case, getattr(torch, dtype), torch.device("cpu"))
        return prepare(group, found)

    case = Case(*case)
    large, small = inputs(case), inputs(case._replace(rows=64, vocab=512))
    for name in names:
        found = forked(lambda name=name: measure(name, group, large, small, threads))
        if found is not None:
            print(json.dumps({name: found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
