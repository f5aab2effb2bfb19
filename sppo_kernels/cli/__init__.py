"""The command `sppo`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from sppo_kernels.cli.commands import COMMANDS


def usage() -> str:
    about = {name: command.function.__doc__.split("\n")[0] for name, command in COMMANDS.items()}
    lines = "\n".join(f"  {name:10}{text}" for name, text in about.items())
    return (
        f"usage: sppo COMMAND [options]\n\ncommands:\n{lines}\n\n`sppo COMMAND --help` lists "
        "options; `--config FILE.yaml` (or .json) reads them from a file, and flags override it."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that name their cause are printed without a trace, with status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = argv.pop(0)
    if name not in COMMANDS:
        print(f"sppo: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    logger = logging.getLogger("sppo_kernels")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("sppo: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        COMMANDS[name].run(argv, f"sppo {name}")
    except (ValueError, OSError, RuntimeError, ImportError, TypeError) as error:
        own = type(error).__module__.startswith("sppo_kernels")
        if not (own or isinstance(error, (OSError, ImportError))):
            raise
        print(f"sppo {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def console() -> None:
    """Entry point of the installed script."""
    sys.exit(main())
