"""Eager PyTorch: the specification of the games, a function for each operator `game_<name>`."""

from sppo_kernels.games.reference.solvers import (
    bradley_terry,
    nash,
    regularized_nash,
    tournament,
)
from sppo_kernels.games.reference.targets import aggregate, check, symmetrize, targets, win_rates

__all__ = [
    "aggregate",
    "bradley_terry",
    "check",
    "nash",
    "regularized_nash",
    "symmetrize",
    "targets",
    "tournament",
    "win_rates",
]
