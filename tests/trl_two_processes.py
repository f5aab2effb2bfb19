"""Run by torchrun in two processes: `python -m tests.trl_two_processes FOLDER` prints a JSON line.

DDP: losses of three steps. FSDP: largest difference of a sharded model's gradients from the mean of
both processes' gradients of the whole model, over the largest gradient.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from tests import trl_tools as tools
from tests.trainer_models import build


def start(cached: bool, folder: str, size: int, **changes):
    """A trainer on the same model and data wherever it is called."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = tools.pairs(generator, 12)
    model = build("llama-untied")
    return tools.trainer(
        model,
        data,
        folder,
        evaluation=data[:8],
        max_steps=3,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        precompute_ref_log_probs=cached,
        **changes,
    )


def summary(trainer) -> dict:
    trainer.train()
    found = {
        name: tools.losses(trainer, name).tolist()
        for name in ("loss", "rewards/margins", "sppo/residual_rms", "num_tokens")
    }
    found["eval"] = trainer.evaluate()["eval_loss"]
    return found


def fsdp_gap(folder: str) -> float:
    from torch.distributed.fsdp import fully_shard

    trainer = start(False, folder, 2, ddp_backend="gloo")
    for parameter in trainer.ref_model.parameters():
        parameter.data.mul_(1.01)  # or every log-ratio would be 0
    rank = trainer.args.process_index
    batch = trainer.data_collator([trainer.train_dataset[2 * rank + i] for i in range(2)])
    trainer._compute_loss(trainer.model, batch, False).backward()
    whole = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    for grad in whole.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    trainer.model.zero_grad()
    for model in (trainer.model, trainer.ref_model):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    trainer._compute_loss(trainer.model, batch, False).backward()
    worst = 0.0
    for name, parameter in trainer.model.named_parameters():
        gap = (parameter.grad.full_tensor() - whole[name]).abs().max() / whole[name].abs().max()
        worst = max(worst, float(gap))
    return worst


if __name__ == "__main__":
    folder = sys.argv[1]
    result = {
        "ddp": summary(start(False, folder, 2, ddp_backend="gloo")),
        "ddp cached": summary(start(True, folder, 2, ddp_backend="gloo")),
        "fsdp": fsdp_gap(folder),
    }
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
