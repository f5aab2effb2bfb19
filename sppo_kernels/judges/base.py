"""What a judge is, and what becomes of its logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sppo_kernels.games.targets import symmetrize


class JudgeError(ValueError):
    """A judge was given, or returned, something that cannot be used."""


@runtime_checkable
class Judge(Protocol):
    """Anything with this method."""

    def logits(self, prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> Tensor:
        """Log-odds that one response is preferred to another, in the order shown.

        Args:
            prompts: n prompts, texts or chat messages.
            responses: K texts for each.

        Returns:
            [n, K, K] float32: c_ij when response i is shown first and j second. The diagonal is not
            read. c_ij = -c_ji is not expected: `win_matrices` removes a position's advantage.
        """
        ...


def win_matrices(logits: Tensor, *, debias: bool = True, temperature: float = 1.0) -> Tensor:
    """Probabilities to win from a judge's logits.

    Args:
        logits: [n, K, K] or [K, K].
        debias: True: sigmoid((c_ij − c_ji) / 2T), in which an advantage of the first position
            cancels; False: sigmoid(c_ij / T) of i < j as shown, and its complement below the
            diagonal.
        temperature: T, above 0; 1 takes the logits as calibrated.

    Returns:
        [n, K, K] float32, P + Pᵀ = 1, 1/2 on the diagonal.

    Raises:
        JudgeError: a wrong shape, NaN off the diagonal, or a temperature not above 0.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise JudgeError(f"temperature: expected a finite number above 0, got {temperature}")
    logits = torch.as_tensor(logits, dtype=torch.float32)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise JudgeError(f"logits: expected [n, K, K], got {tuple(logits.shape)}")
    diagonal = torch.eye(logits.shape[-1], dtype=torch.bool)
    logits = (logits / temperature).masked_fill(diagonal, 0.0)
    if bool(logits.isnan().any()):
        where = tuple(int(i) for i in logits.isnan().nonzero()[0])
        raise JudgeError(f"logits: got NaN at {where}; a judge must decide every pair")
    if not debias:
        upper = logits.triu(1)
        logits = upper - upper.transpose(-1, -2)
    return symmetrize(logits, mode="logit")


def check_batch(prompts: Sequence[Any], responses: Sequence[Sequence[str]]) -> int:
    """K of a batch of n prompts; JudgeError when lengths disagree or K < 2."""
    if len(prompts) != len(responses) or not prompts:
        raise JudgeError(
            f"responses: expected one list for each of {len(prompts)} prompts (at least one), got "
            f"{len(responses)}"
        )
    counts = {len(r) for r in responses}
    if len(counts) != 1 or counts.pop() < 2:
        raise JudgeError(
            "responses: expected the same number, at least 2, for every prompt of a call, got "
            f"{sorted({len(r) for r in responses})}"
        )
    return len(responses[0])


def ordered_pairs(
    prompts: Sequence[Any], responses: Sequence[Sequence[str]]
) -> list[tuple[int, int, int]]:
    """(n, i, j), i != j, of all comparisons of a checked batch, in both orders."""
    pairs = list(itertools.permutations(range(check_batch(prompts, responses)), 2))
    return [(n, i, j) for n in range(len(prompts)) for i, j in pairs]


def prompt_text(prompt: Any) -> str:
    """A prompt as text: chat messages of a single user turn give its content."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
