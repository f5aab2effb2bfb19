"""SoftSPPOTrainer's data: tokens and truncation as TRL's, and errors that name row and column."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sppo_kernels.data.rows import DataError
from sppo_kernels.integrations.trl import (
    DataCollatorForSoftSPPO,
    SoftSPPOConfig,
    SoftSPPOTrainer,
    hooks,
    rows,
)
from sppo_kernels.trainer import HeadProbeError
from tests import trl_tools as tools
from tests.trainer_models import build


def as_group(row: dict) -> dict:
    return {
        "prompt": row["prompt"],
        "responses": [row["chosen"], row["rejected"]],
        "win_rate": [row["chosen_probs_win"], row["chosen_probs_lose"]],
    }


def as_chat(row: dict) -> dict:
    def say(role, text):
        return [{"role": role, "content": text}]

    return row | {
        "prompt": say("user", row["prompt"]),
        "chosen": say("assistant", row["chosen"]),
        "rejected": say("assistant", row["rejected"]),
    }


@pytest.mark.parametrize("chat", [False, True])
def test_groups_are_tokenized_as_trl_tokenizes_pairs(chat, generator, tmp_path):
    data = tools.pairs(generator, 5)
    group = [as_group(row) for row in data]
    if chat:  # responses of a chat may be texts or messages
        data = [as_chat(row) for row in data]
        for i, row in enumerate(data):
            group[i]["prompt"] = row["prompt"]
            if i % 2:
                group[i]["responses"] = [row["chosen"], row["rejected"]]
        group = [row for i, row in enumerate(group) if i % 2 == 0], group[1::2]
    else:
        group = group[::2], group[1::2]
    theirs = tools.trainer(build("llama-untied"), data, tmp_path, kind=DPOTrainer)
    pairs = tools.trainer(build("llama-untied"), data, tmp_path)
    for start, part in enumerate(group):
        ours = tools.trainer(build("llama-untied"), part, tmp_path)
        for i, row in enumerate(ours.train_dataset):
            expected = theirs.train_dataset[2 * i + start]
            assert row["prompt_ids"] == expected["prompt_ids"]
            assert row["response_ids"] == [expected["chosen_ids"], expected["rejected_ids"]]
            pair = pairs.train_dataset[2 * i + start]
            assert tools.sequences(pair) == tools.sequences(row)
            assert pair["win_rate"] == row["win_rate"]
            best = 0 if row["win_rate"][0] >= row["win_rate"][1] else 1
            assert pair["pair"] == [0, 1] and row["pair"] == [best, 1 - best]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("max_length", [7, None])
def test_batches_are_those_of_trl(mode, multiple, max_length, generator):
    """The same rows of tokens, and the same tokens scored, truncated or not."""

    def ids(low, high):
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 99, (n,), generator=generator).tolist()

    data = [
        {
            "prompt_ids": ids(1, 7),
            "chosen_ids": ids(1, 12),
            "rejected_ids": ids(1, 12),
            "win_rate": [0.75, 0.5],
            "pair": [0, 1],
        }
        for _ in range(4)
    ]
    arguments = (0, max_length, mode, multiple)
    theirs = DataCollatorForPreference(*arguments)(data)
    ours = DataCollatorForSoftSPPO(*arguments)(data)
    order = [i for pair in zip(range(4), range(4, 8), strict=True) for i in pair]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name][order])
    batch = ours["sppo"]
    scored = theirs["completion_mask"][order]
    scored[:, 0] = 0  # nothing predicts the first token of a row
    assert torch.equal(batch.labels, ours["input_ids"][scored.bool()])
    assert torch.equal(batch.rows, scored.flatten().nonzero()[:, 0] - 1)
    assert torch.equal(batch.cu_seqlens.diff(), scored.sum(1))


def test_rows_without_room_for_a_response_are_dropped(generator, tmp_path):
    data = tools.groups(generator, 6)
    data[2]["prompt"] = " ".join(["w9"] * 30)
    trainer = tools.trainer(build("llama-untied"), data, tmp_path, max_length=24)
    assert len(trainer.train_dataset) == 5
    kept = tools.trainer(
        build("llama-untied"), data, tmp_path, max_length=24, truncation_mode="keep_end"
    )
    assert len(kept.train_dataset) == 6


PAIR = {"prompt": "w5", "chosen": " w6", "rejected": " w7"}
PAIR |= {"chosen_probs": 0.7, "chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}
GROUP = {"prompt": "w5", "responses": [" w6", " w7", " w8"], "win_rate": [0.5, 0.75, 0.25]}
SQUARE = [[0.5, 0.5, 0.5]] * 3


def without(row, *names, **changes):
    return {k: v for k, v in row.items() if k not in names} | changes


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (without(PAIR, "chosen_probs_win"), "sppo", "chosen_probs_win, which is not there"),
        (without(PAIR, "chosen_probs"), "sppo_single", "chosen_probs, which is not there"),
        (without(PAIR, chosen_probs_lose=None), "sppo", "chosen_probs_lose, which is empty"),
        (without(PAIR, chosen_probs_lose=1.5), "sppo", r"chosen_probs_lose: .*\[0, 1\], got 1.5"),
        (without(PAIR, chosen_probs=-0.1), "sppo_single", r"chosen_probs: .*got -0.1"),
        (without(PAIR, chosen_probs_win=math.nan), "sppo", r"chosen_probs_win: .*got nan"),
        (without(PAIR, chosen_probs_win="x"), "sppo", "chosen_probs_win: expected a number"),
        (without(PAIR, chosen=None), "sppo_hard", "expected a column chosen"),
        (without(GROUP, responses=[" w6"], win_rate=[0.5]), "sppo", "K >= 2 responses"),
        (without(GROUP, "win_rate"), "sppo", "win_matrix or win_rate"),
        (without(GROUP, win_rate=[0.5, 0.5]), "sppo", "win_rate: expected 3 numbers"),
        (without(GROUP, win_rate=[0.5, 2.0, 0.5]), "sppo", r"win_rate: .*got 2.0 at position 1"),
        (without(GROUP, win_rate=[0.5, None, 0.5]), "sppo", r"win_rate: .*got nan at position 1"),
        (without(GROUP, "win_rate", win_matrix=SQUARE[:2]), "sppo", "win_matrix: expected 3 x 3"),
        (without(GROUP, ref_logps=[-1.0]), "sppo", "ref_logps: expected 3 entries"),
        (without(GROUP, ref_logps=[-1.0] * 3), "sppo", "ref_logps: is that of whole responses"),
        (without(GROUP, "prompt", "responses", prompt_ids=[5], response_ids=[[6], [], [7]]),
         "sppo", "response 1 has no tokens"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(row, kind, message):
    with pytest.raises(DataError, match=message) as error:
        if rows.is_group(row):
            rows.group_example(row, 3, tools.tokenizer(), max_length=2)
        else:
            rows.pair_targets(row, 3, kind)
    assert "row 3" in str(error.value)


def test_errors_reach_the_user(tmp_path):
    model = build("llama-untied")
    data = [PAIR, without(PAIR, chosen_probs_win=1.25)]
    with pytest.raises(DataError, match=r"row 1: chosen_probs_win.*1\.25"):
        tools.trainer(model, data, tmp_path)
    with pytest.raises(DataError, match="'sppo_hard' is that of pairs"):
        tools.trainer(model, [GROUP], tmp_path, loss_type="sppo_hard")
    with pytest.raises(TypeError, match="expected SoftSPPOConfig, got DPOConfig"):
        SoftSPPOTrainer(model, args=DPOConfig(**tools.settings(tmp_path)))
    with pytest.raises(TypeError, match="needs DataCollatorForSoftSPPO, got function"):
        SoftSPPOTrainer(
            model,
            build("llama-untied"),
            args=SoftSPPOConfig(**tools.settings(tmp_path)),
            data_collator=_other,
            train_dataset=Dataset.from_list([PAIR]),
            processing_class=tools.tokenizer(),
        )


def _other(rows):
    return rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ["sppo", "sft"]}, "cannot be combined"),
        ({"loss_type": ["sigmoid", "sppo_hard"]}, "cannot be combined"),
        ({"ld_alpha": 0.5}, "ld_alpha: has no meaning for loss_type 'sppo'"),
        ({"use_weighting": True}, "use_weighting: has no meaning"),
        ({"label_smoothing": 0.1}, "label_smoothing: has no meaning"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type: has no meaning"),
        ({"loss_units": "nats"}, "loss_units: expected one of"),
        ({"beta": 0.0}, "beta: expected a number above 0"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SoftSPPOConfig(**tools.settings(tmp_path, **changes))


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_a_wrong_head_is_refused(which, generator, tmp_path):
    """Logits that the head's weight and config do not explain."""
    model, ref = build("llama-untied"), build("llama-untied")

    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    (model if which == "policy" else ref).__class__ = Doubled
    with pytest.raises(HeadProbeError, match="Doubled: the fused log-probability"):
        SoftSPPOTrainer(
            model,
            ref,
            args=SoftSPPOConfig(**tools.settings(tmp_path)),
            train_dataset=Dataset.from_list(tools.pairs(generator, 2)),
            processing_class=tools.tokenizer(),
        )


