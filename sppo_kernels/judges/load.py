"""Judges by their names."""

from __future__ import annotations

from typing import Any

from sppo_kernels.judges.base import Judge, JudgeError
from sppo_kernels.judges.function import CallableJudge
from sppo_kernels.judges.pairrm import PairRMJudge
from sppo_kernels.judges.recorded import RecordedJudge
from sppo_kernels.judges.reward import RewardModelJudge

# kind: (class, what follows the colon). A judge of another kind is a file and a line here.
JUDGES: dict[str, tuple[Any, str]] = {
    "pairrm": (PairRMJudge, "PATH"),
    "reward": (RewardModelJudge, "PATH"),
    "recorded": (RecordedJudge, "FILE"),
}
NAMES = ", ".join(f"{kind}:{rest}" for kind, (_, rest) in JUDGES.items()) + " or MODULE:FUNCTION"


def load_judge(spec: str, **options: Any) -> Judge:
    """A judge by its name.

    Args:
        spec: "pairrm:PATH", "reward:PATH", "recorded:FILE.csv" or "MODULE:FUNCTION".
        options: for the judge's class.

    Raises:
        JudgeError: the name has none of these forms.
    """
    kind, _, rest = spec.partition(":")
    if not rest:
        raise JudgeError(f"judge: expected {NAMES}, got {spec!r}")
    if kind in JUDGES:
        return JUDGES[kind][0](rest, **options)
    return CallableJudge(spec, **options)
