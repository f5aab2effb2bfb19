"""The losses as modules, for code that builds its loss once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from sppo_kernels import checks
from sppo_kernels.loss.pairwise import checked_settings, find_kind, pairwise_loss
from sppo_kernels.loss.reduce import REDUCTIONS
from sppo_kernels.loss.sppo import UNITS, fused_linear_sppo_loss, fused_sppo_loss, sppo_loss

__all__ = ["FusedLinearSPPOLoss", "FusedSPPOLoss", "PairwiseLoss", "SPPOLoss"]


class _Bound(torch.nn.Module):
    """A loss function with its settings fixed; the tensors come with each call."""

    function: Callable
    inputs: tuple[str, ...]  # the function's tensors, in the order forward takes them

    def bound(self) -> dict[str, Any]:
        """Keyword arguments for the function."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.bound().items())

    def forward(self, *tensors: Any, **named: Any) -> Any:
        """The function of `inputs`, by position or by name, and of the settings."""
        if len(tensors) > len(self.inputs):
            raise TypeError(f"expected at most {self.inputs} by position, got {len(tensors)}")
        given = dict(zip(self.inputs, tensors, strict=False))
        return self.function(**given, **named, **self.bound())


class SPPOLoss(_Bound):
    """`sppo_loss` with its settings fixed; see there for their meaning, and what a call returns.

    A call takes logps, ref_logps, win_rate and, optionally, weights, all [S].

    Args:
        eta: step size of self-play, above 0.
        reduction: "mean", "sum" or "none".
        units: "log_ratio" or "win_rate".
        settings: the function's other ones; the fused losses have some.

    Raises:
        TypeError, ValueError: a setting that the function does not have, or a wrong value.
    """

    function = staticmethod(sppo_loss)
    inputs = ("logps", "ref_logps", "win_rate", "weights")

    def __init__(
        self,
        eta: float = 1000.0,
        reduction: str = "mean",
        units: str = "log_ratio",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.eta = checks.positive("eta", eta)
        self.reduction = checks.choice("reduction", reduction, REDUCTIONS)
        self.units = checks.choice("units", units, UNITS)
        known = inspect.signature(self.function).parameters
        self._names = tuple(name for name in known if name not in self.inputs)
        for name in settings:
            if name not in self._names:
                raise TypeError(f"{name}: expected one of {self._names}")
        for name in self._names:
            if name not in ("eta", "reduction", "units"):
                setattr(self, name, settings.get(name, known[name].default))

    def settings(self) -> dict[str, Any]:
        """Keyword arguments for the function."""
        return {name: getattr(self, name) for name in self._names}

    bound = settings


class FusedSPPOLoss(SPPOLoss):
    """`fused_sppo_loss` with its settings fixed: eta, reduction, units, and by name those below.

    A call takes logits [B, T, V] or [N, V], labels [B, T] or [N], ref_logps and win_rate [S],
    and, optionally, cu_seqlens and weights.

    Args:
        ignore_index: label of rows that do not count.
        inplace_backward: write the gradient into the memory of the logits.
        impl: "auto", "reference", "triton" or "native".
    """

    function = staticmethod(fused_sppo_loss)
    inputs = ("logits", "labels", "ref_logps", "win_rate", "cu_seqlens", "weights")


class FusedLinearSPPOLoss(SPPOLoss):
    """`fused_linear_sppo_loss` with its settings fixed. The head's weight stays the caller's.

    A call takes hidden [B, T, D] or [N, D], weight [V, D], labels, ref_logps, win_rate and,
    optionally, cu_seqlens, bias, rows and weights.

    Args:
        eta, reduction, units: as in `SPPOLoss`; the following by name.
        logit_scale, softcap: of the head.
        ignore_index: label of rows that do not count.
        memory_budget: bytes that may be held for logits, or None.
        impl: "auto", "reference", "triton" or "native".
    """

    function = staticmethod(fused_linear_sppo_loss)
    inputs = (
        *("hidden", "weight", "labels", "ref_logps", "win_rate", "cu_seqlens"),
        *("bias", "rows", "weights"),
    )

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.logit_scale = checks.positive("logit_scale", self.logit_scale)


class PairwiseLoss(_Bound):
    """`pairwise_loss` with its kind and numbers fixed; see there for their meaning.

    A call takes the log-probabilities [P] in the function's order and its other tensors by name.

    Args:
        kind: the objective.
        reduction: "mean", "sum" or "none".
        settings: the numbers the kind takes (beta, label_smoothing, margin, ...).

    Raises:
        ValueError: the kind is unknown, or does not take a setting, or lacks one.
    """

    function = staticmethod(pairwise_loss)
    inputs = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, kind: str, *, reduction: str = "mean", **settings: float) -> None:
        super().__init__()
        objective = find_kind(kind)
        self.kind = objective.name
        self.reduction = checks.choice("reduction", reduction, REDUCTIONS)
        self.settings = checked_settings(objective, settings)

    def bound(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.settings, "reduction": self.reduction}
