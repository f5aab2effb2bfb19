"""TRL's metrics and SPPO's, gathered without waiting for the device and reduced when logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_kernels.integrations.trl.collator import SoftBatch
from sppo_kernels.trainer.metrics import preference_metrics

# names here -> of preference_metrics
SPPO = {
    "sppo/residual": "residual",
    "sppo/residual_rms": "residual_rms",
    "sppo/loss_win_rate": "loss_win_rate",
    "sppo/logratio": "logratio_mean",
    "sppo/kl": "kl",
    "sppo/rank_correlation": "rank_correlation",
}


class SoftMetrics:
    """Batches of (log-probabilities, reference, win rates); `pop` turns them into numbers.

    Args:
        eta: of the residual; rewards are log-ratios over it, as TRL's are times beta.
    """

    def __init__(self, eta: float) -> None:
        self.eta = eta
        self._reset()

    def _reset(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, SoftBatch]] = []
        self._aux: list[Tensor] = []

    def add(self, logps: Tensor, ref: Tensor, host: SoftBatch, aux: Tensor | None) -> None:
        """logps, ref [S] may live on a device; they are copied only by `pop`."""
        self._batches.append((logps.detach(), ref, host))
        if aux is not None:
            self._aux.append(aux.detach())

    def pop(self, processes: int = 1) -> tuple[dict[str, float], int]:
        """Means over the responses (of all processes) since the last call, and their tokens."""
        found = [self._collected()]
        if processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        self._reset()
        data: dict[str, list] = {key: [] for key in found[0]}
        for part in found:
            start = len(data["logps"])
            for key, values in part.items():
                shift = start if key in ("chosen", "rejected") else 0
                data[key] += [v + shift for v in values] if shift else values
        if not data["logps"]:
            return {}, 0
        return self._reduced(data), sum(data["tokens"])

    def _collected(self) -> dict[str, list]:
        """This process's numbers as lists, so that ranks may differ in their counts."""
        out: dict[str, list] = {
            key: []
            for key in ("logps", "ref", "win", "groups", "chosen", "rejected", "aux", "tokens")
        }
        if not self._batches:
            return out
        logps, refs, hosts = zip(*self._batches, strict=True)
        out["logps"] = torch.cat([x.float() for x in logps]).cpu().double().tolist()
        out["ref"] = torch.cat([x.float() for x in refs]).cpu().double().tolist()
        at = 0
        for host in hosts:
            out["win"] += host.win_rate.tolist()
            out["groups"] += host.groups
            out["chosen"] += [at + chosen for chosen, _ in host.pairs]
            out["rejected"] += [at + rejected for _, rejected in host.pairs]
            out["tokens"].append(host.tokens)
            at += host.win_rate.numel()
        out["aux"] = [float(x) for x in self._aux]
        return out

    def _reduced(self, data: dict[str, list[Any]]) -> dict[str, float]:
        logps, ref, win = (
            torch.tensor(data[key], dtype=torch.float64) for key in ("logps", "ref", "win")
        )
        chosen, rejected = data["chosen"], data["rejected"]
        ratio = logps - ref
        reward = ratio / self.eta
        margin = reward[chosen] - reward[rejected]
        result = {
            "rewards/chosen": reward[chosen].mean(),
            "rewards/rejected": reward[rejected].mean(),
            "rewards/accuracies": (margin > 0).double().mean(),
            "rewards/margins": margin.mean(),
            "logps/chosen": logps[chosen].mean(),
            "logps/rejected": logps[rejected].mean(),
            "sppo/win_rate_chosen": win[chosen].mean(),
            "sppo/win_rate_rejected": win[rejected].mean(),
        }
        result = {name: float(value) for name, value in result.items()}
        ours = preference_metrics(ratio, win, data["groups"], self.eta)
        result |= {name: ours[key] for name, key in SPPO.items() if key in ours}
        if data["aux"]:
            result["aux_loss"] = sum(data["aux"]) / len(data["aux"])
        return result
