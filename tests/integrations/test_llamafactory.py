"""The LLaMA-Factory adapter, on LLaMA-Factory where it is importable and on a stand-in."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from sppo_kernels.integrations import llamafactory as adapter
from sppo_kernels.integrations._swap import IntegrationError
from sppo_kernels.testing import relative_error
from tests import standins
from tests.standins import llamafactory as standin
from tests.trainer_models import VOCAB, build

ROOT = str(Path(__file__).resolve().parents[2])
TRAINER = "llamafactory.train.dpo.trainer"


factory = standins.fixture(adapter, standin)


def batch(generator, pairs=2):
    """Chosen rows, then rejected ones, padded on the right, prompts masked: as its collator."""
    ids = torch.randint(3, VOCAB, (2 * pairs, 9), generator=generator)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    for row in range(2 * pairs):
        prompt, end = 1 + row % pairs, int(torch.randint(5, 10, (), generator=generator))
        labels[row, :prompt] = labels[row, end:] = -100
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_of(factory, tmp_path, model, ref, data=None, **options):
    """What run_dpo builds, from the class that the module holds now."""
    from transformers import TrainingArguments

    arguments = factory("llamafactory.hparams").FinetuningArguments(stage="dpo", **options)
    settings = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=3,
        per_device_train_batch_size=1, learning_rate=0.3, remove_unused_columns=False,
        disable_tqdm=True, save_strategy="no", logging_steps=1,
        optim="sgd",  # Adam would blow the rounding of vanishing gradients up to whole steps
    )  # fmt: skip
    return factory(TRAINER).CustomDPOTrainer(
        model=model, ref_model=ref, finetuning_args=arguments, processor=None, args=settings,
        train_dataset=data, data_collator=lambda rows: rows[0], tokenizer=None,
    )  # fmt: skip


def step(trainer, data):
    trainer.model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, dict(data))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), metrics, grads


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


# DPO; averages; a softcapped head with NLL on chosen; LD-DPO's lengths
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama-untied", {}),
        ("llama-tied", {"pref_loss": "ipo"}),
        ("gemma2-softcap", {"pref_ftx": 0.3}),
        ("cohere-scale", {"ld_alpha": 0.4}),
    ],
)
def test_same_loss_metrics_and_gradients(factory, generator, tmp_path, family, options):
    """Its own trainer, before and after patch(): loss, every metric it logs, every gradient."""
    model, ref = build(family), build(family)
    data = batch(generator)
    own = factory(TRAINER).CustomDPOTrainer
    loss, metrics, grads = step(trainer_of(factory, tmp_path, model, ref, **options), data)
    with adapter.patched():
        trainer = trainer_of(factory, tmp_path, model, ref, **options)
        assert isinstance(trainer, own) and type(trainer) is not own
        found, ours, mine = step(trainer, data)
    torch.testing.assert_close(found, loss, rtol=2e-5, atol=1e-5)
    assert ours.keys() == metrics.keys()
    for name, value in metrics.items():
        assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert relative_error(flat(mine), flat(grads)) < 1e-4


@pytest.mark.parametrize("win_rates", ["hard", "columns"])
def test_sppo_loss(factory, generator, tmp_path, win_rates):
    """Soft and hard win rates against the formula in float64, from the model's own logits."""
    model, ref = build("llama-untied"), build("llama-untied")
    data = batch(generator)
    rates = torch.tensor([1.0, 1.0, 0.0, 0.0])
    if win_rates == "columns":
        data["win_rates"] = rates = torch.rand(4, generator=generator)
    with adapter.patched(loss="sppo", eta=50.0, win_rates=win_rates):
        loss, metrics, grads = step(trainer_of(factory, tmp_path, model, ref), data)
    exact = copy.deepcopy(model).double()
    exact.zero_grad()

    def sums(m):
        logits = m(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
        labels = data["labels"][:, 1:]
        logp = torch.log_softmax(logits.double()[:, :-1], -1)
        return (logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)).sum(1)

    ratio = sums(exact) - sums(ref).detach()
    truth = ((ratio - 50.0 * (rates.double() - 0.5)) ** 2).view(2, -1).sum(0).mean()
    if win_rates == "columns":
        truth = truth / 2  # a mean over responses; the hard loss is TRL's sum over the pair
    truth.backward()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(
        0.1 * float(ratio[:2].detach().mean()), rel=1e-4
    )
    truth = {n: p.grad for n, p in exact.named_parameters()}
    assert relative_error(flat(grads), flat(truth)) < 1e-4


def test_what_sppo_cannot_replace_is_refused(factory, tmp_path, generator):
    model, ref = build("llama-untied"), build("llama-untied")
    with adapter.patched(loss="sppo"), pytest.raises(IntegrationError, match=r"pref_loss.*'ipo'"):
        trainer_of(factory, tmp_path, model, ref, pref_loss="ipo")
    with adapter.patched(loss="sppo", win_rates="columns"):
        trainer = trainer_of(factory, tmp_path, model, ref)
        with pytest.raises(IntegrationError, match="chosen_probs_win"):
            step(trainer, batch(generator))
    with pytest.raises(ValueError, match="loss: expected one of"):
        adapter.patch(loss="kto")


