"""Judges: who says which of two responses is better."""

from sppo_kernels.judges.base import Judge, JudgeError, win_matrices
from sppo_kernels.judges.function import CallableJudge
from sppo_kernels.judges.load import load_judge
from sppo_kernels.judges.pairrm import PairRMJudge
from sppo_kernels.judges.recorded import RecordedJudge
from sppo_kernels.judges.reward import RewardModelJudge

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
