"""Judges: who says which of two responses is better."""

from sppo_kernels.judges.base import Judge, JudgeError, load_judge, win_matrices
from sppo_kernels.judges.pairrm import PairRMJudge
from sppo_kernels.judges.reward import RewardModelJudge
from sppo_kernels.judges.simple import CallableJudge, RecordedJudge

__all__ = [
    "CallableJudge",
    "Judge",
    "JudgeError",
    "PairRMJudge",
    "RecordedJudge",
    "RewardModelJudge",
    "load_judge",
    "win_matrices",
]
