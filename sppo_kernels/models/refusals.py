"""What is refused, why, and what to do instead: the one table of messages and of docs/models.md."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["REFUSALS", "HeadProbeError", "refused"]


class HeadProbeError(RuntimeError):
    """The fused log-probabilities would not be those of the model; the message names the reason."""


class Refusal(NamedTuple):
    """A kind of head as the documentation lists it; the message about one, the reason, the way."""

    head: str
    message: str
    why: str
    instead: str


LOGITS = "compute its logits and use fused_sppo_loss or sequence_logps"
MERGE = "merge it (merge_and_unload) or leave the head out of target_modules"
THROUGH = "call the model through its wrapper, which makes the head's weight whole"

REFUSALS = {
    "no model": Refusal(
        "no language model of transformers",
        "{name} is not a transformers language model (config, output head)",
        "the head is found by get_output_embeddings() and what the config says of it",
        "give hidden states and weight to linear_sequence_logps",
    ),
    "encoder-decoder": Refusal(
        "encoder-decoder",
        "{name} is an encoder-decoder",
        "its labels are not a continuation of its input",
        LOGITS,
    ),
    "no head": Refusal(
        "no output embedding",
        "{name} has no linear output embedding (get_output_embeddings())",
        "there is no matrix to multiply with",
        LOGITS,
    ),
    "data parallel": Refusal(
        "`nn.DataParallel`",
        "{name} splits a batch in its forward",
        "its copies cannot hand over what they compute",
        "use DDP instead",
    ),
    "mixed adapters": Refusal(
        "X-LoRA, Poly",
        "{name} with {kind} changes what the model sees",
        "its adapters weigh differently for each input",
        LOGITS,
    ),
    "scale": Refusal(
        "logits scaled by 0 or less",
        "{name}: the config scales its logits by {scale}, not above 0",
        "the operators take a positive scale",
        LOGITS,
    ),
    "quantised": Refusal(
        "quantised (bitsandbytes, GPTQ, AWQ, torchao, HQQ, fp8, …)",
        "{name} is a quantised {kind} ({what})",
        "its numbers are packed or scaled, not a matrix",
        "keep the head in 16 or 32 bits (llm_int8_skip_modules=['lm_head'] or "
        "modules_to_not_convert of its quantiser)",
    ),
    "not linear": Refusal(
        "`Sequential` and others that are not one `nn.Linear`",
        "{name} is {kind}, not one nn.Linear",
        "it is more than a matrix",
        LOGITS,
    ),
    "beside": Refusal(
        "`check=False` with further layers beside base model and head",
        "{name}: {kind} has {beside} beside it",
        "only a probe can tell whether the head is linear",
        "leave check=True",
    ),
    "reparametrised": Refusal(
        "old `weight_norm`, pruning by hooks",
        "{name} is reparametrised by hooks ({what})",
        "its weight is made anew in a hook",
        "use torch.nn.utils.parametrizations",
    ),
    "adapter": Refusal(
        "LoHa, LoKr, IA³, OFT, AdaLoRA, VeRA, other tuners and LoRA variants on the head",
        "{name} is adapted by {kind}, which is not low-rank LoRA",
        "no sum of weights is known to equal it",
        MERGE,
    ),
    "dropout": Refusal(
        "LoRA with dropout on the head",
        "{name} has LoRA with dropout (lora_dropout of adapter {adapter!r})",
        "it acts on the head's input, so no weight is equal to it",
        "set lora_dropout=0 or leave the head out",
    ),
    "dora": Refusal(
        "DoRA beside other adapters",
        "{name} has DoRA beside other active adapters {adapters}",
        "their product depends on their order",
        MERGE,
    ),
    "own unit": Refusal(
        "FSDP1 unit of its own, or an FSDP unit inside an adapted head",
        "{name} is an FSDP unit of its own",
        "its weight is whole only inside a forward that is not the head's",
        "leave the head in the root unit (no auto-wrap policy for it)",
    ),
    "tie": Refusal(
        "a tie to the embedding that FSDP broke",
        "{name} is tied to the input embedding by the config, but holds another tensor here",
        "FSDP has them in different units",
        "put both in the root unit",
    ),
    "zero3": Refusal(
        "ZeRO-3, not gathered",
        "{name} is partitioned by ZeRO-3 and not gathered",
        "the weight is not here",
        f"{THROUGH}, or call inside deepspeed.zero.GatheredParameters([head.weight])",
    ),
    "shard": Refusal(
        "a shard or flat parameter",
        "{name} has shape {shape} here, a shard or flat parameter (FSDP, ZeRO-3)",
        "the weight is not whole",
        THROUGH,
    ),
    "meta": Refusal(
        "meta device, or offloaded inside an adapter",
        "{name} is on the meta device ({what})",
        "there are no numbers",
        "give the head a device (device_map)",
    ),
    "calls": Refusal(
        "a head that is not called, or more than once",
        "{name}: the model did not use its head as expected (calls: {calls})",
        "its logits are not those of one product",
        LOGITS,
    ),
    "shape": Refusal(
        "logits of another shape",
        "{name}: its weight is {weight}, but the model maps {hidden} hidden states to {logits} "
        "logits",
        "the head is not what the config says",
        LOGITS,
    ),
    "differs": Refusal(
        "other log-probabilities than the model's own",
        "{name}: the fused log-probability of the token at {where} is {fused:.6g}, the model's own "
        "{own:.6g} (difference {gap:.3g} nats, rounding explains {allowed:.3g})",
        "{reason}",
        LOGITS,
    ),
    "packing": Refusal(
        "packing where attention ignores the layout",
        "packing: {name} cannot be packed ({error})",
        "a response would see its siblings",
        "leave packing at 'auto' or 'padded'",
    ),
    "trl softcap": Refusal(
        "TRL's fused head: a softcap that it does not read",
        "{name}: config.{attribute} = {value} acts on the logits",
        "TRL's fused head does not apply it",
        "use SoftSPPOTrainer, whose head does, or a loss of TRL's on logits",
    ),
    "trl sharded": Refusal(
        "TRL's fused head: adapters on a sharded head",
        "{name} has adapters and is sharded",
        "TRL takes the weight outside of the forward that makes it whole",
        "unshard the head or leave it out of target_modules",
    ),
}


def refused(key: str, **values: Any) -> HeadProbeError:
    """The error to raise, from the entry `key` of the table."""
    _, *text = REFUSALS[key]
    return HeadProbeError("{}: {}; {}".format(*text).format(**values))
