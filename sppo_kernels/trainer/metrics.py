"""What users of SPPO look at, from log-ratios gathered without waiting for the device."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor

from sppo_kernels.data.collate import HostBatch


class MetricStore:
    """Gathers (log-ratios, win rates) of batches; `pop` reduces them to numbers."""

    def __init__(self, eta: float) -> None:
        self.eta = eta
        self.reset()

    def reset(self) -> None:
        self.ratios: list[Tensor] = []
        self.wins: list[Tensor] = []
        self.groups: list[int] = []
        self.tokens = self.padding = 0
        self.started = time.perf_counter()

    def add(self, logps: Tensor, host: HostBatch) -> None:
        """logps [S] may live on the device; it is copied only by `pop`."""
        ref = host.ref_logps if host.ref_logps is not None else torch.zeros_like(host.win_rate)
        self.ratios.append(logps.detach().float() - ref.to(logps.device, non_blocking=True))
        self.wins.append(host.win_rate)
        self.groups += host.groups
        self.tokens += host.tokens
        self.padding += host.padding

    def pop(self) -> dict[str, float]:
        """Means over everything added since the last call; {} when nothing was."""
        if not self.ratios:
            return {}
        ratio = torch.cat(self.ratios).cpu().double()
        win = torch.cat(self.wins).double()
        seconds = time.perf_counter() - self.started
        result = preference_metrics(ratio, win, self.groups, self.eta)
        result["tokens_per_second"] = self.tokens / max(seconds, 1e-9)
        result["padding"] = self.padding / max(1, self.tokens + self.padding)
        result["peak_memory_gib"] = peak_memory() / 2**30
        self.reset()
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
    residual = ratio - eta * (win - 0.5)
    best_r, worst_r, best_w, worst_w, ranks = [], [], [], [], []
    for r, w in zip(ratio.split(groups), win.split(groups), strict=True):
        best, worst = int(w.argmax()), int(w.numel() - 1 - w.flip(0).argmin())
        best_r.append(r[best])
        worst_r.append(r[worst])
        best_w.append(w[best])
        worst_w.append(w[worst])
        if w.max() > w.min():
            ranks.append(spearman(r, w))
    best_r, worst_r = torch.stack(best_r), torch.stack(worst_r)
    result = {
        "loss_log_ratio": residual.square().mean(),
        "loss_win_rate": residual.square().mean() / eta**2,
        "residual": residual.mean(),
        "residual_rms": residual.square().mean().sqrt(),
        "logratio_mean": ratio.mean(),
        "logratio_best": best_r.mean(),
        "logratio_worst": worst_r.mean(),
        "logratio_margin": (best_r - worst_r).mean(),
        "win_rate_best": torch.stack(best_w).mean(),
        "win_rate_worst": torch.stack(worst_w).mean(),
        "kl": -ratio.mean(),
    }
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
