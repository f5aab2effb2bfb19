"""What an objective of pairs is made of; the families next to this file hold them.

In equations a = log π_θ(y_w) − log π_ref(y_w) of the chosen response y_w, and b the same of the
rejected one, y_l; u and v are their log-probabilities a token, |y| a number of tokens; β = beta,
ε = label_smoothing, x = β(a − b).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pair(NamedTuple):
    """Checked arguments, all [P] and of one dtype; None where not given.

    Names are those of `pairwise_loss`. `kl` and `reward_shift` are [] or [P].
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_win: Tensor | None = None
    rejected_win: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    previous_chosen_logps: Tensor | None = None
    previous_rejected_logps: Tensor | None = None
    kl: Tensor | None = None
    reward_shift: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """a = log π_θ(y_w) − log π_ref(y_w) and b, the same of y_l."""
        return (
            self.chosen_logps - self.ref_chosen_logps,
            self.rejected_logps - self.ref_rejected_logps,
        )

    @property
    def ratio_margin(self) -> Tensor:
        """a − b."""
        a, b = self.ratios
        return a - b

    @property
    def averages(self) -> tuple[Tensor, Tensor]:
        """Log-probability a token of y_w and y_l."""
        return (
            per_token(self.chosen_logps, self.chosen_lengths),
            per_token(self.rejected_logps, self.rejected_lengths),
        )


class Objective(NamedTuple):
    """An objective and what it takes.

    Attributes:
        name: value of `kind`.
        function: (Pair, settings) -> loss of each pair [P].
        equation: the first paragraph of the function's docstring.
        source: where the equation comes from.
        needs: tensors beside chosen_logps and rejected_logps that must be given.
        optional: tensors that may be given.
        settings: numbers it takes with their defaults; None has none and must be given.
        paired: whether row i of the result belongs to pair i (not after sorting).
    """

    name: str
    function: Callable[[Pair, Mapping[str, float]], Tensor]
    equation: str
    source: str
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: Mapping[str, float | None] = {}
    paired: bool = True


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
WINS = ("chosen_win", "rejected_win")
LENGTHS = ("chosen_lengths", "rejected_lengths")
PREVIOUS = ("previous_chosen_logps", "previous_rejected_logps")
BETA = {"beta": 0.1}
SMOOTHED = {"beta": 0.1, "label_smoothing": 0.0}


def objective(
    source: str,
    *,
    needs: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    settings: Mapping[str, float | None] = BETA,
    paired: bool = True,
) -> Callable[[Callable], Objective]:
    """Makes a function the objective of its name; its docstring begins with the equation."""

    def made(function: Callable) -> Objective:
        equation = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        return Objective(
            function.__name__, function, equation, source, needs, optional, settings, paired
        )

    return made


def per_token(value: Tensor, lengths: Tensor) -> Tensor:
    """value / lengths; a response without tokens has 0, as its sum has."""
    return value / lengths.clamp_min(1)


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x)."""
    if label_smoothing == 0:
        return -logsigmoid(x)
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) of x < 0, accurate at both ends; x above −eps counts as −eps."""
    x = x.clamp_max(-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    # each branch sees only values it is accurate for, so that neither yields a NaN gradient
    close = torch.where(near, x, -1.0)
    far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
