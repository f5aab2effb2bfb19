"""Which objectives the trainer can run on the best and worst response of each prompt, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.data.collate import HostBatch
from sppo_kernels.loss.objectives import ALIASES, KINDS
from sppo_kernels.loss.objectives.base import LENGTHS, REFERENCE, WINS
from sppo_kernels.loss.pairwise import checked_settings, find_kind, pairwise_loss

# what a batch holds; objectives that need more (a previous policy, a KL estimate) do not fit
AVAILABLE = {*REFERENCE, *WINS, *LENGTHS}
PAIRWISE = (*(name for name, kind in KINDS.items() if AVAILABLE.issuperset(kind.needs)), *ALIASES)
SELF_PLAY = ("sppo_single", "sppo_hard")


def pairwise_settings(args: Any) -> dict[str, Any]:
    """`kind` and numbers of the pairwise objective an SPPOConfig asks for, checked.

    `beta` None is 1/eta for the SPPO kinds and `dpo_beta` for the others that take one.

    Raises:
        ValueError: the objective does not take a number, or lacks one.
    """
    objective = find_kind(args.objective)
    given = dict(parse_settings(args.objective_settings))
    beta = args.beta
    if beta is None and "beta" in objective.settings:
        beta = 1.0 / args.eta if objective.name in SELF_PLAY else args.dpo_beta
    for name, value in {"beta": beta, "label_smoothing": args.label_smoothing or None}.items():
        if name in given:
            raise ValueError(f"objective_settings: {name} has a setting of its own, {name}=")
        given[name] = value
    return {"kind": objective.name, **checked_settings(objective, given)}


def parse_settings(value: Mapping[str, float] | str | None) -> Mapping[str, float]:
    """A dict, JSON text of one, or None.

    Raises:
        ValueError: something else.
    """
    found = json.loads(value) if isinstance(value, str) else value
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"objective_settings: expected names and numbers, got {value!r}")
    return found


def pair_objective(
    logps: Tensor, ref: Tensor, host: HostBatch, settings: Mapping[str, Any]
) -> Tensor:
    """Loss [] of responses ordered best, worst, best, worst, ...: logps and ref [S]."""
    objective = KINDS[settings["kind"]]
    if objective.name == "sppo_single":
        _one_probability(host.win_rate)

    def halves(values: Tensor) -> tuple[Tensor, ...]:
        return values.view(-1, 2).unbind(1)

    columns = {REFERENCE: ref, WINS: host.win_rate, LENGTHS: host.cu_seqlens.diff()}
    wanted = {
        name: half.to(logps.device, non_blocking=True)
        for names, values in columns.items()
        for name, half in zip(names, halves(values), strict=True)
        if name in objective.needs
    }
    return pairwise_loss(*halves(logps), **wanted, **settings)


def _one_probability(win_rate: Tensor) -> None:
    """Raise unless the two win rates of each pair are those of one comparison."""
    gap = (win_rate.view(-1, 2).sum(1) - 1).abs().max()
    if gap > 1e-3 and not torch.compiler.is_compiling():
        raise ValueError(
            "objective: 'sppo_single' needs the probability that the best response beats the "
            "worst, so win rates that add to 1; here they are means over more responses (off by "
            f"{float(gap):.3g}); use 'sppo'"
        )
