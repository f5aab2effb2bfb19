"""SPPO under Accelerate: DDP, mixed precision and gradient accumulation around the same line.

    torchrun --nproc_per_node 2 examples/accelerate_loop.py

The model is called through its wrapper, so DDP and FSDP see one forward that ends in the loss.
"""

import argparse
import os

import torch
from accelerate import Accelerator
from plain_pytorch import build, play
from transformers import default_data_collator
from transformers_trainer import rows

from sppo_kernels.integrations.transformers import model_sppo_loss


def main() -> Accelerator:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="responses a process")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--save", default=None, help="file for the trained weights")
    args = parser.parse_args()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
    )
    torch.manual_seed(0)  # every process makes the same data, and gets its share of it
    model = build().eval()
    data = rows(play(model, 8))
    loader = torch.utils.data.DataLoader(data, args.batch, collate_fn=default_data_collator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(args.epochs):
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss, _ = model_sppo_loss(model, **batch, eta=20.0, units="win_rate")
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
        accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
    if args.save and accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), args.save)
    accelerator.wait_for_everyone()
    return accelerator


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main().end_training()  # once DDP is freed: gloo may hang in the other order
