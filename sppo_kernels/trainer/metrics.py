"""What users of SPPO look at, from log-ratios gathered without waiting for the device."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_kernels.data.collate import HostBatch
from sppo_kernels.data.rows import best_and_worst
from sppo_kernels.loss.residual import residual


class Gathered(NamedTuple):
    """Numbers of the responses of one batch, or of many.

    Attributes:
        logps, ref: [S] log π_θ and log π_t, in nats; win_rate: [S].
        aux: [n], a load-balancing loss a batch; empty without one.
        groups, pairs, tokens, padding: as in HostBatch.
    """

    logps: Tensor
    ref: Tensor
    win_rate: Tensor
    aux: Tensor
    groups: list[int]
    pairs: list[tuple[int, int]]
    tokens: int
    padding: int

    @property
    def ratio(self) -> Tensor:
        """[S] log π_θ − log π_t in float64, of float32 differences."""
        return (self.logps - self.ref).double()


def merged(parts: list[Gathered]) -> Gathered:
    """One after another, in float32 on the CPU."""
    logps, ref, win_rate, aux, groups, pairs, tokens, padding = zip(*parts, strict=True)
    starts = itertools.accumulate((w.numel() for w in win_rate), initial=0)
    return Gathered(
        *(torch.cat([x.float() for x in values]).cpu() for values in (logps, ref, win_rate, aux)),
        list(itertools.chain(*groups)),
        [(at + a, at + b) for at, own in zip(starts, pairs, strict=False) for a, b in own],
        sum(tokens),
        sum(padding),
    )


class MetricStore:
    """Gathers log-probabilities, win rates and groups of batches; `pop` reduces them to numbers."""

    def __init__(self, eta: float) -> None:
        self.eta = eta
        self.reset()

    def reset(self) -> None:
        self._parts: list[Gathered] = []
        self.started = time.perf_counter()

    def add(
        self, logps: Tensor, host: HostBatch, ref: Tensor | None = None, aux: Tensor | None = None
    ) -> None:
        """logps, ref (default: that of `host`, else 0) [S] and aux [] are copied only when reduced.

        What else a batch holds (labels, masks on the device) is not kept.
        """
        ref = host.ref_logps if ref is None else ref
        ref = torch.zeros_like(host.win_rate) if ref is None else ref
        aux = logps.new_empty(0) if aux is None else aux.detach().view(1)
        counts = (host.groups, host.pairs, host.tokens, host.padding)
        self._parts.append(Gathered(logps.detach(), ref.detach(), host.win_rate, aux, *counts))

    def gather(self, processes: int = 1) -> Gathered | None:
        """Everything added since the last call, of all processes, which must call it together.

        None when nothing was added.
        """
        found = [merged(self._parts)] if self._parts else []
        if processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        self.reset()
        return merged(found) if found else None

    def pop(self, processes: int = 1) -> dict[str, float]:
        """Means over everything added since the last call; {} when nothing was."""
        seconds = time.perf_counter() - self.started
        found = self.gather(processes)
        if found is None:
            return {}
        result = preference_metrics(found.ratio, found.win_rate.double(), found.groups, self.eta)
        result["tokens_per_second"] = found.tokens / max(seconds, 1e-9)
        result["padding"] = found.padding / max(1, found.tokens + found.padding)
        result["peak_memory_gib"] = peak_memory() / 2**30
        return result


def peak_memory() -> int:
    """Most bytes held: of the device when there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def preference_metrics(
    ratio: Tensor, win: Tensor, groups: list[int], eta: float
) -> dict[str, float]:
    """Metrics of responses.

    Args:
        ratio: [S] log π_θ − log π_t, in nats.
        win: [S] win rates.
        groups: responses of each prompt, summing to S.

    Returns:
        loss_log_ratio and loss_win_rate: the mean squared residual, in nats² and over η²;
        residual: its mean in nats; residual_rms; logratio_mean, _best, _worst, _margin (best minus
        worst response of a prompt by win rate, in nats); win_rate_best, win_rate_worst;
        rank_correlation: mean over prompts of Spearman's of win rate and log-ratio (ties share
        ranks; prompts without differing win rates do not count); kl: −mean log-ratio, the
        estimate of KL(π_t ‖ π_θ) when responses were sampled from π_t.
    """
    off = residual(ratio, torch.zeros_like(ratio), win, eta)
    parts = list(zip(ratio.split(groups), win.split(groups), strict=True))
    chosen = [best_and_worst(w.tolist()) for _, w in parts]
    best_r, worst_r, best_w, worst_w = (
        torch.stack([part[of][pair[at]] for part, pair in zip(parts, chosen, strict=True)])
        for of, at in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    result = {
        "loss_log_ratio": off.square().mean(),
        "loss_win_rate": off.square().mean() / eta**2,
        "residual": off.mean(),
        "residual_rms": off.square().mean().sqrt(),
        "logratio_mean": ratio.mean(),
        "logratio_best": best_r.mean(),
        "logratio_worst": worst_r.mean(),
        "logratio_margin": (best_r - worst_r).mean(),
        "win_rate_best": best_w.mean(),
        "win_rate_worst": worst_w.mean(),
        "kl": -ratio.mean(),
    }
    ranks = [spearman(r, w) for r, w in parts if w.max() > w.min()]
    if ranks:
        result["rank_correlation"] = sum(ranks) / len(ranks)
    return {name: float(value) for name, value in result.items()}


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x [n] and y [n]; 0 when one of them does not vary."""
    x, y = (average_ranks(v) for v in (x, y))
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def average_ranks(values: Tensor) -> Tensor:
    """Ranks of values [n], equal ones sharing the mean of theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
