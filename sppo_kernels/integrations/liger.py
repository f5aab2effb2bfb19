"""Liger's fused DPO loss, with the same call and numbers, on the three-GEMM head.

    from sppo_kernels.integrations.liger import LigerFusedLinearDPOLoss   # instead of liger's

or, for code that already imports Liger's class (its instances too),

    from sppo_kernels.integrations import liger; liger.patch()

Written against liger-kernel 0.8's `chunked_loss.dpo_loss`. Beyond it: `loss_type="sppo"` with
`win_rate` in the call, and `memory_budget`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.integrations._pairs import pair_loss, pair_rewards
from sppo_kernels.integrations._swap import Hook, Installed
from sppo_kernels.logps.linear import linear_sequence_logps
from sppo_kernels.loss.pairwise import checked_settings, find_kind
from sppo_kernels.loss.sppo import fused_linear_sppo_loss

__all__ = ["LigerFusedLinearDPOLoss", "patch", "patched", "unpatch"]

# Liger's names that are ours too, and ours beyond them
LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "sppo",
)  # fmt: skip


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """Drop-in for `liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`.

    Args:
        ignore_index: label of positions that do not count.
        beta: β of the loss; for SPPO 1/η.
        alpha: weight of the chosen responses' negative log-likelihood.
        compute_nll_loss: whether that term is added.
        compiled, chunk_size: taken for Liger's sake; they change no number here. Memory is
            bounded by `memory_budget` instead of by pairs.
        use_ref_model: whether the call's reference is used; without, its log-probs count as 0 and
            what is given of it is ignored, as in Liger.
        average_log_prob: log-probs a token instead of sums. A response without a token then
            gives NaN, as in Liger.
        loss_type: Liger's names, or "sppo" with win rates (half of "sppo_hard" for rates 1 and 0,
            as in the released code).
        label_smoothing, discopop_tau: of the types that take them; others ignore them, as Liger.
        memory_budget: bytes that may be held for logits; see `linear_sequence_logps`, and for the
            SPPO types `fused_linear_sppo_loss`, whose groups under a budget cost no further GEMM.
            None is their default, which may hold N·V elements where Liger holds a chunk's.
        impl: "auto", "reference", "triton" or "native".

    Raises:
        ValueError: an unknown loss_type, or a number out of its range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        memory_budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = checks.choice("loss_type", loss_type, LOSS_TYPES)
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.memory_budget = memory_budget
        self.impl = impl
        _settings(self)

    def extra_repr(self) -> str:
        return f"loss_type={self.loss_type!r}, beta={self.beta!r}"

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        win_rate: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss of a batch whose first half is chosen and whose second half is rejected.

        Args:
            lin_weight: [V, D] the head; bias [V] or None.
            _input: [2P, T, D] hidden states.
            target: [2P, T], the token each position predicts (already shifted).
            ref_input: [2P, T, D'], ref_weight [V, D'], ref_bias [V]: of the reference, which gets
                no gradient.
            win_rate: [2P] win rates in [0, 1], for loss_type "sppo".

        Returns:
            (loss, (chosen_logps [P], rejected_logps [P], chosen_logits_mean [],
            rejected_logits_mean [], nll_loss [], chosen_rewards [P], rejected_rewards [P])), all
            float32. The loss differentiates with respect to lin_weight, _input and bias; means of
            logits are over all positions, ignored ones included, as Liger's are.

        Raises:
            ValueError: an odd batch; the reference missing; win rates missing or superfluous;
                else as `linear_sequence_logps` and `pairwise_loss`.
        """
        _check_call(self, _input, target, ref_input, ref_weight, win_rate)
        settings = _settings(self)
        head = {
            "ignore_index": self.ignore_index,
            "memory_budget": getattr(self, "memory_budget", None),  # a module of Liger's has none
            "impl": getattr(self, "impl", "auto"),
        }
        pairs = target.shape[0] // 2
        tokens = (target != self.ignore_index).sum(-1)
        nll = torch.zeros((), device=_input.device)
        with torch.no_grad():
            if self.use_ref_model:
                ref = linear_sequence_logps(ref_input, ref_weight, target, bias=ref_bias, **head)
            else:
                ref = torch.zeros(2 * pairs, device=_input.device)
            if self.average_log_prob:
                ref = ref / tokens
        hard = self.loss_type == "sppo_hard"
        if (hard or self.loss_type == "sppo") and not (
            self.average_log_prob or self.compute_nll_loss
        ):
            # the loss inside the op: with a budget, groups of sequences still cost three GEMMs
            win = torch.arange(2 * pairs, device=_input.device) < pairs if hard else win_rate
            loss, logps = fused_linear_sppo_loss(
                _input, lin_weight, target, ref, win.float(), bias=bias,
                eta=1.0 / settings["beta"], **head,
            )  # fmt: skip
            loss = 2.0 * loss if hard else loss
        else:
            sums = linear_sequence_logps(_input, lin_weight, target, bias=bias, **head)
            logps = sums / tokens if self.average_log_prob else sums
            wins = None if win_rate is None else win_rate.chunk(2)
            loss = pair_loss(logps.chunk(2), ref.chunk(2), wins, kind=self.loss_type, **settings)
            if self.compute_nll_loss:
                nll = -sums[:pairs].sum() / tokens[:pairs].sum()
                loss = loss + self.alpha * nll
        logps = logps.detach()
        rewards = pair_rewards(logps.chunk(2), ref.chunk(2), settings["beta"])
        means = _mean_logits(lin_weight, _input, bias)
        return loss, (*logps.chunk(2), *means, nll.detach(), *rewards)


def _settings(module: Any) -> dict[str, float]:
    """Numbers of the module that its loss type takes, checked."""
    objective = find_kind(module.loss_type)
    given = {
        "beta": module.beta,
        "label_smoothing": module.label_smoothing,
        "tau": module.discopop_tau,
    }
    if module.loss_type == "sigmoid":
        given["label_smoothing"] = None  # Liger's sigmoid has none
    return checked_settings(objective, {k: v for k, v in given.items() if k in objective.settings})


def _check_call(
    module: Any,
    _input: Tensor,
    target: Tensor,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    win_rate: Tensor | None,
) -> None:
    checks.floating("_input", _input, 3)
    checks.shape("target", checks.integers("target", target), _input.shape[:2], "of _input")
    if target.shape[0] == 0 or target.shape[0] % 2:
        raise ValueError(
            "target: expected chosen responses and as many rejected ones after them, got "
            f"{target.shape[0]} rows"
        )
    if module.use_ref_model:
        for name, value in {"ref_input": ref_input, "ref_weight": ref_weight}.items():
            if value is None:
                raise ValueError(f"{name}: expected a tensor with use_ref_model=True, got None")
    if (win_rate is not None) != (module.loss_type == "sppo"):
        wanted = "needed for" if win_rate is None else "taken only by"
        raise ValueError(f"win_rate: {wanted} loss_type='sppo', and this is {module.loss_type!r}")
    if win_rate is not None:
        checks.shape(
            "win_rate", checks.floating("win_rate", win_rate), target.shape[:1], "of the batch"
        )


@torch.no_grad()
def _mean_logits(weight: Tensor, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean logit of the chosen and of the rejected half, without logits.

    Σ_iv (h_i·w_v + b_v) = (Σ_i h_i)·(Σ_v w_v) + N Σ_v b_v: N·D + V·D operations.
    """
    vocab = weight.shape[0]
    total = weight.sum(0, dtype=torch.float32)
    shift = 0.0 if bias is None else bias.float().mean()
    return tuple(
        half.sum((0, 1), dtype=torch.float32) @ total / (half.shape[0] * half.shape[1] * vocab)
        + shift
        for half in hidden.chunk(2)
    )


# --- switching Liger's own class ------------------------------------------------------------------


def _call(function: Any) -> str:
    """Parameters that Liger's function shares with ours."""
    ours = inspect.signature(function).parameters.values()
    names = (p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "win_rate")
    return ", ".join(names)


_CLASS = "liger_kernel.chunked_loss.dpo_loss:LigerFusedLinearDPOLoss"
_INIT, _FORWARD = LigerFusedLinearDPOLoss.__init__, LigerFusedLinearDPOLoss.forward
_HOOKS = (
    Hook(_CLASS, "__init__", _call(_INIT), exact=True),
    Hook(_CLASS, "forward", _call(_FORWARD), lambda _: _FORWARD, exact=True),
    Hook(_CLASS, "_SUPPORTED_LOSS_TYPES", None, lambda types: {*types, "sppo"}),
)
_installed = Installed("liger_kernel", "liger-kernel 0.8", repeatable=True)


def patch() -> None:
    """Give Liger's `LigerFusedLinearDPOLoss` this forward, wherever it was imported; idempotent.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: its constructor or call is not the one this was written against.
    """
    _installed.install(_HOOKS)


unpatch = _installed.uninstall
patched = _installed.scoped(patch)
