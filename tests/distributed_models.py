"""Two processes: DDP, FSDP2 and tensor-parallel heads against one process with both batches.

torchrun --nproc_per_node 2 tests/distributed_models.py
"""

import copy

import torch
import torch.distributed as dist
from head_cases import batch, llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sppo_kernels.integrations.transformers import model_sppo_loss, model_token_logps


def loss_of(model, rank: int, check: bool = True):
    generator = torch.Generator().manual_seed(7 + rank)
    ids, labels, mask = batch(generator)
    ref, win = torch.full((3,), -40.0), torch.rand(3, generator=generator)
    return model_sppo_loss(model, ids, labels, ref, win, mask, eta=9.0, check=check).loss


def sharded(model, mesh, own_unit: bool = False):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:  # both ends of a tie in one, or torch refuses it
        tied = model.config.tie_word_embeddings
        fully_shard([model.model.embed_tokens, model.lm_head] if tied else model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_gradients(name: str, model, wanted: dict) -> None:
    for key, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(
            grad, wanted[key.removeprefix("module.")], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}"
        )


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for tied in (False, True):
        torch.manual_seed(0)
        start = llama(tied)
        alone = copy.deepcopy(start)
        sum(loss_of(alone, r) / world for r in range(world)).backward()
        wanted = {n: p.grad for n, p in alone.named_parameters()}
        ways = {
            "ddp": nn.parallel.DistributedDataParallel,
            "fsdp2": lambda m: sharded(m, mesh),
            "fsdp2, the head its own unit": lambda m: sharded(m, mesh, own_unit=True),
        }
        for name, wrap in ways.items():
            model = wrap(copy.deepcopy(start))
            for _ in range(2):  # a second step finds nothing that the first left behind
                model.zero_grad()
                loss_of(model, rank).backward()
            assert_gradients(name, model, wanted)

    # Tensor parallelism: the same batch on both ranks, the vocabulary shared out.
    torch.manual_seed(1)
    alone = llama()
    ids, labels, mask = batch(torch.Generator().manual_seed(3))
    expected = model_token_logps(alone, ids, labels, mask)
    expected.sum().backward()
    wanted = {n: p.grad for n, p in alone.named_parameters()}
    for name in ("bare weight", "gathered logits"):
        model = copy.deepcopy(alone)
        model.zero_grad()
        if name == "bare weight":
            weight = distribute_tensor(alone.lm_head.weight, mesh, [Shard(0)])
            model.lm_head.weight = nn.Parameter(weight)
        else:  # its hooks give the head a DTensor and expect one back
            plan = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(model, mesh, {"lm_head": plan})
        check = name != "bare weight"  # in the model's own forward it meets plain hidden states
        got = model_token_logps(model, ids, labels, mask, check=check)
        torch.testing.assert_close(got, expected, msg=name)
        got.sum().backward()
        assert_gradients(name, model, wanted)
    dist.barrier()
    print(f"rank {rank}: ok")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # once DDP is freed: gloo may hang in the other order
