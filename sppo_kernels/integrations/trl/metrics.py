"""TRL's names of metrics, beside SPPO's, of what the trainer's one store gathered."""

from __future__ import annotations

import torch

from sppo_kernels.trainer.metrics import Gathered, preference_metrics

# names here -> of preference_metrics
SPPO = {
    "sppo/residual": "residual",
    "sppo/residual_rms": "residual_rms",
    "sppo/loss_win_rate": "loss_win_rate",
    "sppo/logratio": "logratio_mean",
    "sppo/kl": "kl",
    "sppo/rank_correlation": "rank_correlation",
}


def trl_metrics(found: Gathered, eta: float) -> dict[str, float]:
    """Means over responses; rewards are log-ratios over `eta`, as TRL's are times beta."""
    ratio, win = found.ratio, found.win_rate.double()
    columns = {"rewards/": ratio / eta, "logps/": found.logps.double(), "sppo/win_rate_": win}
    index = dict(zip(("chosen", "rejected"), torch.tensor(found.pairs).unbind(1), strict=True))
    result = {p + side: x[at].mean() for p, x in columns.items() for side, at in index.items()}
    margin = columns["rewards/"][index["chosen"]] - columns["rewards/"][index["rejected"]]
    result["rewards/accuracies"] = (margin > 0).double().mean()
    result["rewards/margins"] = margin.mean()
    ours = preference_metrics(ratio, win, found.groups, eta)
    result |= {name: ours[key] for name, key in SPPO.items() if key in ours}
    if found.aux.numel():
        result["aux_loss"] = found.aux.double().mean()
    return {name: float(value) for name, value in result.items()}
