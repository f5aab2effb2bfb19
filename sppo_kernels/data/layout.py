"""Where prompts and responses lie in a packed row of tokens, and what may look at what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Small neighbours are attended to in one masked call: fewer launches beat fewer flops there.
UNIT_TOKENS = 512


@dataclass
class Unit:
    """A stretch of queries start:stop over keys, which are `key_ranges` put together."""

    start: int
    stop: int
    key_ranges: list[tuple[int, int]]
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)


class PackedLayout:
    """Where prompts and responses lie in a packed row of tokens.

    Args:
        groups: for each prompt its length and the lengths of its responses, in order of tokens.
    """

    def __init__(self, groups: list[tuple[int, list[int]]]) -> None:
        self.groups = groups
        self.total = sum(p + sum(r) for p, r in groups)
        self._masks: dict = {}
        self._units: list[Unit] | None = None
        self._varlen: dict = {}

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(start, length, prompt start, prompt length) of every segment; prompts have length 0."""
        found, at = [], 0
        for prompt, responses in self.groups:
            begin = at
            found.append((at, prompt, at, 0))
            at += prompt
            for length in responses:
                if length:
                    found.append((at, length, begin, prompt))
                at += length
        return found

    def units(self) -> list[Unit]:
        """Stretches to attend to one by one."""
        if self._units is None:
            self._units = []
            at, run = 0, None
            for prompt, responses in self.groups:
                size = prompt + sum(responses)
                if size <= UNIT_TOKENS and run is not None and at + size - run <= UNIT_TOKENS:
                    self._units[-1].stop = at + size
                    self._units[-1].key_ranges = [(run, at + size)]
                elif size <= UNIT_TOKENS:
                    run = at
                    self._units.append(Unit(at, at + size, [(at, at + size)]))
                else:
                    run = None
                    inner = at + prompt
                    self._units.append(Unit(at, inner, [(at, inner)]))
                    for length in filter(None, responses):
                        keys = [(at, at + prompt), (inner, inner + length)]
                        self._units.append(Unit(inner, inner + length, keys))
                        inner += length
                at += size
        return self._units

    def mask(self, unit: Unit, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] True where a query of the unit may look."""
        key = (unit.start, unit.stop, window, device)
        if key not in self._masks:
            segment, prompt, position = self._tokens(device)
            queries = slice(unit.start, unit.stop)
            keys = torch.cat([torch.arange(a, b, device=device) for a, b in unit.key_ranges])
            same = segment[queries, None] == segment[keys]
            own_prompt = prompt[queries, None] == segment[keys]
            gap = position[queries, None] - position[keys]
            allowed = (same | own_prompt) & (gap >= 0)
            if window is not None:
                allowed &= gap < window
            self._masks[key] = allowed
        return self._masks[key]

    def _tokens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Segment number, segment number of the prompt, and position of every token."""
        key = ("tokens", device)
        if key not in self._masks:
            segment, prompt, position, count = [], [], [], 0
            for size, responses in self.groups:
                first = count
                for i, length in enumerate([size, *responses]):
                    segment += [count] * length
                    prompt += [first] * length
                    offset = size if i else 0
                    position += range(offset, offset + length)
                    count += 1
            self._masks[key] = tuple(
                torch.tensor(x, device=device) for x in (segment, prompt, position)
            )
        return self._masks[key]

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Key rows, query and key bounds, longest query and key, for variable-length kernels."""
        if device not in self._varlen:
            rows, queries, keys = [], [0], [0]
            for start, length, prompt, size in self.segments():
                rows += [*range(prompt, prompt + size), *range(start, start + length)]
                queries.append(queries[-1] + length)
                keys.append(keys[-1] + size + length)
            most_q = max(b - a for a, b in itertools.pairwise(queries))
            most_k = max(b - a for a, b in itertools.pairwise(keys))
            self._varlen[device] = (
                torch.tensor(rows).to(device, non_blocking=True),
                torch.tensor(queries, dtype=torch.int32).to(device, non_blocking=True),
                torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True),
                most_q,
                most_k,
            )
        return self._varlen[device]
