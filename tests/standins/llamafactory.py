"""The shape of LLaMA-Factory 0.9.5: llamafactory/train/dpo/trainer.py, data/converter.py,
data/collator.py, data/processor/pairwise.py and the preference part of hparams/finetuning_args.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.nn import functional

from tests.standins import module


@dataclass
class FinetuningArguments:
    stage: str = "dpo"
    pref_beta: float = 0.1
    pref_loss: str = "sigmoid"
    pref_ftx: float = 0.0
    pref_bco_weight: float = 0.0
    dpo_label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    ld_alpha: float | None = None

    def __post_init__(self):
        self.use_ref_model = self.stage == "dpo" and self.pref_loss not in ("orpo", "simpo")


class CustomDPOTrainer:
    def __init__(
        self, model, ref_model, finetuning_args, processor=None, disable_dropout=True, **kwargs
    ):
        self.model, self.ref_model, self.finetuning_args = model, ref_model, finetuning_args
        self.beta, self.loss_type = finetuning_args.pref_beta, finetuning_args.pref_loss
        self.ftx_gamma, self.bco_gemma = finetuning_args.pref_ftx, finetuning_args.pref_bco_weight
        self.ld_alpha = finetuning_args.ld_alpha

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected):
        ratio = chosen - rejected - (ref_chosen - ref_rejected)
        rewards = [
            self.beta * (a - b).detach()
            for a, b in ((chosen, ref_chosen), (rejected, ref_rejected))
        ]
        if self.loss_type == "ipo":
            return (ratio - 1 / (2 * self.beta)) ** 2, *rewards
        return -functional.logsigmoid(self.beta * ratio), *rewards

    def compute_preference_loss(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    ):
        return self.dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )

    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = dict(batch)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, return_dict=True, use_cache=False).logits.float()
        mask = labels != -100
        logp = torch.log_softmax(logits[:, :-1], -1)
        logp = logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * mask
        length = mask.sum(-1)
        if self.ld_alpha is not None and not is_ref_model:
            end = mask.int().argmax(1) + length.view(2, -1).min(0)[0].repeat(2)
            beyond = torch.arange(logp.shape[1]) >= end[:, None]
            logp = torch.where(beyond, self.ld_alpha * logp, logp)
        logps = logp.sum(-1)
        if self.loss_type == "ipo":
            logps = logps / length
        average = logps if self.loss_type == "ipo" else logps / length
        half = len(logps) // 2
        return {
            "chosen_logps": logps[:half],
            "rejected_logps": logps[half:],
            "chosen_logits": logits[:half],
            "rejected_logits": logits[half:],
            "chosen_logps_avg": average[:half],
        }

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        out = self.concatenated_forward(model, batch)
        with torch.no_grad():
            ref = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        losses, chosen, rejected = self.compute_preference_loss(
            out["chosen_logps"], out["rejected_logps"], ref["chosen_logps"], ref["rejected_logps"]
        )
        losses = losses - self.ftx_gamma * out["chosen_logps_avg"]
        metrics = {
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "logps/chosen": out["chosen_logps"].mean().item(),
            "logits/chosen": out["chosen_logits"].mean().item(),
            "logits/rejected": out["rejected_logits"].mean().item(),
        }
        return losses.mean(), metrics


@dataclass
class AlpacaDatasetConverter:
    dataset_attr: object
    data_args: object

    def __call__(self, example):
        sides = [{"role": "assistant", "content": example[k]} for k in ("chosen", "rejected")]
        return {
            "_prompt": [{"role": "user", "content": example["instruction"]}],
            "_response": sides,
        }


class PairwiseDatasetProcessor:
    def preprocess_dataset(self, examples):
        inputs = defaultdict(list)
        for i, prompt in enumerate(examples["_prompt"]):
            if len(prompt) % 2 != 1:
                continue
            encoded = self._encode_data_example(prompt, examples["_response"][i])
            for side, (ids, labels) in zip(("chosen", "rejected"), encoded, strict=True):
                inputs[f"{side}_input_ids"].append(ids)
                inputs[f"{side}_attention_mask"].append([1] * len(ids))
                inputs[f"{side}_labels"].append(labels)
            for name in ("images", "videos", "audios"):
                inputs[name].append(None)
        return inputs


class MultiModalDataCollatorForSeq2Seq:
    def __call__(self, features):
        raise NotImplementedError


class PairwiseDataCollatorWithPadding(MultiModalDataCollatorForSeq2Seq):
    def __call__(self, features):
        names = ("input_ids", "attention_mask", "labels")
        sides = ("chosen", "rejected")
        return super().__call__(
            [{n: f[f"{s}_{n}"] for n in names} for s in sides for f in features]
        )


def modules():
    return {
        "llamafactory": module("llamafactory", __version__="0.9.5"),
        "llamafactory.hparams": module(
            "llamafactory.hparams", FinetuningArguments=FinetuningArguments
        ),
        "llamafactory.train.dpo.trainer": module(
            "llamafactory.train.dpo.trainer", CustomDPOTrainer=CustomDPOTrainer
        ),
        "llamafactory.data.converter": module(
            "llamafactory.data.converter",
            AlpacaDatasetConverter=AlpacaDatasetConverter,
            DATASET_CONVERTERS={"alpaca": AlpacaDatasetConverter},
        ),
        "llamafactory.data.processor.pairwise": module(
            "llamafactory.data.processor.pairwise",
            PairwiseDatasetProcessor=PairwiseDatasetProcessor,
        ),
        "llamafactory.data.collator": module(
            "llamafactory.data.collator",
            MultiModalDataCollatorForSeq2Seq=MultiModalDataCollatorForSeq2Seq,
            PairwiseDataCollatorWithPadding=PairwiseDataCollatorWithPadding,
        ),
    }
