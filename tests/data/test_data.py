"""Rows, truncation, the reference cache, metrics: named errors, nothing cut or stale silently."""

import json
import logging
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from scipy.stats import spearmanr

from sppo_kernels.data.rows import (
    DataError,
    OverLengthError,
    canonical_row,
    from_uclaml,
    read_parquet,
    to_uclaml,
    write_parquet,
)
from sppo_kernels.data.tokenize import prepare_dataset
from sppo_kernels.games.targets import win_rates
from sppo_kernels.trainer import ReferenceCacheError, SPPOTrainer
from sppo_kernels.trainer.metrics import preference_metrics
from sppo_kernels.trainer.reference import FILE
from tests.trainer.test_step import ETA, config
from tests.trainer_models import build, rows

GOOD = {"prompt": "a", "responses": ["b", "c"], "win_matrix": [[0.5, 0.7], [0.3, 0.5]]}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        c: i + 4 for i, c in enumerate("abcde")
    }
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}e{% endif %}"
    )
    return fast


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": ["b"], "win_matrix": [[0.5]]}, "row 3: expected K >= 2"),
        ({"win_matrix": [[0.5, math.nan], [0.3, 0.5]]}, r"row 3: win_matrix\[0\].*nan.*position 1"),
        ({"win_matrix": [[0.5, 1.2], [0.3, 0.5]]}, r"win_matrix\[0\].*1\.2"),
        ({"win_matrix": [[0.5, 0.7]]}, "expected 2 x 2"),
        ({"win_matrix": None}, "win_matrix or win_rate"),
        ({"win_matrix": None, "win_rate": [0.5]}, "expected 2 numbers"),
        ({"prompt": None}, "column prompt"),
        ({"ref_logps": [1.0]}, "ref_logps: expected 2"),
    ],
)
def test_bad_rows_are_named(change, message):
    with pytest.raises(DataError, match=message):
        canonical_row(GOOD | change, 3)


def test_win_rates_come_from_the_matrix_without_the_response_itself():
    matrix = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]
    row = {"prompt": "a", "responses": ["b", "c", "d"], "win_matrix": matrix}
    assert canonical_row(row)["win_rate"] == pytest.approx([0.55, 0.35, 0.6])
    assert canonical_row(row)["win_rate"] == pytest.approx(win_rates(matrix).tolist())


def test_released_columns_go_both_ways():
    matrix = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]]
    released = to_uclaml([{"prompt": "a", "responses": ["b", "c", "d"], "win_matrix": matrix}])
    assert released[0]["chosen"][-1]["content"] == "d"
    assert released[0]["rejected"][-1]["content"] == "c"
    assert released[0]["chosen_probs"] == pytest.approx(0.4)
    (back,) = from_uclaml(released)
    assert back["responses"] == ["d", "c"]
    assert back["win_rate"] == pytest.approx([0.6, 0.35])
    assert back["prompt"] == [{"role": "user", "content": "a"}]


