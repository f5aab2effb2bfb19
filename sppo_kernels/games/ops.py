"""Schemas, fakes and derivatives of the preference-game operators.

The implementations are in C++ (csrc/cpu/game.cpp, csrc/cuda/game.cpp) and appear when the
extension is loaded. Games are contiguous [G, K, K] float32 or float64 tensors, `lengths` int64 [G].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.registry import define, formula
from sppo_kernels.registry import fake as _fake

AS_GIVEN, PROB, LOGIT, UCLAML = 0, 1, 2, 3

_SCHEMAS = {
    "game_targets": "(Tensor x, Tensor? lengths, int mode, bool include_self, float eta) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "game_win_rates": "(Tensor x, Tensor? lengths, bool include_self) -> Tensor",
    "game_symmetrize": "(Tensor x, int mode) -> Tensor",
    "game_check": "(Tensor x, Tensor? lengths, float low, float high, bool want_gap) -> Tensor",
    "game_nash": "(Tensor x, Tensor? lengths, bool mirror, float tol, int max_iter) "
    "-> (Tensor, Tensor)",
    "game_regularized_nash": "(Tensor x, Tensor? lengths, Tensor log_mu, float tau, int max_iter) "
    "-> (Tensor, Tensor)",
    "game_bradley_terry": "(Tensor x, Tensor? lengths, Tensor? counts) -> (Tensor, Tensor)",
    "game_tournament": "(Tensor x, Tensor? lengths) -> (Tensor, Tensor, Tensor)",
    "game_group": "(Tensor game, int games) -> (Tensor, Tensor)",
    "game_aggregate": "(Tensor i, Tensor j, Tensor outcome, Tensor? weight, Tensor indptr, "
    "Tensor? order, int k, bool wide) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    define(_name, _schema)


@_fake("game_targets")
def _(x, lengths, mode, include_self, eta):
    games, k = x.shape[:2]
    index = torch.int64
    win, target = x.new_empty(games, k), x.new_empty(games, k)
    best, worst = x.new_empty(games, dtype=index), x.new_empty(games, dtype=index)
    return win, target, best, worst, x.new_empty(games)


@_fake("game_win_rates")
def _(x, lengths, include_self):
    return x.new_empty(x.shape[:2])


@_fake("game_symmetrize")
def _(x, mode):
    return x.new_empty(x.shape)


@_fake("game_check")
def _(x, lengths, low, high, want_gap):
    return x.new_empty(3, dtype=torch.float64)


def _strategy(x):
    double = torch.float64
    return x.new_empty(x.shape[:2], dtype=double), x.new_empty(x.shape[0], dtype=double)


@_fake("game_nash")
def _(x, lengths, mirror, tol, max_iter):
    return _strategy(x)


@_fake("game_regularized_nash")
def _(x, lengths, log_mu, tau, max_iter):
    return _strategy(x)


@_fake("game_bradley_terry")
def _(x, lengths, counts):
    return _strategy(x)[0], x.new_empty(x.shape[0], dtype=torch.bool)


@_fake("game_tournament")
def _(x, lengths):
    index = x.new_empty(x.shape[0], dtype=torch.int64)
    return index, x.new_empty(x.shape[:2], dtype=torch.bool), torch.empty_like(index)


@_fake("game_group")
def _(game, games):
    return game.new_empty(games + 1), game.new_empty(game.shape)


@_fake("game_aggregate")
def _(i, j, outcome, weight, indptr, order, k, wide):
    dtype = torch.float64 if wide else torch.float32
    games = indptr.shape[0] - 1
    square = outcome.new_empty(games, k, k, dtype=dtype)
    rows = [outcome.new_empty(games, k, dtype=dtype) for _ in range(3)]
    return square, torch.empty_like(square), *rows


# Derivatives, in plain torch, hence differentiable themselves.


def _opponents(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[G or 1, K, K] bool: entries of the games that an opponent stands behind."""
    k = x.shape[-1]
    mask = ~torch.eye(k, dtype=torch.bool, device=x.device)[None]
    if lengths is None:
        return mask
    inside = torch.arange(k, device=x.device) < lengths[:, None]
    return mask & inside[:, :, None] & inside[:, None, :]


def _win_rate_grad(grad: Tensor, x: Tensor, lengths: Tensor | None, include_self: bool) -> Tensor:
    n = x.new_full((1,), x.shape[-1]) if lengths is None else lengths.to(x.dtype)
    share = grad / (n if include_self else n - 1)[:, None]
    return share[:, :, None] * _opponents(x, lengths)


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
    game = torch.arange(x.shape[0], device=x.device)
    if ctx.mode != UCLAML:
        dp = _win_rate_grad(grad, x, lengths, ctx.include_self)
        dp = dp.index_put((game, best, worst), grad_prob, accumulate=True)
        return _symmetrize_grad(dp, x, ctx.mode), None, None, None, None
    mask = _opponents(x, lengths)
    n = x.new_full((1,), x.shape[-1]) if lengths is None else lengths.to(x.dtype)
    score = ((x - x.mT) * mask).sum(-1) / n[:, None]
    p = torch.sigmoid(score[:, :, None] - score[:, None, :])
    dp = _win_rate_grad(grad, x, lengths, True)
    dp = dp.index_put((game, best, worst), grad_prob, accumulate=True) * p * (1 - p)
    ds = dp.sum(-1) - dp.sum(-2)
    dx = (ds[:, :, None] - ds[:, None, :]) / n[:, None, None] * mask
    return dx, None, None, None, None


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
    return _symmetrize_grad(grad * _opponents(x, None), x, ctx.mode), None


for _name, _backward, _setup in (
    ("game_targets", _targets_backward, _targets_setup),
    ("game_win_rates", _win_rates_backward, _win_rates_setup),
    ("game_symmetrize", _symmetrize_backward, _symmetrize_setup),
):
    formula(_name, _backward, _setup)
