"""Judgements to win rates, targets, equilibria and strengths."""

from sppo_kernels.games.comparisons import aggregate, load_comparisons
from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash, tournament
from sppo_kernels.games.targets import (
    TARGETS,
    preference_targets,
    select_pairs,
    sppo_targets,
    symmetrize,
    win_rates,
)

__all__ = [
    "TARGETS",
    "aggregate",
    "bradley_terry",
    "load_comparisons",
    "nash",
    "preference_targets",
    "regularized_nash",
    "select_pairs",
    "sppo_targets",
    "symmetrize",
    "tournament",
    "win_rates",
]
