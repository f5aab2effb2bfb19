"""python -m benchmarks COMMAND: figures with their ceilings and peers from the same run."""

from __future__ import annotations

import importlib
import sys

# command: module with main(argv), what it does
COMMANDS = {
    "run": ("benchmarks.suite", "measure: loss path, games, trainer; within a time budget"),
    "compare": ("benchmarks.compare", "two results files: what got slower, beyond the spread"),
    "render": ("benchmarks.render", "the Markdown table of a results file"),
    "plot": ("benchmarks.plot", "plots of a results file, PNG and SVG"),
    "readme": ("benchmarks.readme", "write the README's figures from the results, or check them"),
    "sweep": ("benchmarks.sweeps", "times over N, V, D, prompt share, length spread, K"),
    "kernels": ("benchmarks.kernels", "what the compilers made of every kernel; needs no GPU"),
    "games": ("benchmarks.games", "preference games against evalica, choix, nashpy, scipy"),
    "trainer": ("benchmarks.trainer_step", "SPPOTrainer against TRL's DPOTrainer"),
    "trl": ("benchmarks.trl_step", "TRL's DPOTrainer with and without our backend"),
    "gpu": ("benchmarks.gpu", "build, tests and measurements on a GPU, without network"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([__doc__, "", *lines, "", "Options: python -m benchmarks COMMAND --help"])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"benchmarks: no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    found = importlib.import_module(COMMANDS[argv[0]][0])
    status = found.main(argv[1:])
    return status if isinstance(status, int) else 0  # some return what they measured


if __name__ == "__main__":
    sys.exit(main())
