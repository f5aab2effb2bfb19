"""The proof that a model's head, and its attention over packed rows, are what we compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.logps.linear import linear_token_logps
from sppo_kernels.models import attention
from sppo_kernels.models.forward import Tap, replaced
from sppo_kernels.models.head import Head, beside, causal_lm, find_head
from sppo_kernels.models.refusals import refused
from sppo_kernels.models.weight import gathered

__all__ = ["checked_head", "compare", "forget_heads", "probe_head", "probe_packing", "some_ids"]

LOUD = 64.0  # largest logit of the second comparison: twice the softcaps in use
PROBED = (2, 64)  # rows and tokens of the batch that are looked at

# model -> the states of its head that were compared; nothing is kept alive by it.
_proved: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


def checked_head(
    model: nn.Module, inputs: dict | None = None, impl: str = "auto", check: bool = True
) -> Head:
    """The head of a model inside its wrappers, compared with the model's own logits.

    The comparison is made once, and anew when the head is another module, has other hooks,
    another forward or other adapters, or the config another scale or cap.

    Args:
        inputs: of the model, of which a slice is looked at; None for a few made-up tokens.
        check: False trusts the config, except for models with further layers beside the head.

    Raises:
        HeadProbeError: the head is not one that the fused operators compute; says which and why.
    """
    lm = causal_lm(model)
    head = find_head(lm)
    others = [] if check else beside(lm, head)
    if others:
        raise refused("beside", name=head.name, kind=type(lm).__name__, beside=", ".join(others))
    key = (weakref.ref(head.layer), head.state(), impl)
    if check and key not in _proved.setdefault(lm, set()):
        probe_head(model, head, {"input_ids": some_ids(lm)} if inputs is None else inputs, impl)
        _proved[lm].add(key)
    return head


def forget_heads() -> None:
    """Compare every model again at its next call."""
    _proved.clear()


def probe_head(model: nn.Module, head: Head, inputs: dict, impl: str = "auto") -> float:
    """Compare fused log-probs with log_softmax of the model's own logits, on a slice of a batch.

    In the same call of the model, so both start from the same hidden states; then once more with
    hidden states so large that the largest logit is 64, which shows softcaps at any initialisation.

    Args:
        model: inside its wrappers. inputs: input_ids [B, T] and, optionally, attention_mask [B, T]
            and other inputs.

    Returns:
        The largest difference of a token's log-probability, in nats.

    Raises:
        HeadProbeError: it is larger than rounding explains; the message says where and by how much.
    """
    inputs = _slice(inputs)
    mask = inputs.get("attention_mask")
    labels = inputs["input_ids"][:, 1:]
    if mask is not None and mask.shape == inputs["input_ids"].shape:
        labels = labels.masked_fill(mask[:, 1:] == 0, -100)
    with undisturbed(model):
        worst, loudest = _observe(model, head, inputs, labels, impl, 1.0)
        if 0 < loudest < LOUD:
            _observe(model, head, inputs, labels, impl, min(LOUD / loudest, 1e4))
    return worst


def _observe(
    model: nn.Module, head: Head, inputs: dict, labels: Tensor, impl: str, factor: float
) -> tuple[float, float]:
    """Largest difference and largest output of the layer, with `factor` on the hidden states."""
    seen: list[tuple[Tensor, Tensor]] = []  # what the layer was given, and gave
    shapes: list[tuple[int, ...]] = []

    def fused(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        known = labels.masked_fill(labels >= weight.shape[0], -100).to(hidden.device)
        return linear_token_logps(hidden[:, :-1], weight, known, impl=impl, **options)

    def both(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = hidden * factor if factor != 1 else hidden
        out = own(hidden, *args, **kwargs)
        seen.append((gathered(hidden), gathered(out)))
        tap.forward(hidden)
        return out

    ids = inputs["input_ids"]
    tap = Tap(head, fused, ids.shape[1])
    with replaced(head.layer, both) as own:
        logits = model(**inputs, use_cache=False).logits
    tap.check()
    (hidden, out), features = seen[0], seen[0][0].shape[-1]
    if shapes[0] != (logits.shape[-1], features) or logits.shape[:2] != hidden.shape[:2]:
        sizes = {"weight": shapes[0], "hidden": tuple(hidden.shape), "logits": tuple(logits.shape)}
        raise refused("shape", name=head.name, **sizes)
    loudest = float(out.abs().max())

    def reason() -> str:
        assumed = f"assumed logit_scale={head.logit_scale:g}, softcap={head.softcap}; "
        if out.shape == logits.shape and torch.equal(out.float(), logits.float()):
            return f"{assumed}{head.name} is {type(head.layer).__name__} with a forward of its own"
        return f"{assumed}the model changes the logits after {head.name}"

    worst = compare(
        type(causal_lm(model)).__name__,
        tap.result,
        logits[:, -ids.shape[1] : -1],
        labels,
        reason,
        dtypes=(hidden.dtype, out.dtype),
        largest=head.logit_scale * loudest,
    )
    return worst, loudest


def compare(
    name: str,
    fused: Tensor,
    logits: Tensor,
    labels: Tensor,
    reason: Callable[[], str],
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    largest: float = 1.0,
) -> float:
    """Compare log-probs [B, T] with those of logits [B, T, V] at labels [B, T].

    Args:
        reason: what the message says of a difference.
        dtypes: of the way, beside the logits'. largest: size of a logit on the way.

    Returns:
        The largest difference, in nats.

    Raises:
        HeadProbeError: it is larger than rounding explains.
    """
    dtypes, logits = (*dtypes, logits.dtype), logits.float()
    labels, fused = labels.to(logits.device), fused.to(logits.device).float()
    own = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    gap = (fused - own).abs().masked_fill(labels == -100, 0)
    worst = float(gap.max())
    # Two roundings of the largest logit, on each side, and of the softmax.
    size = max(1.0, float(logits.abs().max()), largest)
    allowed = 8 * max(torch.finfo(t).eps for t in dtypes) * size + 1e-5
    if worst <= allowed:
        return worst
    where = tuple(int(x) for x in torch.unravel_index(gap.argmax(), gap.shape))
    found = {"where": where, "fused": float(fused[where]), "own": float(own[where]), "gap": worst}
    raise refused("differs", name=name, **found, allowed=allowed, reason=reason())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, eager and without gradients; modes and random numbers are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # graphs know nothing of us
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def some_ids(lm: nn.Module) -> Tensor:
    """[2, 8] token ids, the same for every model of a vocabulary."""
    vocab = lm.config.get_text_config().vocab_size
    ids = torch.arange(1, 17).view(2, 8) * 7919 % vocab
    return ids.to(lm.get_input_embeddings().weight.device)


def _slice(inputs: dict) -> dict:
    """The first rows, at the end where the text is; whole when some input has another layout."""
    shape = inputs["input_ids"].shape
    given = [v for v in inputs.values() if isinstance(v, Tensor)]
    if any(v.shape not in (shape, (1, shape[1])) for v in given):
        return inputs
    rows, tokens = PROBED
    mask = inputs.get("attention_mask")
    left = mask is not None and not bool(mask[:rows, 0].all())
    columns = slice(-tokens, None) if left else slice(0, tokens)
    return {k: v[:rows, columns] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def probe_packing(
    model: nn.Module, padded: tuple[dict, Tensor], packed: tuple[dict, Tensor]
) -> float:
    """Switch the model to packed attention, if its hidden states are then those of padded rows.

    Args:
        padded, packed: inputs of the model and the rows [L] of its flattened hidden states to
            compare, of the same tokens.

    Returns:
        The largest relative difference of a row.

    Raises:
        HeadProbeError: they differ, or the model fails; its attention is as before.
    """
    lm = causal_lm(model)
    before = lm.config._attn_implementation
    attention.register()
    try:
        if before not in ("sdpa", "eager", "flash_attention_2", attention.NAME):
            raise ValueError(f"the attention implementation is {before!r}")
        with undisturbed(model):
            expected = _head_input(model, lm, *padded)
            lm.set_attn_implementation(attention.NAME)
            got = _head_input(model, lm, *packed)
        gap = (got - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-12)
        worst, allowed = float(gap.max()), 64 * torch.finfo(got.dtype).eps
        if not worst <= min(max(allowed, 1e-3), 0.1):
            raise ValueError(f"packed hidden states differ by {worst:.2g} from padded ones")
        return worst
    except Exception as error:  # any failure of the model's own code means the same
        lm.set_attn_implementation(before)
        what = f"{type(error).__name__}: {error}"
        raise refused("packing", name=type(lm).__name__, error=what) from error


def _head_input(model: nn.Module, lm: nn.Module, inputs: dict, rows: Tensor) -> Tensor:
    """Rows of the flattened hidden states that the model gives to its head."""
    seen: list[Tensor] = []

    def catch(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(gathered(hidden))
        return hidden[..., :1]

    with replaced(lm.get_output_embeddings(), catch):
        model(**inputs, use_cache=False)
    return seen[0].flatten(0, 1).index_select(0, rows.to(seen[0].device))
