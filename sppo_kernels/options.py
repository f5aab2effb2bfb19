"""Fields of option dataclasses, which the command line reads."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A field with its help on the command line."""
    return field(default=default, metadata={"help": help})
