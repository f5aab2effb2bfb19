"""Eager PyTorch for the solvers: one tensor program for the whole batch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sppo_kernels.games.reference.targets import inside, opponents, sizes

_BATCH = 4096  # games that are solved together; the slowest of them sets the number of rounds


def _payoffs(x: Tensor, lengths: Tensor | None) -> Tensor:
    x = x.double()
    return ((x - x.mT) / 2).masked_fill(~opponents(x, lengths), 0)


def _exploitability(payoffs: Tensor, strategy: Tensor) -> Tensor:
    return (payoffs @ strategy[:, :, None]).squeeze(-1).amax(-1).clamp(min=0)


def _in_batches(solve, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    parts = []
    for start in range(0, max(1, x.shape[0]), _BATCH):
        rows = slice(start, start + _BATCH)
        parts.append(solve(x[rows], None if lengths is None else lengths[rows]))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def nash(
    x: Tensor, lengths: Tensor | None, mirror: bool, tol: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    def solve(x, lengths):
        payoffs, valid = _payoffs(x, lengths), inside(x, lengths)
        if mirror:
            return _mirror(payoffs, valid, tol, max_iter)
        strategy = _simplex(payoffs, valid)
        return strategy, _exploitability(payoffs, strategy)

    return tuple(_in_batches(solve, x, lengths))


def _simplex(payoffs: Tensor, valid: Tensor) -> Tensor:
    """max sum(y) s.t. (1/2 + A) y <= 1, y >= 0: the simplex method, a condensed tableau a game."""
    games, k = payoffs.shape[:2]
    here = torch.arange(games, device=payoffs.device)
    both = valid[:, :, None] & valid[:, None, :]
    tab = payoffs.new_zeros(games, k + 1, k + 1)
    tab[:, :k, :k] = (0.5 + payoffs) * both
    tab[:, :k, k] = 1
    tab[:, k, :k] = valid.double()
    labels = torch.arange(k, device=payoffs.device)
    rows, columns = (labels + k).repeat(games, 1), labels.repeat(games, 1)
    column_worst = (tab[:, :k, :k].amax(1)).masked_fill(~valid, torch.inf)
    enter, active = column_worst.argmin(-1), torch.ones_like(here, dtype=torch.bool)
    for step in range(50 * k + 200):
        column, level = tab[here, :k, enter], tab[:, :k, k].clamp(min=0)
        ratio = torch.where(column > 1e-11, level / column, torch.inf)
        ties = ratio == ratio.amin(-1, keepdim=True)
        leave = torch.where(ties, rows, 2 * k).argmin(-1)
        tab = torch.where(active[:, None, None], _pivot(tab, here, leave, enter), tab)
        old, new = rows[here, leave], columns[here, enter]
        rows[here, leave] = torch.where(active, new, old)
        columns[here, enter] = torch.where(active, old, new)
        cost = tab[:, k, :k]
        if step >= 8 * k + 32:  # Bland's rule cannot cycle
            enter = torch.where(cost > 1e-12, columns, 2 * k).argmin(-1)
        else:
            enter = cost.argmax(-1)
        active = active & (cost.amax(-1) > 1e-12)
        if not bool(active.any()):
            break
    strategy = payoffs.new_zeros(games, 2 * k).scatter(1, rows, tab[:, :k, k].clamp(min=0))[:, :k]
    return strategy / strategy.sum(-1, keepdim=True)


def _pivot(tab: Tensor, here: Tensor, leave: Tensor, enter: Tensor) -> Tensor:
    inverse = 1 / tab[here, leave, enter]
    column = tab[here, :, enter]
    row = tab[here, leave] * inverse[:, None]
    row[here, enter] = inverse
    out = tab.clone()
    out[here, :, enter] = 0
    out = out - column[:, :, None] * row[:, None, :]
    out[here, leave] = row
    return out


def _mirror(payoffs: Tensor, valid: Tensor, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Optimistic multiplicative weights; the better of the last iterate and the running mean."""
    z = torch.zeros_like(valid, dtype=torch.float64).masked_fill(~valid, -torch.inf)
    x = torch.softmax(z, -1)
    best, residual = x, _exploitability(payoffs, x)
    gain = (payoffs @ x[:, :, None]).squeeze(-1)
    before, mean, since, restart = torch.zeros_like(x), torch.zeros_like(x), 0, 128
    for t in range(1, max_iter + 1):
        if bool((residual <= tol).all()):
            break
        z, before = z + 4.0 * (2 * gain - before), gain
        x = torch.softmax(z, -1)
        gain = (payoffs @ x[:, :, None]).squeeze(-1)
        since += 1
        mean = mean + (x - mean) / since
        candidates = [(x, gain.amax(-1).clamp(min=0))]
        if t % 64 == 0:
            candidates.append((mean, _exploitability(payoffs, mean)))
        for strategy, value in candidates:
            better = value < residual
            best = torch.where(better[:, None], strategy, best)
            residual = torch.where(better, value, residual)
        if t == restart:
            restart, since = 2 * restart, 0
    return best, residual


