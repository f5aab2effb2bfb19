"""`sppo tune`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from sppo_kernels import backend
from sppo_kernels.selfplay.options import OptionError


def shape(text: str) -> tuple[int, int]:
    """(rows, vocabulary) of a word such as 8192x128256."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"expected ROWSxVOCABULARY, got {text!r}")
    return int(found[1]), int(found[2])


def run(argv: list[str]) -> None:
    """time Triton block sizes on this GPU and keep the best

    Without --out the table is the user's own, which every later process reads (docs/tuning.md).
    """
    parser = argparse.ArgumentParser(prog="sppo tune", description=run.__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxVOCABULARY")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["bfloat16"])
    parser.add_argument("--out", type=Path, help="table to write; default: the user's own")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds")
    args = parser.parse_args(argv)
    if args.budget <= 0:
        raise OptionError(f"--budget: expected a positive number of seconds, got {args.budget}")
    why = backend.triton_error()
    if why is not None:
        raise OptionError(f"tune: {why}")
    from sppo_kernels.logps.triton.tuning import tune

    found = tune(args.shapes, [getattr(torch, n) for n in args.dtypes], args.out, args.budget)
    for e in found.entries:
        print(
            f"{e['kernel']:9}{e['dtype']:9} {e['rows']} x {e['columns']}: block {e['block']}, "
            f"{e['warps']} warps, {e['ms']:.3f} ms (default {e['default_ms']:.3f} ms)"
        )
    for heading, texts in (("refused", found.refused), ("left out, no time", found.left_out)):
        for text in texts:
            print(f"{heading}: {text}")
    print(f"written: {found.path}")
