"""From pairwise judgements of K responses to the win rates and targets SPPO trains on.

A game is a table P [K, K] with P_ij the probability that response i is preferred to response j.
All functions take any leading batch dimensions, float32 or float64 (other dtypes become float32),
tensors, NumPy arrays or nested lists, and for ragged batches `lengths` [...]: entries past a game's
length are ignored. The diagonal is never read: a response against itself counts 1/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_kernels.games.inputs import as_games, check_values, targets_module
from sppo_kernels.games.ops import AS_GIVEN, LOGIT, PROB, UCLAML
from sppo_kernels.results import Pairs, SPPOTargets

_MODES = {None: AS_GIVEN, "prob": PROB, "logit": LOGIT}
_PRESETS = ("paper", "uclaml")


def symmetrize(
    x: Any, mode: str | None = "logit", *, lengths: Any = None, impl: str = "auto"
) -> Tensor:
    """Pairwise probabilities with P_ij + P_ji = 1, from judgements made in both orders.

    Args:
        x: [..., K, K], raw logits c_ij ("logit") or probabilities ("prob", None).
        mode: "logit": P_ij = sigmoid((c_ij - c_ji) / 2), which removes a position bias that adds to
            the logit exactly; "prob": P_ij = (x_ij + 1 - x_ji) / 2; None: x as it is.
        lengths: [...] integers, responses of each game; None when all have K.
        impl: "auto", "native" or "reference".

    Returns:
        [..., K, K] in the dtype of x, 1/2 on the diagonal; differentiable.

    Raises:
        ValueError: an unknown mode, a bad shape or length, NaN, or a probability outside [0, 1].
    """
    code = _mode(mode)
    games = as_games(x, "x", lengths)
    check_values(games, "x", impl, logits=mode == "logit", want_gap=mode is None)
    return games.restore(targets_module(impl, games.x.device).symmetrize(games.x, code))


def win_rates(
    P: Any, lengths: Any = None, *, include_self: bool = False, impl: str = "auto"
) -> Tensor:
    """Mean probability of each response to win against its opponents.

    w_i = mean over j != i of P_ij (arXiv 2405.00675, section 4). With `include_self` the mean also
    counts the response itself, at 1/2, as the authors' released code does: w - 1/2 then shrinks by
    (K-1)/K.

    Args:
        P: [..., K, K] probabilities.
        lengths: [...] integers, responses of each game; None when all have K.
        include_self: whether to count the response itself.
        impl: "auto", "native" or "reference".

    Returns:
        [..., K] in the dtype of P, 1/2 past a game's length; differentiable.

    Raises:
        ValueError: a bad shape or length, NaN, or a probability outside [0, 1].

    Warns:
        UserWarning: P_ij + P_ji is far from 1.
    """
    games = as_games(P, "P", lengths)
    check_values(games, "P", impl, want_gap=True)
    rates = targets_module(impl, games.x.device).win_rates(games.x, games.lengths, include_self)
    return games.restore(rates)


def select_pairs(
    P: Any,
    by: str = "win_rate",
    *,
    lengths: Any = None,
    logits: bool = False,
    impl: str = "auto",
) -> Pairs:
    """Best and worst response of each game; they differ even when all responses tie.

    Args:
        P: [..., K, K] probabilities, or raw logits c_ij with `logits=True`.
        by: "win_rate", or "score": s_i = mean over all j of c_ij - c_ji, the ranking of the
            authors' released pipeline; probabilities are turned into log-odds for it.
        lengths: [...] integers, responses of each game; None when all have K.
        logits: whether P holds logits.
        impl: "auto", "native" or "reference".

    Returns:
        Pairs(best, worst), int64 [...]: the first maximum and the last minimum.

    Raises:
        ValueError: an unknown `by`, a bad shape or length, NaN, or a probability outside [0, 1].
    """
    if by not in ("win_rate", "score"):
        raise ValueError(f"by: expected 'win_rate' or 'score', got {by!r}")
    games = as_games(P, "P", lengths)
    check_values(games, "P", impl, logits=logits, want_gap=not logits)
    x, mode = games.x.detach(), AS_GIVEN
    if by == "score":
        mode = UCLAML
        if not logits:
            x = torch.logit(x.clamp(0, 1), eps=torch.finfo(x.dtype).eps)
    elif logits:
        mode = LOGIT
    module = targets_module(impl, x.device)
    _, _, best, worst, _ = module.targets(x, games.lengths, mode, False, 1.0)
    return Pairs(games.restore(best), games.restore(worst))


def sppo_targets(
    x: Any,
    *,
    eta: float = 1000.0,
    preset: str = "paper",
    logits: bool = False,
    mode: str | None = "auto",
    include_self: bool = False,
    lengths: Any = None,
    impl: str = "auto",
) -> SPPOTargets:
    """Win rates, log-ratio targets and the pair to train on, in one pass over the games.

    target_i = eta (w_i - 1/2), the right-hand side of the SPPO loss (arXiv 2405.00675, eq. 4.4).

    Args:
        x: [..., K, K] probabilities, or raw logits c_ij with `logits=True`.
        eta: step size, 1/beta of the paper.
        preset: "paper", or "uclaml", which reproduces the released pipeline from raw logits: scores
            s_i = mean over all K of (c_ij - c_ji), P = sigmoid(s_i - s_j), win rates that include
            the response itself, best and worst by score.
        logits: whether x holds logits.
        mode: how to symmetrise, see `symmetrize`; "auto" is "logit" for logits, None otherwise.
        include_self: whether win rates count the response itself; "uclaml" always does.
        lengths: [...] integers, responses of each game; None when all have K.
        impl: "auto", "native" or "reference".

    Returns:
        SPPOTargets(win_rate [..., K], target [..., K], best [...], worst [...], chosen_prob [...]).

    Raises:
        ValueError: an unknown preset or mode, "uclaml" without logits, a bad shape or length, NaN,
            or a probability outside [0, 1].

    Warns:
        UserWarning: probabilities are not symmetrised and P_ij + P_ji is far from 1.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset: expected one of {_PRESETS}, got {preset!r}")
    if preset == "uclaml" and not logits:
        raise ValueError("preset: 'uclaml' takes raw logits; pass them with logits=True")
    if preset == "uclaml" and mode != "auto":
        raise ValueError(f"mode: 'uclaml' has its own symmetrisation, got mode={mode!r}")
    if mode == "auto":
        mode = "logit" if logits else None
    code = UCLAML if preset == "uclaml" else _mode(mode)
    if mode == "logit" and not logits:
        raise ValueError("mode: 'logit' takes raw logits; pass them with logits=True")

    games = as_games(x, "x", lengths)
    check_values(games, "x", impl, logits=logits, want_gap=not logits and mode is None)
    values = torch.sigmoid(games.x) if logits and mode != "logit" else games.x
    module = targets_module(impl, values.device)
    found = module.targets(values, games.lengths, code, include_self, float(eta))
    return SPPOTargets(*(games.restore(t) for t in found))


def _mode(mode: str | None) -> int:
    if mode not in _MODES:
        raise ValueError(f"mode: expected 'logit', 'prob' or None, got {mode!r}")
    return _MODES[mode]
