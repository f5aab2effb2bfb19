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
from torch.distributed.tensor import Shard, distribute_tensor

from sppo_kernels.integrations.transformers import model_sppo_loss, model_token_logps
from sppo_kernels.models.head import HeadProbeError


def loss_of(model, rank: int, check: bool = True):
    generator = torch.Generator().manual_seed(7 + rank)
    ids, labels, mask = batch(generator)
    ref, win = torch.full((3,), -40.0), torch.rand(3, generator=generator)
    return model_sppo_loss(model, ids, labels, ref, win, mask, eta=9.0, check=check).loss


def sharded(model, mesh, own_unit: bool = False):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:
        fully_shard(model.lm_head, mesh=mesh)
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
        for name, wrap in (
            ("ddp", nn.parallel.DistributedDataParallel),
            ("fsdp2", lambda m: sharded(m, mesh)),
        ):
            model = wrap(copy.deepcopy(start))
            loss_of(model, rank).backward()
            assert_gradients(name, model, wanted)

    model = sharded(llama(), mesh, own_unit=True)
    try:
        loss_of(model, rank)
    except HeadProbeError as error:
        assert "FSDP unit of its own" in str(error)
    else:
        raise AssertionError("a head in a unit of its own was not refused")

    # Tensor parallelism: the same batch on both ranks, the vocabulary shared out.
    torch.manual_seed(1)
    alone = llama()
    model = copy.deepcopy(alone)
    model.lm_head.weight = nn.Parameter(distribute_tensor(alone.lm_head.weight, mesh, [Shard(0)]))
    ids, labels, mask = batch(torch.Generator().manual_seed(3))
    for m in (alone, model):
        model_token_logps(m, ids, labels, mask, check=False).sum().backward()
    wanted = {n: p.grad for n, p in alone.named_parameters()}
    assert_gradients("dtensor", model, wanted)
    dist.barrier()
    print(f"rank {rank}: ok")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # once DDP is freed: gloo may hang in the other order
