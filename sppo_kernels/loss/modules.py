"""The losses as modules, for code that builds its loss once."""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.loss import pairwise
from sppo_kernels.loss import sppo as loss
from sppo_kernels.results import SPPOOutput

__all__ = ["FusedLinearSPPOLoss", "FusedSPPOLoss", "PairwiseLoss", "SPPOLoss"]


class SPPOLoss(torch.nn.Module):
    """`sppo_loss` with its settings fixed; see there for their meaning.

    Args:
        eta: step size of self-play, above 0.
        reduction: "mean", "sum" or "none".
        units: "log_ratio" or "win_rate".
    """

    def __init__(
        self, eta: float = 1000.0, reduction: str = "mean", units: str = "log_ratio"
    ) -> None:
        super().__init__()
        self.eta = checks.positive("eta", eta)
        self.reduction = checks.choice("reduction", reduction, loss.REDUCTIONS)
        self.units = checks.choice("units", units, loss.UNITS)

    def settings(self) -> dict:
        """Keyword arguments for the function."""
        return {"eta": self.eta, "reduction": self.reduction, "units": self.units}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def forward(
        self, logps: Tensor, ref_logps: Tensor, win_rate: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """logps, ref_logps, win_rate, weights [S] -> loss, as `sppo_loss`."""
        return loss.sppo_loss(logps, ref_logps, win_rate, weights=weights, **self.settings())


class FusedSPPOLoss(SPPOLoss):
    """`fused_sppo_loss` with its settings fixed.

    Args:
        eta, reduction, units: as in `SPPOLoss`.
        ignore_index: label of rows that do not count.
        inplace_backward: write the gradient into the memory of the logits.
        impl: "auto", "reference", "triton" or "native".
    """

    def __init__(
        self,
        eta: float = 1000.0,
        reduction: str = "mean",
        units: str = "log_ratio",
        *,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(eta, reduction, units)
        self.ignore_index = ignore_index
        self.inplace_backward = inplace_backward
        self.impl = impl

    def settings(self) -> dict:
        return super().settings() | {
            "ignore_index": self.ignore_index,
            "inplace_backward": self.inplace_backward,
            "impl": self.impl,
        }

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        win_rate: Tensor,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> SPPOOutput:
        """logits [B, T, V] or [N, V], labels [B, T] or [N] -> SPPOOutput, as `fused_sppo_loss`."""
        return loss.fused_sppo_loss(
            logits, labels, ref_logps, win_rate, cu_seqlens, weights=weights, **self.settings()
        )


class FusedLinearSPPOLoss(SPPOLoss):
    """`fused_linear_sppo_loss` with its settings fixed. The head's weight stays the caller's.

    Args:
        eta, reduction, units: as in `SPPOLoss`.
        logit_scale, softcap: of the head.
        ignore_index: label of rows that do not count.
        memory_budget: bytes that may be held for logits, or None.
        impl: "auto", "reference", "triton" or "native".
    """

    def __init__(
        self,
        eta: float = 1000.0,
        reduction: str = "mean",
        units: str = "log_ratio",
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        memory_budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(eta, reduction, units)
        self.logit_scale = checks.positive("logit_scale", logit_scale)
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.memory_budget = memory_budget
        self.impl = impl

    def settings(self) -> dict:
        return super().settings() | {
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "ignore_index": self.ignore_index,
            "memory_budget": self.memory_budget,
            "impl": self.impl,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        win_rate: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> SPPOOutput:
        """hidden [B, T, D] or [N, D], weight [V, D] -> SPPOOutput, as `fused_linear_sppo_loss`."""
        return loss.fused_linear_sppo_loss(
            hidden, weight, labels, ref_logps, win_rate, cu_seqlens,
            bias=bias, rows=rows, weights=weights, **self.settings(),
        )  # fmt: skip


class PairwiseLoss(torch.nn.Module):
    """`pairwise_loss` with its kind and numbers fixed; see there for their meaning.

    Args:
        kind: the objective.
        reduction: "mean", "sum" or "none".
        settings: the numbers the kind takes (beta, label_smoothing, margin, ...).

    Raises:
        ValueError: the kind is unknown, or does not take a setting, or lacks one.
    """

    def __init__(self, kind: str, *, reduction: str = "mean", **settings: float) -> None:
        super().__init__()
        objective = pairwise.find_kind(kind)
        self.kind = objective.name
        self.reduction = checks.choice("reduction", reduction, loss.REDUCTIONS)
        self.settings = pairwise.checked_settings(objective, settings)

    def extra_repr(self) -> str:
        shown = {"kind": self.kind, **self.settings, "reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> Tensor:
        """Log-probabilities [P] and the other tensors of the kind -> loss, as `pairwise_loss`."""
        return pairwise.pairwise_loss(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
            kind=self.kind, reduction=self.reduction, **self.settings, **tensors,
        )  # fmt: skip
