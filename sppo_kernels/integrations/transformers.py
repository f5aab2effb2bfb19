"""SPPO for any transformers causal language model: plain PyTorch, Trainer, Accelerate, PEFT, DDP.

    loss, logps = model_sppo_loss(model, input_ids, labels, ref_logps, win_rate, attention_mask)

The model is called, wrappers and all, with its own forward exchanged for one that ends in the fused
head, so DDP, FSDP, PEFT, autocast and torch.compile see one forward that returns the loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels import checks
from sppo_kernels.logps.linear import linear_sequence_logps, linear_token_logps
from sppo_kernels.loss.sppo import fused_linear_sppo_loss
from sppo_kernels.models.head import Head, HeadProbeError, backbone, causal_lm, find_head
from sppo_kernels.models.probe import probe_head
from sppo_kernels.models.weight import adapter_state
from sppo_kernels.results import SPPOOutput

__all__ = ["HeadProbeError", "model_sequence_logps", "model_sppo_loss", "model_token_logps"]

PROBED = (2, 64)  # rows and tokens of the batch that the probe looks at
REFUSED = ("adapter_names", "inputs_embeds", "logits_to_keep", "past_key_values", "return_dict")

# model -> what was probed; nothing is kept alive by it.
_probed: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def model_token_logps(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each label under a causal language model, never holding its logits.

    Equal to log_softmax of `model(...).logits` in float32 at the labels, with the model's softcap,
    scale and bias; the head's GEMMs run only on rows that predict a label.

    Args:
        model: a transformers causal LM, also inside PEFT, DDP, FSDP or torch.compile.
        input_ids: [B, T] int64.
        labels: [B, T], aligned with input_ids as transformers has it (label t is predicted by row
            t - 1; the first column counts for nothing), -100 where ignored. On a GPU they are
            copied to the host before the forward, a synchronisation that CPU labels spare.
        attention_mask: [B, T] or None.
        memory_budget, impl: as in `linear_token_logps`.
        check: compare with the model's own logits on a slice of the batch, once for a model and
            head; without it the config is trusted.
        model_kwargs: further inputs of the base model (position_ids, token_type_ids, ...).

    Returns:
        [B, T-1] float32 (float64 for a float64 model), in nats, 0 where labels are ignored. A
        router's auxiliary loss is not part of it.

    Raises:
        HeadProbeError: the model's head is not one this computes, by name and with what to do.
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    return _call("token", model, inputs, labels, check, memory_budget=memory_budget, impl=impl)


def model_sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each row's labels: sums of `model_token_logps`, same arguments.

    Returns:
        [B] float32 (float64 for a float64 model), in nats.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    return _call("sequence", model, inputs, labels, check, memory_budget=memory_budget, impl=impl)


def model_sppo_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    win_rate: Tensor,
    attention_mask: Tensor | None = None,
    *,
    eta: float = 1000.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    units: str = "log_ratio",
    memory_budget: int | None = None,
    impl: str = "auto",
    check: bool = True,
    **model_kwargs: Any,
) -> SPPOOutput:
    """SPPO's loss (arXiv 2405.00675, eq. 4.4) of a batch of responses, one a row.

    Args:
        ref_logps: [B], log-probability of each response under the reference (of
            `model_sequence_logps` without gradients), in nats.
        win_rate: [B], P(response beats the policy), in [0, 1].
        eta, weights, reduction, units: as in `sppo_loss`.

    Returns:
        SPPOOutput(loss, logps [B], detached).

    The other arguments and errors are those of `model_token_logps`.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    for name, value in (("ref_logps", ref_logps), ("win_rate", win_rate)):
        value = checks.floating(name, value, 1)
        checks.shape(name, value, labels.shape[:1], "one for each row")
    settings = {"eta": eta, "weights": weights, "reduction": reduction, "units": units}
    settings |= {"memory_budget": memory_budget, "impl": impl, "constants": (ref_logps, win_rate)}
    return SPPOOutput(*_call("sppo", model, inputs, labels, check, **settings))


class _Request:
    """What the exchanged forward computes; opaque, so that no wrapper casts or moves tensors."""

    def __init__(self, kind: str, head: Head, labels: Tensor, settings: dict[str, Any]) -> None:
        self.kind, self.head, self.settings = kind, head, settings
        batch, length = labels.shape
        # On the host, where the ignored ones are dropped without waiting for a device.
        self.labels = labels[:, 1:].cpu()
        self.rows = torch.arange(batch * length).view(batch, length)[:, :-1]


