"""Training on human comparisons (LLMFAO), where the data is at hand."""

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

FOLDER = Path(
    os.environ.get(
        "SPPO_KERNELS_LLMFAO", Path(__file__).resolve().parents[2] / "shared/data/llmfao"
    )
)


@pytest.mark.slow
@pytest.mark.skipif(
    not FOLDER.exists(), reason="needs the LLMFAO data (set SPPO_KERNELS_LLMFAO to its folder)"
)
def test_log_ratios_follow_human_win_rates(tmp_path):
    from benchmarks.llmfao import load, train

    rows = load(FOLDER)
    assert len(rows) == 13
    assert sum(len(r["responses"]) for r in rows) > 650
    # Two prompts with short answers that mostly differ (equal answers cannot be told apart); the
    # full run is benchmarks/llmfao.py.
    rows = [r for r in rows if len(set(r["responses"])) > 0.95 * len(r["responses"])]
    rows.sort(key=lambda row: sum(map(len, row["responses"])))
    fit, held, _ = train(rows[:2], rows[2:3], tmp_path, 90)
    print(f"held out: {held['eval_rank_correlation']:.3f}")
    assert fit["eval_rank_correlation"] > 0.8
