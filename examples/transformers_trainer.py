"""SPPO in transformers' Trainer: an override of compute_loss, and nothing else.

The data are prompts of random ids with responses and win rates; see plain_pytorch.py for how
responses are sampled and judged.
"""

import argparse
import tempfile

import torch
from plain_pytorch import build, play
from transformers import Trainer, TrainingArguments, default_data_collator

from sppo_kernels.integrations.transformers import model_sppo_loss


class SPPO(Trainer):
    """Batches: input_ids, labels, attention_mask, ref_logps, win_rate; a row is a response."""

    def __init__(self, *args, eta: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eta = eta
        # The loss is a mean over responses, so the Trainer divides it by the accumulated batches;
        # otherwise it would count on compute_loss to weigh by tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, logps = model_sppo_loss(model, **inputs, eta=self.eta, units="win_rate")
        return (loss, {"logps": logps}) if return_outputs else loss


def rows(data: list[dict]) -> list[dict]:
    """One dict a response, of a batch a prompt."""
    return [{name: value[i] for name, value in b.items()} for b in data for i in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_dir", default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build().eval()
    data = rows(play(model, 8))
    settings = TrainingArguments(
        output_dir=args.output_dir or tempfile.mkdtemp(),
        max_steps=args.steps,
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=5,
        remove_unused_columns=False,  # ref_logps and win_rate are no arguments of the model
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = SPPO(
        model,
        settings,
        train_dataset=data[:24],
        eval_dataset=data[24:],
        data_collator=default_data_collator,
        eta=20.0,
    )
    trainer.train()
    print(f"held out: {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
