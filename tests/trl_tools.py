"""A local tokenizer, random preference texts, and trainers of TRL and ours on them."""

from __future__ import annotations

import copy

import torch

from tests.trainer_models import VOCAB

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4}
    words |= {f"w{i}": i for i in range(5, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    result.chat_template = TEMPLATE
    return result


def words(generator, low: int = 1, high: int = 9) -> str:
    n = int(torch.randint(low, high, (), generator=generator))
    return " ".join(f"w{i}" for i in torch.randint(5, VOCAB, (n,), generator=generator).tolist())


def pairs(generator, count: int) -> list[dict]:
    """Rows of the released SPPO columns; the rejected response may win more often."""
    draws = torch.rand(count, 3, generator=generator).tolist()
    return [
        {
            "prompt": words(generator),
            "chosen": " " + words(generator, 1, 12),
            "rejected": " " + words(generator, 1, 12),
            "chosen_probs": p,
            "chosen_probs_win": win,
            "chosen_probs_lose": lose,
        }
        for p, win, lose in draws
    ]


def groups(generator, count: int) -> list[dict]:
    """Rows of 2 to 5 responses with win rates."""
    sizes = [2 + i % 4 for i in range(count)]
    return [
        {
            "prompt": words(generator),
            "responses": [" " + words(generator, 1, 12) for _ in range(k)],
            "win_rate": torch.rand(k, generator=generator).tolist(),
        }
        for k in sizes
    ]


def settings(folder, **changes) -> dict:
    """Plain gradient descent in the order of the data, so that a step can be redone by hand."""
    common = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "beta": 0.2,
    }
    return common | changes


def trainer(model, data, folder, *, kind=None, ref=True, evaluation=None, peft=None, **changes):
    """SoftSPPOTrainer, or `kind`; with `ref` a copy of the model is the reference."""
    from datasets import Dataset
    from trl import DPOConfig

    from sppo_kernels.integrations.trl import SoftSPPOConfig, SoftSPPOTrainer

    config = DPOConfig if kind is not None else SoftSPPOConfig
    return (kind or SoftSPPOTrainer)(
        model,
        copy.deepcopy(model) if ref else None,
        args=config(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(data),
        eval_dataset=None if evaluation is None else Dataset.from_list(evaluation),
        processing_class=tokenizer(),
        peft_config=peft,
    )


def losses(trainer, key: str = "loss") -> torch.Tensor:
    return torch.tensor([e[key] for e in trainer.state.log_history if key in e])


def sequences(row: dict) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of a row that TRL or we prepared."""
    responses = row.get("response_ids") or [row["chosen_ids"], row["rejected_ids"]]
    return [(row["prompt_ids"], ids) for ids in responses]


def eager_logps(model, row: dict) -> torch.Tensor:
    """log π(y|x) [K], one unpadded forward at a time, from the model's own logits in fp32."""
    found = []
    for prompt, response in sequences(row):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
        logp = logits[:, -len(response) - 1 : -1].float().log_softmax(-1)[0]
        found.append(logp.gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found)
