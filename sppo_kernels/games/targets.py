"""From pairwise judgements of K responses to the win rates and targets SPPO trains on.

A game is a table P [K, K] with P_ij the probability that response i is preferred to response j.
All functions take any leading batch dimensions, float32 or float64 (other dtypes become float32),
tensors, NumPy arrays or nested lists, and for ragged batches `lengths` [...]: entries past a game's
length are ignored. The diagonal is never read: a response against itself counts 1/2.

Arguments that all functions share: `lengths` [...] integers, the responses of each game, None when
all have K; `impl`, "auto", "native" or "reference". Each raises ValueError for a bad shape or
length, NaN, or a probability outside [0, 1], and warns where P_ij + P_ji is far from 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.games.inputs import as_games, declare
from sppo_kernels.games.reference.targets import (
    AS_GIVEN,
    LOGIT,
    PROB,
    UCLAML,
    inside,
    opponents,
    scores,
    sizes,
)
from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash
from sppo_kernels.registry import formula
from sppo_kernels.results import Pairs, SPPOTargets

TARGETS = (
    "win_rate", "win_rate_with_self", "uclaml", "nash", "regularized_nash", "bradley_terry"
)  # fmt: skip
_MODES = {None: AS_GIVEN, "prob": PROB, "logit": LOGIT}
_PRESETS = ("paper", "uclaml")
_INDEX = torch.int64

declare("symmetrize", "int mode", ("GKK", None))
declare("win_rates", "Tensor? lengths, bool include_self", ("GK", None))
declare(
    "targets", "Tensor? lengths, int mode, bool include_self, float eta",
    ("GK", None), ("GK", None), ("G", _INDEX), ("G", _INDEX), ("G", None),
)  # fmt: skip


def symmetrize(
    x: Any, mode: str | None = "logit", *, lengths: Any = None, impl: str = "auto"
) -> Tensor:
    """Pairwise probabilities with P_ij + P_ji = 1, from judgements made in both orders.

    Args:
        x: [..., K, K], raw logits c_ij ("logit") or probabilities ("prob", None).
        mode: "logit": P_ij = sigmoid((c_ij - c_ji) / 2), which removes a position bias that adds to
            the logit exactly; "prob": P_ij = (x_ij + 1 - x_ji) / 2; None: x as it is.
        lengths, impl: see the module.

    Returns:
        [..., K, K] in the dtype of x, 1/2 on the diagonal; differentiable.

    Raises:
        ValueError: an unknown mode; else see the module.
    """
    code = _mode(mode)
    games = as_games(x, "x", lengths, impl, logits=mode == "logit", want_gap=mode is None)
    return games.run("symmetrize", code)


def win_rates(
    P: Any, lengths: Any = None, *, include_self: bool = False, impl: str = "auto"
) -> Tensor:
    """Mean probability of each response to win against its opponents.

    w_i = mean over j != i of P_ij (arXiv 2405.00675, section 4). With `include_self` the mean also
    counts the response itself, at 1/2, as the authors' released code does: w - 1/2 then shrinks by
    (K-1)/K.

    Args:
        P: [..., K, K] probabilities.
        include_self: whether to count the response itself.
        lengths, impl: see the module, which also says what is raised.

    Returns:
        [..., K] in the dtype of P, 1/2 past a game's length; differentiable.
    """
    games = as_games(P, "P", lengths, impl)
    return games.run("win_rates", games.lengths, include_self)


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
        logits: whether P holds logits.
        lengths, impl: see the module.

    Returns:
        Pairs(best, worst), int64 [...]: the first maximum and the last minimum.

    Raises:
        ValueError: an unknown `by`; else see the module.
    """
    checks.choice("by", by, ("win_rate", "score"))
    games = as_games(P, "P", lengths, impl, logits=logits, want_gap=not logits)
    x, mode = games.x.detach(), LOGIT if logits else AS_GIVEN
    if by == "score":
        mode = UCLAML
        if not logits:
            x = torch.logit(x.clamp(0, 1), eps=torch.finfo(x.dtype).eps)
    return Pairs(*games._replace(x=x).run("targets", games.lengths, mode, False, 1.0)[2:4])


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
        lengths, impl: see the module.

    Returns:
        SPPOTargets(win_rate [..., K], target [..., K], best [...], worst [...], chosen_prob [...]).

    Raises:
        ValueError: an unknown preset or mode, "uclaml" without logits; else see the module.
    """
    checks.choice("preset", preset, _PRESETS)
    if preset == "uclaml":
        _needs_logits("preset", logits)
        if mode != "auto":
            raise ValueError(f"mode: 'uclaml' has its own symmetrisation, got mode={mode!r}")
    if mode == "auto":
        mode = "logit" if logits else None
    code = UCLAML if preset == "uclaml" else _mode(mode)
    if mode == "logit" and not logits:
        raise ValueError("mode: 'logit' takes raw logits; pass them with logits=True")
    want_gap = not logits and mode is None
    games = as_games(x, "x", lengths, impl, logits=logits, want_gap=want_gap)
    if logits and mode != "logit":
        games = games._replace(x=torch.sigmoid(games.x))
    return SPPOTargets(*games.run("targets", games.lengths, code, include_self, float(eta)))


def preference_targets(
    x: Any,
    by: str = "win_rate",
    *,
    logits: bool = False,
    lengths: Any = None,
    tau: float = 0.1,
    impl: str = "auto",
) -> Tensor:
    """The win rate that each response is trained on, by whom it is measured against.

    Args:
        x: [..., K, K] probabilities, or raw logits c_ij with `logits=True`, which become
            P_ij = sigmoid((c_ij - c_ji) / 2).
        by: the opponent of response i, one of `TARGETS`:
            "win_rate": the other responses, w_i = mean over j != i of P_ij (arXiv 2405.00675,
            section 4); "win_rate_with_self": all responses, P_ii = 1/2; "uclaml": the released
            pipeline, see `sppo_targets`; needs logits.
            "nash": the von Neumann winner x*, w_i = sum_j x*_j P_ij with P_ii = 1/2, which is at
            most 1/2 when P_ij + P_ji = 1 (see `nash`); "regularized_nash": the same against the
            equilibrium regularised by `tau` towards uniform (arXiv 2312.00886, section 4).
            "bradley_terry": the other responses in the Bradley-Terry model of the game,
            w_i = mean over j != i of sigmoid(theta_i - theta_j). Where P_ij + P_ji = 1 that is the
            "win_rate" again: the likelihood equations say that the model wins what was won.
        logits: whether x holds logits.
        tau: of "regularized_nash", in win rate; positive.
        lengths, impl: see the module.

    Returns:
        [..., K] in the dtype of x and in [0, 1]; 1/2 past a game's length. Differentiable for the
        first three; equilibria and strengths are constants.

    Raises:
        ValueError: an unknown `by`, "uclaml" without logits, `tau` not positive, or, by
            "bradley_terry", a game in which wins do not link every response to every other: no
            finite strengths exist; else see the module.
    """
    checks.choice("by", by, TARGETS)
    checks.positive("tau", float(tau))
    games = as_games(x, "x", lengths, impl, logits=logits, want_gap=not logits)
    mode, size = LOGIT if logits else AS_GIVEN, games.lengths
    if by in TARGETS[:3]:
        if by == "uclaml":
            _needs_logits("by", logits)
            mode = UCLAML
        return games.run("targets", size, mode, by == "win_rate_with_self", 1.0)[0]
    flat = games._replace(x=games.x.detach(), batch=games.x.shape[:1])
    P = flat._replace(x=flat.run("symmetrize", mode))
    if by == "bradley_terry":
        theta, connected = bradley_terry(P)
        if not torch.compiler.is_compiling() and not bool(connected.all()):
            at = games.place(int((~connected).int().argmax()) * P.x[0].numel())[:-2]
            raise ValueError(
                f"x: by='bradley_terry' needs wins that link every response to every other, and "
                f"those of game {at} do not: no finite strengths exist"
            )
        model = P._replace(x=torch.sigmoid(theta[:, :, None] - theta[:, None, :]))
        rate = model.run("win_rates", size, False)
    else:
        found = nash(P) if by == "nash" else regularized_nash(P, tau=tau)
        against = found.strategy[:, None, :]
        # what is never played is never read: past a length anything may stand
        rate = (against * P.x.where(against > 0, 0)).sum(-1).clamp(0, 1)
        rate = rate.masked_fill(~inside(P.x, size), 0.5)
    return games.restore(rate.to(games.x.dtype))


def _needs_logits(name: str, logits: bool) -> None:
    if not logits:
        raise ValueError(f"{name}: 'uclaml' takes raw logits; pass them with logits=True")


def _mode(mode: str | None) -> int:
    return _MODES[checks.choice("mode", mode, tuple(_MODES))]


# Derivatives, in plain torch, hence differentiable themselves.


def _win_rate_grad(grad: Tensor, x: Tensor, lengths: Tensor | None, include_self: bool) -> Tensor:
    n = sizes(x, lengths)
    share = grad / (n if include_self else n - 1)[:, None]
    return share[:, :, None] * opponents(x, lengths)


def _symmetrize_grad(grad: Tensor, x: Tensor, mode: int) -> Tensor:
    if mode == AS_GIVEN:
        return grad
    if mode == LOGIT:
        p = torch.sigmoid((x - x.mT) / 2)
        grad = grad * p * (1 - p)
    return (grad - grad.mT) / 2


def _targets_setup(ctx, inputs, output):
    x, lengths, ctx.mode, ctx.include_self, ctx.eta = inputs
    ctx.save_for_backward(x, lengths, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _targets_backward(ctx, grad_win, grad_target, _best, _worst, grad_prob):
    x, lengths, best, worst = ctx.saved_tensors
    grad = grad_win + ctx.eta * grad_target
    dp = _win_rate_grad(grad, x, lengths, ctx.include_self or ctx.mode == UCLAML)
    game = torch.arange(x.shape[0], device=x.device)
    dp = dp.index_put((game, best, worst), grad_prob, accumulate=True)
    if ctx.mode != UCLAML:
        return _symmetrize_grad(dp, x, ctx.mode), None, None, None, None
    score = scores(x, lengths)
    p = torch.sigmoid(score[:, :, None] - score[:, None, :])
    dp = dp * p * (1 - p)
    ds = dp.sum(-1) - dp.sum(-2)
    dx = (ds[:, :, None] - ds[:, None, :]) / sizes(x, lengths)[:, None, None]
    return dx * opponents(x, lengths), None, None, None, None


def _win_rates_setup(ctx, inputs, output):
    x, lengths, ctx.include_self = inputs
    ctx.save_for_backward(x, lengths)


def _win_rates_backward(ctx, grad):
    return _win_rate_grad(grad, *ctx.saved_tensors, ctx.include_self), None, None


def _symmetrize_setup(ctx, inputs, output):
    x, ctx.mode = inputs
    ctx.save_for_backward(x)


def _symmetrize_backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return _symmetrize_grad(grad * opponents(x, None), x, ctx.mode), None


formula("game_targets", _targets_backward, _targets_setup)
formula("game_win_rates", _win_rates_backward, _win_rates_setup)
formula("game_symmetrize", _symmetrize_backward, _symmetrize_setup)
