"""`sppo tune`: times Triton block sizes on this GPU and writes the best into a table.

    sppo tune [--shapes 8192x128256 ...] [--dtypes bfloat16 ...] [--out FILE] [--budget 120]

Without --out the table is the user's own, which every later process reads (docs/tuning.md).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sppo_kernels import backend
from sppo_kernels.cli.options import OptionError


def shape(text: str) -> tuple[int, int]:
    """(rows, vocabulary) of a word such as 8192x128256."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"expected ROWSxVOCABULARY, got {text!r}")
    return int(found[1]), int(found[2])


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="sppo tune", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxVOCABULARY")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"]
    )
    parser.add_argument("--out", type=Path, help="table to write; default: the user's own")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds")
    args = parser.parse_args(list(argv))
    if args.budget <= 0:
        raise OptionError(f"--budget: expected a positive number of seconds, got {args.budget}")
    why = backend.triton_error()
    if why is not None:
        raise OptionError(f"tune: {why}")
    from sppo_kernels.logps.triton.tuning import tune

    dtypes = [getattr(torch, name) for name in args.dtypes]
    outcome = tune(args.shapes, dtypes, args.out, args.budget)
    for e in outcome.entries:
        print(
            f"{e['kernel']:9}{e['dtype']:9} {e['rows']} x {e['columns']}: block {e['block']}, "
            f"{e['warps']} warps, {e['ms']:.3f} ms (default {e['default_ms']:.3f} ms)"
        )
    for text in outcome.refused:
        print(f"refused: {text}")
    for text in outcome.left_out:
        print(f"left out, no time: {text}")
    print(f"written: {outcome.path}")
