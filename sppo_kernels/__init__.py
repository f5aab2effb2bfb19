"""Fused kernels, preference games and a thin trainer for Self-Play Preference Optimization."""

import sys as _sys

from sppo_kernels.games.comparisons import aggregate, load_comparisons
from sppo_kernels.games.solvers import bradley_terry, nash, regularized_nash, tournament
from sppo_kernels.games.targets import (
    preference_targets,
    select_pairs,
    sppo_targets,
    symmetrize,
    win_rates,
)
from sppo_kernels.logps import (
    linear_sequence_logps,
    linear_token_logps,
    linear_token_stats,
    sequence_logps,
    token_logps,
)
from sppo_kernels.loss.modules import FusedLinearSPPOLoss, FusedSPPOLoss, PairwiseLoss, SPPOLoss
from sppo_kernels.loss.pairwise import pairwise_loss
from sppo_kernels.loss.sppo import fused_linear_sppo_loss, fused_sppo_loss, sppo_loss
from sppo_kernels.results import (
    Aggregate,
    Comparisons,
    Equilibrium,
    Pairs,
    SPPOOutput,
    SPPOTargets,
    Strengths,
    TokenStats,
    Tournament,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "Comparisons",
    "Equilibrium",
    "FusedLinearSPPOLoss",
    "FusedSPPOLoss",
    "Pairs",
    "PairwiseLoss",
    "SPPOLoss",
    "SPPOOutput",
    "SPPOTargets",
    "Strengths",
    "TokenStats",
    "Tournament",
    "aggregate",
    "bradley_terry",
    "fused_linear_sppo_loss",
    "fused_sppo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
    "load_comparisons",
    "nash",
    "pairwise_loss",
    "preference_targets",
    "regularized_nash",
    "select_pairs",
    "sequence_logps",
    "sppo_loss",
    "sppo_targets",
    "symmetrize",
    "token_logps",
    "tournament",
    "win_rates",
]

# Modules by the names they had before each stood in its room.
for _old, _new in {
    "comparisons": "games.comparisons",
    "nn": "loss.modules",
    "objectives": "loss.objectives",
    "pairwise": "loss.pairwise",
    "preference": "games.targets",
    "types": "results",
}.items():
    globals()[_old] = _sys.modules[f"{__name__}.{_new}"]
    for _name in [n for n in _sys.modules if f"{n}.".startswith(f"{__name__}.{_new}.")]:
        _sys.modules[_name.replace(_new, _old, 1)] = _sys.modules[_name]