class _Forward:
    """Stands in for a model's forward during one call."""

    def __init__(self, lm: nn.Module) -> None:
        self.lm = lm
        self.original = lm.forward
        self.__wrapped__ = self.original  # peft and accelerate look at the signature

    def __call__(self, *args: Any, sppo_request: _Request | None = None, **kwargs: Any) -> Any:
        if sppo_request is None:
            return self.original(*args, **kwargs)
        # None is what wrappers fill in; the base model has the same defaults.
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        with _amp_of(self.lm):
            hidden = backbone(self.lm)(*args, **kwargs, use_cache=False)[0]
            return _fused(sppo_request, hidden)


def _fused(request: _Request, hidden: Tensor) -> Any:
    head = request.head
    weight, bias = head.parameters()
    hidden = hidden.to(weight.device)  # a device_map may put the head elsewhere
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    settings = request.settings | {
        "bias": bias,
        "rows": request.rows,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
    }
    if request.kind == "token":
        return linear_token_logps(hidden, weight, request.labels, **settings)
    if request.kind == "sequence":
        return linear_sequence_logps(hidden, weight, request.labels, **settings)
    ref, win = (c.to(hidden.device, non_blocking=True) for c in settings.pop("constants"))
    if settings["weights"] is not None:
        settings["weights"] = settings["weights"].to(hidden.device, non_blocking=True)
    return tuple(fused_linear_sppo_loss(hidden, weight, request.labels, ref, win, **settings))


def _amp_of(lm: nn.Module) -> Any:
    """The autocast that accelerate wrapped around the forward we exchange."""
    if "_original_forward" not in vars(lm):
        return nullcontext()
    from accelerate.utils import get_mixed_precision_context_manager

    return get_mixed_precision_context_manager(native_amp=True)


@contextmanager
def _exchanged(lm: nn.Module) -> Iterator[None]:
    before = vars(lm).get("forward")
    lm.forward = _Forward(lm)
    try:
        yield
    finally:
        if before is None:
            del lm.forward
        else:
            lm.forward = before


def _call(
    kind: str, model: nn.Module, inputs: dict, labels: Tensor, check: bool, **settings: Any
) -> Any:
    """Check, probe once, and call the model with its forward exchanged."""
    input_ids = checks.integers("input_ids", inputs["input_ids"])
    labels = checks.integers("labels", labels)
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [B, T] with T >= 2, got {tuple(input_ids.shape)}")
    checks.shape("labels", labels, input_ids.shape, "that of input_ids (shifted inside)")
    inputs = {k: v for k, v in inputs.items() if v is not None}
    for name in REFUSED:
        if name in inputs:
            raise ValueError(f"{name}: not understood here; the call computes log-probs of labels")
    lm = causal_lm(model)
    head = find_head(lm)
    if check:
        _probe_once(model, lm, head, inputs, settings["impl"])
    elif head.beside:
        raise HeadProbeError(
            f"{head.name}: {type(lm).__name__} has {', '.join(head.beside)} beside it, so only a "
            "probe can tell whether the head is linear; leave check=True"
        )
    request = _Request(kind, head, labels, settings)
    with _exchanged(lm):
        return model(**inputs, sppo_request=request)


def _probe_once(model: nn.Module, lm: nn.Module, head: Head, inputs: dict, impl: str) -> None:
    state = (head.logit_scale, head.softcap, head.vocab, impl, adapter_state(head.layer))
    before = _probed.get(lm)
    if before is not None and before[0]() is head.layer and before[1] == state:
        return
    inputs = _slice(inputs)

    def through(labels: Tensor) -> Tensor:
        whole = torch.cat([labels[:, :1], labels], 1)
        request = _Request("token", head, whole, {"memory_budget": None, "impl": impl})
        with torch.compiler.set_stance("force_eager"), _exchanged(lm):
            return model(**inputs, sppo_request=request)

    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        probe_head(lm, head, inputs, impl, model=model, through=through)
    finally:
        for module, mode in training.items():
            module.training = mode
    _probed[lm] = (weakref.ref(head.layer), state)


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
