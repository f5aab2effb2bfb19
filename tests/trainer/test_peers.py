"""Against TRL: SPPO at K = 2 with hard labels is its `sppo_hard`, twice as large."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from sppo_kernels.trainer import SPPOTrainer  # noqa: E402
from tests.trainer.test_step import config  # noqa: E402
from tests.trainer_models import build, rows  # noqa: E402

STEPS, BATCH, BETA = 6, 3, 0.2


def trl_trainer(model, data, folder, **settings):
    """TRL's trainer on the ids of `data`; it takes text, so its own ids are replaced."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "a": 3}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    args = trl.DPOConfig(
        output_dir=str(folder),
        loss_type="sppo_hard",
        beta=BETA,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
        max_length=None,
        bf16=False,
        train_sampling_strategy="sequential",
        **settings,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a"}] * 2)
    trainer = trl.DPOTrainer(
        model, copy.deepcopy(model), args=args, train_dataset=text, processing_class=tokenizer
    )
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": row["response_ids"][0],
                "rejected_ids": row["response_ids"][1],
            }
            for row in data
        ]
    )
    return trainer


def test_training_curve_is_that_of_sppo_hard(generator, tmp_path):
    data = rows(generator, STEPS * BATCH, 2, hard=True)
    model = build("llama-untied").eval()
    other = copy.deepcopy(model)
    common = {
        "optim": "sgd",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    # Their loss, and so its gradient, is twice ours: half the learning rate makes the same steps.
    settings = config(tmp_path / "ours", eta=1 / BETA, learning_rate=2e-3, **common)
    ours = SPPOTrainer(model, settings, data)
    ours.train()
    theirs = trl_trainer(other, data, tmp_path / "trl", learning_rate=1e-3, **common)
    theirs.train()
    a, b = (
        torch.tensor([entry["loss"] for entry in t.state.log_history if "loss" in entry])
        for t in (ours, theirs)
    )
    assert len(a) == len(b) == STEPS
    assert (a[1:] - a[0]).abs().max() > 0.01 * a[0]  # there is a curve to compare
    torch.testing.assert_close(2 * a, b, rtol=2e-4, atol=1e-3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=1e-4)