def regularized_nash(
    x: Tensor, lengths: Tensor | None, log_mu: Tensor, tau: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Damped Newton on F(z) = z - log mu - A softmax(z) / tau; see csrc/game/regularized.h."""
    payoffs, valid = _payoffs(x, lengths), inside(x, lengths)
    log_mu = log_mu.expand(x.shape[0], -1)
    eye = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)

    def evaluate(z, tau):
        pi = torch.softmax(z.masked_fill(~valid, -torch.inf), -1)
        gain = (payoffs @ pi[:, :, None]).squeeze(-1)
        f = (z - log_mu - gain / tau).masked_fill(~valid, 0)
        return pi, gain, f, f.square().sum(-1)

    def newton(z, tau):
        pi, gain, f, size = evaluate(z, tau)
        active = size > 0
        for _ in range(max_iter):
            if not bool(active.any()):
                break
            jacobian = eye - (payoffs - gain[:, :, None]) * pi[:, None, :] / tau
            direction = torch.linalg.solve(jacobian, -f).masked_fill(~valid, 0)
            reach = torch.ones_like(size)
            for _ in range(50):
                found = evaluate(z + reach[:, None] * direction, tau)[3]
                enough = found <= (1 - 1e-4 * reach) * size
                if bool((enough | ~active).all()):
                    break
                reach = torch.where(enough, reach, reach / 2)
            active = active & (found < size)
            z = torch.where(active[:, None], z + reach[:, None] * direction, z)
            pi, gain, f, size = evaluate(z, tau)
            active = active & (size > 0)
        return z

    stage = max(tau, 0.02)
    z = newton(log_mu.masked_fill(~valid, 0), stage)
    while stage > tau:
        after = max(stage / 4, tau)
        z = newton(log_mu + (z - log_mu) * (stage / after), after)
        stage = after
    pi, gain, _, _ = evaluate(z, tau)
    again = torch.softmax((log_mu + gain / tau).masked_fill(~valid, -torch.inf), -1)
    return pi, (again - pi).abs().amax(-1)


def bradley_terry(
    x: Tensor, lengths: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Newton on the likelihood with a self-concordant step; see csrc/game/bradley_terry.h."""
    valid = inside(x, lengths)
    wins = x.double() if counts is None else x.double() * counts.double()
    wins = wins.masked_fill(~opponents(x, lengths), 0)
    connected = _reaches_all(wins > 0, valid) & _reaches_all(wins.mT > 0, valid)
    heaviest = wins.amax((-1, -2), keepdim=True).masked_fill(~connected[:, None, None], 1)
    ones = heaviest * (valid[:, :, None] & valid[:, None, :])
    n = sizes(wins, lengths)[:, None]
    theta = torch.zeros_like(wins[:, 0])
    for _ in range(200):
        p = torch.sigmoid(theta[:, :, None] - theta[:, None, :])
        curvature = (wins + wins.mT) * p * p.mT
        hessian = torch.diag_embed(curvature.sum(-1) + (~valid)) - curvature + ones
        gradient = (wins * p.mT - wins.mT * p).sum(-1)
        hessian = torch.where(connected[:, None, None], hessian, torch.eye(x.shape[-1]).to(hessian))
        d = torch.linalg.solve(hessian, gradient * connected[:, None])
        spread = d.masked_fill(~valid, -torch.inf).amax(-1) - d.masked_fill(~valid, torch.inf).amin(
            -1
        )
        theta = theta + d / (1 + spread / 2)[:, None]
        if not bool((spread > 1e-7).any()):
            break
    theta = theta - theta.sum(-1, keepdim=True) / n
    theta = theta.masked_fill(~connected[:, None], torch.nan).masked_fill(~valid, 0)
    return theta, connected


def _reaches_all(edges: Tensor, valid: Tensor) -> Tensor:
    """Whether response 0 reaches every valid response along `edges` [G, K, K]."""
    reached = torch.zeros_like(valid)
    reached[:, 0] = True
    for _ in range(edges.shape[-1]):
        more = reached | (reached[:, :, None] & edges).any(1)
        if bool((more == reached).all()):
            break
        reached = more
    return (reached | ~valid).all(-1)


def tournament(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    valid = inside(x, lengths)
    payoffs = _payoffs(x, lengths)
    beats = payoffs > 0
    most, winner = beats.sum(-1).max(-1)
    n = valid.sum(-1)
    condorcet = torch.where(most == n - 1, winner, -1)
    # The Smith set is who reaches everyone along "is not beaten by".
    reach = ~(payoffs < 0) & valid[:, :, None] & valid[:, None, :]
    for _ in range(max(1, x.shape[-1].bit_length())):
        reach = torch.bmm(reach.double(), reach.double()) > 0
    smith = (reach | ~valid[:, None, :]).all(-1) & valid
    b = beats.double()
    cycles = (torch.bmm(b, b) * b.mT).sum((-1, -2)) / 3
    return condorcet, smith, cycles.round().long()
