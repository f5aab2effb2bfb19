"""The command `sppo`."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": "sample K responses to each prompt from a model",
    "judge": "compare the responses of each prompt and write win rates",
    "train": "train on judged responses",
    "iterate": "rounds of generate, judge and train (self-play); resumable",
    "convert": "to and from the columns of the released SPPO data",
    "demo": "three rounds of self-play of a small model, on CPU in minutes",
    "tune": "time Triton block sizes on this GPU and keep the best",
    "env": "what is installed and which backend runs",
}


def usage() -> str:
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    return (
        "usage: sppo COMMAND [options]\n\ncommands:\n"
        + "\n".join(lines)
        + (
            "\n\n`sppo COMMAND --help` lists options; `--config FILE.yaml` (or .json) reads them "
            "from a file, and flags override it."
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that name their cause are printed without a trace, with status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command = argv.pop(0)
    if command not in COMMANDS:
        print(f"sppo: no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if not logging.getLogger("sppo_kernels").handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("sppo: %(message)s"))
        logging.getLogger("sppo_kernels").addHandler(handler)
        logging.getLogger("sppo_kernels").setLevel(logging.INFO)
    module = importlib.import_module(f"sppo_kernels.cli.{command}")
    try:
        module.run(argv)
    except (ValueError, OSError, RuntimeError, ImportError, TypeError) as error:
        from sppo_kernels.data.rows import DataError
        from sppo_kernels.judges import JudgeError

        named = (DataError, JudgeError, OSError, ImportError)
        own = type(error).__module__.startswith("sppo_kernels")
        if not (own or isinstance(error, named)):
            raise
        print(f"sppo {command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def console() -> None:
    """Entry point of the installed script."""
    sys.exit(main())