def test_other_versions_of_trl_are_taken_by_their_hooks():
    classes = (DPOTrainer, DPOConfig, DataCollatorForPreference)
    assert hooks.missing_hooks(*classes) == []
    hooks.check_version("1.99.0", *classes)

    class Renamed(DPOTrainer):
        _compute_loss = None

        def compute_ref_log_probs(self, inputs):
            raise NotImplementedError

    with pytest.raises(hooks.UnsupportedTRLError, match=r"TRL 2\.0 lacks") as error:
        hooks.check_version("2.0", Renamed, DPOConfig, DataCollatorForPreference)
    for part in ("_compute_loss is not there", "compute_ref_log_probs('self', 'inputs')"):
        assert part in str(error.value)
    hooks.check_version("1.16.3", Renamed, DPOConfig, DataCollatorForPreference)


def test_nothing_stays_in_the_model_between_calls(generator, tmp_path):
    import copy

    model = build("llama-untied")
    ids = torch.tensor([[5, 6, 7]])
    own = model.eval()(ids).logits
    trainer = tools.trainer(model, tools.pairs(generator, 2), tmp_path)
    trainer.evaluate(trainer.train_dataset)
    trainer.release()
    # accelerate gives the model itself a forward; the head keeps its class's
    assert "forward" not in vars(trainer.model.lm_head)
    for found in (trainer.model, copy.deepcopy(trainer.model)):
        assert torch.equal(found.eval()(ids).logits.float(), own)


def test_example_trains_on_its_sample():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "examples/trl_soft_sppo.py", "--epochs", "4"],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    residuals = [float(x) for x in re.findall(r"residual ([0-9.]+)", done.stdout)]
    ranks = [float(x) for x in re.findall(r"correlation ([+-][0-9.]+)", done.stdout)]
    assert len(residuals) == 4 and residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.9 * residuals[0] and ranks[-1] > 0.5