def test_win_rates_travel_from_the_columns_to_the_batch(factory, monkeypatch):
    """Converter, processor (which drops a broken example) and collator."""
    converters = factory("llamafactory.data.converter")
    pairwise = factory("llamafactory.data.processor.pairwise")
    collators = factory("llamafactory.data.collator")
    cls = converters.AlpacaDatasetConverter
    attributes = dict.fromkeys(
        ("query", "response", "history", "system", "tools", "images", "videos", "audios", "kto_tag")
    )
    names = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "ranking": True}
    rows = [
        {"instruction": f"q{i}", "chosen": "a", "rejected": "b", "chosen_probs_win": w,
         "chosen_probs_lose": 0.9 - w}
        for i, w in enumerate((0.8, 0.6, 0.7))
    ]  # fmt: skip

    class Processor(pairwise.PairwiseDatasetProcessor):
        def __init__(self):
            pass

        def _encode_data_example(self, prompt, response, *rest, **more):
            sides = [([5, 6 + k], [-100, 6 + k]) for k in range(2)]
            return sides if not more else [x for side in sides for x in side]

    def pad(self, features):
        return {"input_ids": torch.tensor([f["input_ids"] for f in features])}

    monkeypatch.setattr(collators.MultiModalDataCollatorForSeq2Seq, "__call__", pad)
    with adapter.patched(loss="sppo", win_rates="columns"):
        convert = cls(SimpleNamespace(**attributes, **names), SimpleNamespace(media_dir=""))
        aligned = [convert(row) for row in rows]
        aligned[1]["_prompt"] = []
        columns = {k: [row[k] for row in aligned] for k in aligned[0]}
        columns = {k: columns.get(k, [None] * 3) for k in (*columns, "_system", "_tools",
                   "_images", "_videos", "_audios")}  # fmt: skip
        if aligned[1].get("_response"):
            columns["_response"][1] = list(columns["_response"][1])
        encoded = Processor().preprocess_dataset(columns)
        assert encoded["win_rates"] == [pytest.approx([0.8, 0.1]), pytest.approx([0.7, 0.2])]
        features = [{k: v[i] for k, v in encoded.items()} for i in range(2)]
        collator = object.__new__(collators.PairwiseDataCollatorWithPadding)
        made = collator(features)
        assert made["input_ids"].tolist() == [[5, 6], [5, 6], [5, 7], [5, 7]]
        torch.testing.assert_close(made["win_rates"], torch.tensor([0.8, 0.7, 0.1, 0.2]))
        with pytest.raises(IntegrationError, match="chosen_probs_win and chosen_probs_lose"):
            convert({k: v for k, v in rows[0].items() if "probs" not in k})
        with pytest.raises(IntegrationError, match="overwrite_cache"):
            Processor().preprocess_dataset({k: v for k, v in columns.items() if k != "_win_rates"})


@pytest.mark.parametrize("factory", ["real"], indirect=True)  # a stand-in does not train
def test_real_training_steps(factory, generator, tmp_path):
    """Three optimizer steps of LLaMA-Factory's own trainer, patched and not: the same weights."""
    data = [batch(generator) for _ in range(3)]
    model, ref = build("llama-untied"), build("llama-untied")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_of(factory, tmp_path, theirs, copy.deepcopy(ref), data)
    own = trainer.train()
    with adapter.patched():
        mine = trainer_of(factory, tmp_path, ours, copy.deepcopy(ref), data).train()
    assert mine.training_loss == pytest.approx(own.training_loss, rel=1e-4)
    start = flat(dict(model.named_parameters()))
    moved = [flat(dict(m.named_parameters())) - start for m in (ours, theirs)]
    assert relative_error(*moved) < 1e-3 and float(moved[1].abs().max()) > 1e-3


@pytest.mark.parametrize("factory", ["real"], indirect=True)
def test_the_command_trains_on_the_win_rates_of_the_columns(factory, tmp_path):
    """Its own data loading, template, collator and trainer; the loss of an equal reference."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "Human:", "Assistant:", *"abcdefgh"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **marks).save_pretrained(tmp_path / "model")
    build("llama-untied").save_pretrained(tmp_path / "model")
    row = {"instruction": "a b c", "chosen": "d e f", "rejected": "g h"}
    rows = [row | {"chosen_probs_win": 0.8, "chosen_probs_lose": 0.3} for _ in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "rows.json", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    settings = {
        "model_name_or_path": "model", "stage": "dpo", "do_train": True, "dataset": "rows",
        "finetuning_type": "full", "dataset_dir": ".", "template": "default", "output_dir": "out",
        "overwrite_cache": True, "per_device_train_batch_size": 2, "max_steps": 1,
        "logging_steps": 1, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "sppo_kernels.integrations.llamafactory", "--sppo-eta", "10"]
    done = subprocess.run(
        [*command, "--sppo-win-rates", "columns", "train.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *sys.path]), "HF_HOME": "hf",
                          "DISABLE_VERSION_CHECK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    # (0 - 10 (0.8 - 0.5))^2 and (0 - 10 (0.3 - 0.5))^2, averaged
    assert state["log_history"][0]["loss"] == pytest.approx((9 + 4) / 2, rel=1e-4)
