"""A model's own forward with what is wanted of the logits computed inside its head.

While a call lasts, the head's layer has another forward. The model is called through all that wraps
it (PEFT, DDP, FSDP2, accelerate, torch.compile), so engines make the head's weight whole and free
it again as for any layer, autocast is the model's, and auxiliary losses are its own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sppo_kernels.models.head import Head
from sppo_kernels.models.refusals import refused

__all__ = ["Tap", "in_head", "replaced", "run_head", "tied"]

# compute(hidden [..., D], weight [V, D], *, bias, logit_scale, softcap) -> tensors, nested or not
Compute = Callable[..., Any]


@contextmanager
def replaced(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """While it holds, `layer` runs `forward`, inside its hooks; yields the layer's own forward."""
    # what accelerate's hooks call, so that they go on moving inputs and loading weights
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    own, before = getattr(layer, name), vars(layer).get(name)
    setattr(layer, name, forward)
    try:
        yield own
    finally:
        if before is None:
            delattr(layer, name)
        else:
            setattr(layer, name, before)


class Tap:
    """The forward of a head's layer for one call; `result` is what it computed.

    The layer's output is a placeholder [..., 1] of zeros that depends on the result: whoever looks
    for parameters from the model's outputs (DDP) finds them all.
    """

    def __init__(self, head: Head, compute: Compute, width: int | None = None) -> None:
        """`width`: of the hidden states, only the last so many; before are virtual tokens."""
        self.head, self.compute, self.width = head, compute, width
        self.calls = 0
        self.result: Any = None

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        hidden, weight, options = self.head.operands(given)
        if self.width is not None and hidden.shape[-2] > self.width:
            hidden = hidden[..., -self.width :, :]
        self.result = self.compute(hidden, weight, **options)
        placeholder = hidden.new_zeros(*given.shape[:-1], 1, device=given.device)
        placeholder = placeholder + _zero(self.result, placeholder)
        # hooks of tensor parallelism expect a DTensor where they gave one
        return _replicated(placeholder, given) if hasattr(given, "full_tensor") else placeholder

    def check(self) -> None:
        if self.calls != 1:
            raise refused("calls", name=self.head.name, calls=self.calls)


def _replicated(tensor: Tensor, like: Any) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor on the mesh of `like`."""
    from torch.distributed.tensor import DTensor, Replicate  # not in every build of torch

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _zero(values: Any, like: Tensor) -> Tensor | float:
    """0 that depends on every differentiable tensor of `values`, whatever they hold."""
    found = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]
    return sum(((t.sum() * 0).nan_to_num().to(like.device, like.dtype) for t in found), 0.0)


def tied(result: Any, output: Any) -> Any:
    """`result`, whose backward goes through the model's output first, where engines wait for it."""
    logits = output.logits if hasattr(output, "logits") else output[0]

    def tie(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return value + _zero(logits, value)
        return value

    return tree_map(tie, result)


@contextmanager
def in_head(model: nn.Module, compute: Compute, head: Head) -> Iterator[Tap]:
    """For code that calls `model` itself, once: afterwards the tap's `result` is there.

    Raises:
        HeadProbeError: the model's forward did not call its head, or more than once.
    """
    tap = Tap(head, compute)

    def tie(_module: nn.Module, _args: Any, output: Any) -> None:
        tap.result = tied(tap.result, output)

    with replaced(head.layer, tap.forward), model.register_forward_hook(tie):
        yield tap
    tap.check()


def run_head(model: nn.Module, inputs: dict, compute: Compute, head: Head) -> tuple[Any, Any]:
    """Call `model` with `compute` inside its head.

    Args:
        model: inside its wrappers.
        inputs: of the model; input_ids [B, T] among them.
        compute: called as compute(hidden [B, T, D], weight [V, D], bias=[V] or None, logit_scale=,
            softcap=) where the model would compute logits, under its autocast; returns tensors.
        head: of `checked_head`.

    Returns:
        What `compute` returned, and the model's output, whose `logits` are zeros [B, T, 1].

    Raises:
        HeadProbeError: the model's forward did not call its head, or more than once; or the head's
            weight is not here.
    """
    tap = Tap(head, compute, inputs["input_ids"].shape[1])
    with replaced(head.layer, tap.forward):
        output = model(**inputs, use_cache=False)
    tap.check()
    return tied(tap.result, output), output
