"""The shape of OpenRLHF 0.11.2: openrlhf/models/{actor,utils,loss}.py and trainer/dpo_trainer.py;
and of the parts of flash-attn 2.8 (flash_attn/bert_padding.py) and deepspeed that they import.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util

import torch
from torch import nn
from torch.nn import functional

from tests.standins import module


def log_probs_from_logits(logits, labels, temperature=1.0):
    logits = logits / temperature
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def unpad_input(values, mask):
    """Rows where the mask holds, their indices, the sequences' bounds, and the longest length."""
    indices = mask.flatten().nonzero().flatten()
    lengths = mask.sum(-1)
    bounds = functional.pad(lengths.cumsum(0), (1, 0)).int()
    return values.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths


def pad_input(values, indices, batch, length):
    whole = values.new_zeros(batch * length, *values.shape[1:])
    return whole.index_put((indices,), values).unflatten(0, (batch, length))


def unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group):
    positions = (attention_mask.cumsum(-1) - 1).clip(0)
    rolled = sequences.roll(-1, 1)
    indices = attention_mask.flatten().nonzero().flatten()
    packed = [x.flatten()[indices][None] for x in (sequences, positions, rolled)]
    return *packed, 0, indices


def gather_and_pad_tensor(tensor, ring_attn_group, ring_attn_pad_len, indices, batch, seqlen):
    return pad_input(tensor.transpose(0, 1), indices, batch, seqlen).squeeze(-1)


class Actor(nn.Module):
    def __init__(self, pretrain_or_model, attn_implementation="flash_attention_2"):
        super().__init__()
        self.model, self.temperature, self.packing_samples = pretrain_or_model, 1.0, False

    def forward(
        self,
        sequences,
        action_mask=None,
        attention_mask=None,
        return_output=False,
        allgather_logits=False,
        return_logprobs=False,
        ring_attn_group=None,
        packed_seq_lens=None,
        return_entropy=False,
        **mm_inputs,
    ):
        batch, length = sequences.shape
        if self.packing_samples:
            sequences, positions, rolled, pad, indices = unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            output = self.model(sequences, position_ids=positions)
        else:
            rolled = sequences.roll(-1, 1)
            positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            output = self.model(sequences, attention_mask=attention_mask, position_ids=positions)
        output["logits"] = output["logits"].float() / self.temperature
        if action_mask is None and not return_logprobs:
            return output
        logps = log_probs_from_logits(output["logits"], rolled)
        entropy = torch.distributions.Categorical(logits=output["logits"]).entropy()
        if self.packing_samples:
            spread = (None, pad, indices, batch, length)
            logps, entropy = (gather_and_pad_tensor(x, *spread) for x in (logps, entropy))
        logps = logps[:, :-1]
        if return_entropy:
            output.entropy = entropy[:, :-1]
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask
        return (logps, output) if return_output else logps


class DPOLoss(nn.Module):
    def __init__(self, beta, label_smoothing=0.0, ipo=False):
        super().__init__()

    def forward(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    ):
        raise NotImplementedError


def modules():
    return {
        "openrlhf": module("openrlhf", __version__="0.11.2"),
        "openrlhf.models": module("openrlhf.models", DPOLoss=DPOLoss, Actor=Actor),
        "openrlhf.models.utils": module(
            "openrlhf.models.utils", log_probs_from_logits=log_probs_from_logits
        ),
        "openrlhf.models.loss": module("openrlhf.models.loss", DPOLoss=DPOLoss),
        "openrlhf.models.actor": module(
            "openrlhf.models.actor",
            Actor=Actor,
            log_probs_from_logits=log_probs_from_logits,
            unpad_and_slice_tensor=unpad_and_slice_tensor,
            gather_and_pad_tensor=gather_and_pad_tensor,
        ),
        "openrlhf.trainer.dpo_trainer": module("openrlhf.trainer.dpo_trainer", DPOLoss=DPOLoss),
    }


def dependencies():
    """Modules that OpenRLHF imports and that need CUDA to build, where they are not installed."""
    padding = module(
        "flash_attn.bert_padding",
        unpad_input=unpad_input,
        pad_input=pad_input,
        index_first_axis=lambda values, indices: values[indices],
        rearrange=lambda values, pattern: values.flatten(0, 1),
    )
    found = {
        "flash_attn": module("flash_attn"),
        "flash_attn.bert_padding": padding,
        "flash_attn.utils": module("flash_attn.utils"),
        "flash_attn.utils.distributed": module("flash_attn.utils.distributed", all_gather=None),
        "deepspeed": module("deepspeed"),
    }
    missing = {n: m for n, m in found.items() if importlib.util.find_spec(n.split(".")[0]) is None}
    for name, made in missing.items():
        made.__path__ = []
        made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return missing