def test_plain_pairs_are_hard_labels():
    row = canonical_row({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert row["win_rate"] == [1.0, 0.0]
    assert row["responses"] == ["b", "c"]


def test_text_becomes_ids_once_with_one_bos_and_one_eos(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "ab"}]
    data = prepare_dataset(
        [{"prompt": chat, "responses": ["cd", "d</s>"], "win_rate": [0.4, 0.6]}],
        tokenizer,
        config(tmp_path),
    )
    assert data[0]["prompt_ids"] == [1, 4, 5, 8]  # <s> a b e
    assert data[0]["response_ids"] == [[6, 7, 2], [7, 2]]
    kept = prepare_dataset(
        [GOOD | {"prompt_ids": [1, 9], "response_ids": [[5], [6, 2]]}], tokenizer, config(tmp_path)
    )
    assert kept[0]["response_ids"] == [[5], [6, 2]]  # generated ids are not touched


def test_best_and_worst_pair(generator, tmp_path):
    (row,) = rows(generator, 1)
    row["win_rate"] = [0.4, 0.9, 0.9, 0.1, 0.1]
    data = prepare_dataset([row], None, config(tmp_path, pairs="best_worst"))
    assert data[0]["response_ids"] == [row["response_ids"][1], row["response_ids"][4]]
    assert data[0]["win_rate"] == [0.9, 0.1]


def test_overlong_responses_are_refused_counted_or_cut_as_asked(generator, tmp_path, caplog):
    data = rows(generator, 2)
    data[1]["response_ids"][0] = [5] * 40
    data[1]["response_ids"][1] = [5] * 50
    with pytest.raises(OverLengthError, match=r"2 of 10 responses exceed max_length=30"):
        prepare_dataset(data, None, config(tmp_path, max_length=30))
    with caplog.at_level(logging.WARNING, "sppo_kernels"):
        dropped = prepare_dataset(data, None, config(tmp_path, max_length=30, overlong="drop"))
        cut = prepare_dataset(data, None, config(tmp_path, max_length=30, overlong="truncate"))
    assert len(dropped) == 1
    room = 30 - len(data[1]["prompt_ids"])
    assert [len(r) for r in cut[1]["response_ids"]][:2] == [room, room]
    assert cut[0]["response_ids"] == data[0]["response_ids"]
    assert sum("2 of 10 responses" in r.message for r in caplog.records) == 2


def test_parquet_round_trip_and_damage(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet([GOOD], path)
    assert read_parquet(path)[0]["win_matrix"] == GOOD["win_matrix"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet"):
        read_parquet(path)
    with pytest.raises(DataError, match="no such file"):
        read_parquet(tmp_path / "absent.parquet")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_parquet([GOOD], path)
    before = path.read_bytes()

    def full(table, where, **_):
        with open(where, "wb") as handle:
            handle.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match=r"cannot write .*rows\.parquet.*No space left"):
        write_parquet([GOOD, GOOD], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_reference_is_cached_reused_and_refused(generator, tmp_path, monkeypatch):
    data, model = rows(generator, 4), build("llama-tied").eval()
    first = SPPOTrainer(model, config(tmp_path), data)
    first.prepare()
    stored = first.train_dataset["ref_logps"]
    first.release()

    def fail(*_):
        raise AssertionError("the reference was computed again")

    monkeypatch.setattr(SPPOTrainer, "reference_logps", fail)
    again = SPPOTrainer(model, config(tmp_path), data)
    again.prepare()
    assert list(again.train_dataset["ref_logps"]) == list(stored)
    again.release()

    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    with pytest.raises(ReferenceCacheError, match="other weights than"):
        SPPOTrainer(model, config(tmp_path), data).prepare()
    model = build("llama-tied")
    with pytest.raises(ReferenceCacheError, match="other weights and data than"):
        SPPOTrainer(model, config(tmp_path), data[:3]).prepare()
    (path,) = tmp_path.rglob(FILE)
    path.write_text(path.read_text()[:-9] + "]}")
    with pytest.raises(ReferenceCacheError, match="damaged"):
        SPPOTrainer(model, config(tmp_path), data).prepare()


def test_given_reference_columns_and_models_are_used(generator, tmp_path):
    data, model, other = rows(generator, 3), build("llama-tied").eval(), build("opt").eval()
    trainer = SPPOTrainer(model, config(tmp_path), data, ref_model=other)
    trainer.prepare()
    from tests.trainer.test_step import eager_logps

    with torch.no_grad():
        expected = [eager_logps(other, row).tolist() for row in data]
    for got, want in zip(trainer.train_dataset["ref_logps"], expected, strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    trainer.release()
    for row in data:
        row["ref_logps"] = [-1.0] * 5
    given = SPPOTrainer(model, config(tmp_path / "given"), data)
    given.prepare()
    assert given.train_dataset["ref_logps"][0] == [-1.0] * 5


def test_resume_gives_the_weights_of_an_uninterrupted_run(generator, tmp_path):
    data, start = rows(generator, 6), build("qwen2").state_dict()

    def run(folder, steps, **resume):
        model = build("qwen2")
        model.load_state_dict(start)
        args = config(
            folder,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            train_sampling_strategy="random",
        )
        trainer = SPPOTrainer(model, args, data)
        if steps < 4:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **_):
                    control.should_training_stop = state.global_step >= steps

            trainer.add_callback(Stop())
        trainer.train(**resume)
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, resume_from_checkpoint=True)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_metrics_against_scipy(generator):
    groups = [5, 2, 4]
    ratio = torch.randn(11, generator=generator).double()
    win = (torch.randint(0, 5, (11,), generator=generator) / 4).double()
    found = preference_metrics(ratio, win, groups, ETA)
    residual = ratio - ETA * (win - 0.5)
    assert found["loss_log_ratio"] == pytest.approx(float(residual.square().mean()))
    assert found["loss_win_rate"] == pytest.approx(found["loss_log_ratio"] / ETA**2)
    assert found["kl"] == pytest.approx(-float(ratio.mean()))
    expected = [
        spearmanr(r, w).statistic
        for r, w in zip(ratio.split(groups), win.split(groups), strict=True)
        if w.max() > w.min()
    ]
    if expected:
        assert found["rank_correlation"] == pytest.approx(sum(expected) / len(expected))


def test_metrics_reach_the_log_and_the_eval_loss_is_the_mean_over_responses(generator, tmp_path):
    data = rows(generator, 5)
    args = config(tmp_path, per_device_eval_batch_size=2, loss_units="win_rate", max_steps=2)
    trainer = SPPOTrainer(build("qwen2"), args, data, data)
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("loss_log_ratio", "logratio_margin", "rank_correlation", "tokens_per_second"):
        assert math.isfinite(logged[name])
    metrics = trainer.evaluate()
    win = torch.tensor([w for row in data for w in row["win_rate"]])
    trainer.release()
    from tests.trainer.test_step import eager_logps

    with torch.no_grad():
        logps = torch.cat([eager_logps(trainer.model.eval(), row) for row in data])
    ref = torch.tensor([x for r in trainer.eval_dataset["ref_logps"] for x in r])
    expected = float(((logps - ref - ETA * (win - 0.5)) / ETA).square().mean())
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert json.dumps(metrics)


def test_wrappers_that_cast_their_inputs_leave_the_targets_alone():
    from torch.distributed.utils import _apply_to_tensors  # what FSDP applies to forward's inputs

    from sppo_kernels.data.collate import SPPOCollator

    win = [0.1 + 1e-6, 0.9]
    example = {
        "prompt_ids": [1, 2], "response_ids": [[3, 4], [5]], "win_rate": win,
        "ref_logps": [-1000.125, -3.0],
    }  # fmt: skip
    batch = SPPOCollator(packed=True)([example])
    cast = _apply_to_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, batch)
    assert cast["sppo"].win_rate.tolist() == torch.tensor(win).tolist()
    assert cast["sppo"].ref_logps.tolist() == [-1000.125, -3.0]
