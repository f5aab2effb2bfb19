"""Flags and YAML or JSON files to the options of a command."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sppo_kernels.optional import require
from sppo_kernels.selfplay.options import OptionError


@dataclass(frozen=True)
class Command:
    """A function and what it needs of the command line.

    Attributes:
        function: parameters are option dataclasses; or one, `argv`, the words as they are.
        required: settings that have no default.
        defaults: other defaults than those of the dataclasses.
    """

    function: Callable[..., None]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def run(self, argv: list[str], prog: str) -> None:
        """Call the function with options from `--config FILE` and flags, flags first.

        Raises:
            OptionError: the file cannot be read or holds an unknown setting, or one is missing.
        """
        kinds = self.function.__annotations__
        if "argv" in kinds:
            return self.function(argv)
        scope = {}
        if "SPPOConfig" in kinds.values():  # loads transformers, so only where it is meant
            from sppo_kernels.trainer import SPPOConfig

            scope = {"SPPOConfig": SPPOConfig}
        *classes, _ = typing.get_type_hints(self.function, localns=scope).values()
        about = self.function.__doc__
        parser = require("transformers").HfArgumentParser(classes, prog=prog, description=about)
        given = dict(self.defaults)
        while "--config" in argv:
            at = argv.index("--config")
            if at + 1 == len(argv):
                raise OptionError("--config: expected a file")
            given |= read_config(argv[at + 1])
            del argv[at : at + 2]
        unknown = sorted(set(given) - {f.name for c in classes for f in fields(c) if f.init})
        if unknown:
            raise OptionError(f"--config: unknown settings {unknown}")
        parser.set_defaults(**given)
        found = parser.parse_args_into_dataclasses(argv)
        values = {name: value for part in found for name, value in vars(part).items()}
        absent = [f"--{name}" for name in self.required if not values[name]]
        if absent:
            raise OptionError(f"expected {', '.join(absent)}")
        self.function(*found)


def read_config(path: str) -> dict[str, Any]:
    """Settings of a YAML or JSON file."""
    try:
        text = Path(path).read_text()
        found = json.loads(text) if path.endswith(".json") else require("yaml").safe_load(text)
    except (OSError, ValueError) as error:
        raise OptionError(f"--config: {path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise OptionError(f"--config: {path}: expected settings, got {type(found).__name__}")
    return found
