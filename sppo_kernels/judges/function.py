"""A Python function as a judge."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.judges.base import JudgeError, ordered_pairs


class CallableJudge:
    """A function `(prompt, first, second) -> log-odds that first is preferred`.

    Args:
        function: the function, or "module:function". A function with the attribute `batched = True`
            gets all prompts and responses at once and returns [n, K, K].

    Raises:
        JudgeError: the name does not lead to a callable, or its result has a wrong shape or type.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        if isinstance(function, str):
            module, _, name = function.partition(":")
            try:
                function = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise JudgeError(f"judge: cannot find {module}:{name} ({error})") from error
        if not callable(function):
            raise JudgeError(f"judge: expected a callable, got {type(function).__name__}")
        self.function = function

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """See `Judge.logits`."""
        pairs, count = ordered_pairs(prompts, responses), len(responses[0])
        if getattr(self.function, "batched", False):
            result = torch.as_tensor(self.function(prompts, responses), dtype=torch.float32)
        else:
            result = torch.zeros(len(prompts), count, count)
            for n, i, j in pairs:
                result[n, i, j] = float(self.function(prompts[n], responses[n][i], responses[n][j]))
        if result.shape != (len(prompts), count, count):
            raise JudgeError(
                f"judge: expected [{len(prompts)}, {count}, {count}], got {tuple(result.shape)}"
            )
        return result
