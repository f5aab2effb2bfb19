"""The equations of docs/objectives.md on Python floats, for one pair; no line of the package."""

import math
from types import SimpleNamespace


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log_sigma(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def smooth(x, e=0.0):
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x)


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


def power(logp, alpha):
    return (1 - math.exp(logp) ** (-alpha)) / alpha


def delta(g, whose):
    return getattr(g, f"{whose}chosen_logps") - getattr(g, f"{whose}rejected_logps")


# p and q: log-probs of the chosen and the rejected response; a and b: their log-ratios; m and n:
# their lengths; x = β(a − b); e: label smoothing; the rest by the names of pairwise_loss
FORMULAS = {
    "sppo": lambda g: (
        (g.a - (g.chosen_win - 0.5) / g.beta) ** 2 / 2
        + (g.b - (g.rejected_win - 0.5) / g.beta) ** 2 / 2
    ),
    "sppo_single": lambda g: (
        (g.a - (g.chosen_win - 0.5) / g.beta) ** 2 / 2
        + (g.b + (g.chosen_win - 0.5) / g.beta) ** 2 / 2
    ),
    "sppo_hard": lambda g: (g.a - 0.5 / g.beta) ** 2 + (g.b + 0.5 / g.beta) ** 2,
    "ipo": lambda g: (g.a / g.m - g.b / g.n - 1 / (2 * g.beta)) ** 2,
    "inpo": lambda g: (
        (
            delta(g, "")
            - g.reference_share * delta(g, "ref_")
            - (1 - g.reference_share) * delta(g, "previous_")
            - 1 / (2 * g.beta)
        )
        ** 2
    ),
    "dpo": lambda g: smooth(g.x, g.e),
    "spin": lambda g: smooth(g.x),
    "robust": lambda g: (
        (-(1 - g.e) * math.log(sigma(g.x)) + g.e * math.log(sigma(-g.x))) / (1 - 2 * g.e)
    ),
    "hinge": lambda g: max(0.0, 1 - g.x),
    "exo_pair": lambda g: (
        sigma(g.x) * math.log(sigma(g.x) / (1 - g.e)) + sigma(-g.x) * math.log(sigma(-g.x) / g.e)
    ),
    "discopop": lambda g: (
        -math.log(sigma(g.x)) * (1 - sigma(g.x / g.tau)) + math.exp(-g.x) * sigma(g.x / g.tau)
    ),
    "sigmoid_norm": lambda g: smooth(g.beta * (g.a / g.m - g.b / g.n)),
    "rdpo": lambda g: smooth(g.x + g.alpha * (g.m - g.n)),
    "dpop": lambda g: smooth(g.beta * (g.a - g.b - g.penalty * max(0.0, -g.a))),
    "nca_pair": lambda g: (
        -math.log(sigma(g.beta * g.a))
        - math.log(sigma(-g.beta * g.a)) / 2
        - math.log(sigma(-g.beta * g.b)) / 2
    ),
    "bco_pair": lambda g: (
        -math.log(sigma(g.beta * g.a - g.reward_shift))
        - math.log(sigma(-(g.beta * g.b - g.reward_shift)))
    ),
    "apo_zero": lambda g: 1 - sigma(g.beta * g.a) + sigma(g.beta * g.b),
    "apo_down": lambda g: sigma(g.beta * g.a) + 1 - sigma(g.beta * (g.a - g.b)),
    "kto": lambda g: (1 - sigma(g.beta * (g.a - g.kl)) + 1 - sigma(g.beta * (g.kl - g.b))) / 2,
    "simpo": lambda g: smooth(g.beta * (g.p / g.m - g.q / g.n) - g.margin, g.e),
    "alphapo": lambda g: smooth(
        g.beta * (power(g.p / g.m, g.alpha) - power(g.q / g.n, g.alpha)) - g.margin, g.e
    ),
    "cpo": lambda g: smooth(g.beta * (g.p - g.q), g.e) - g.nll_weight * g.p,
    "orpo": lambda g: (
        -g.nll_weight * g.p / g.m + g.beta * smooth(math.log(odds(g.p / g.m) / odds(g.q / g.n)))
    ),
    "slic": lambda g: max(0.0, g.margin - g.p + g.q) - g.nll_weight * g.p,
    "rrhf": lambda g: max(0.0, g.q / g.n - g.p / g.m) - g.nll_weight * g.p,
}
SORTED = {
    "aot": (("chosen_logps", "rejected_logps"), ("ref_chosen_logps", "ref_rejected_logps")),
    "aot_unpaired": (
        ("chosen_logps", "ref_chosen_logps"),
        ("rejected_logps", "ref_rejected_logps"),
    ),
}


def exact_losses(kind, tensors, settings):
    """Loss of each pair as a list of floats; of "aot" kinds in sorted order."""
    count = tensors["chosen_logps"].shape[0]
    rows = {k: v.tolist() if v.dim() else [v.item()] * count for k, v in tensors.items()}
    if kind in SORTED:
        first, second = (
            sorted(u - v for u, v in zip(rows[a], rows[b], strict=True)) for a, b in SORTED[kind]
        )
        return [
            smooth(settings["beta"] * (u - v), settings["label_smoothing"])
            for u, v in zip(first, second, strict=True)
        ]
    found = []
    for i in range(count):
        g = SimpleNamespace(**{k: v[i] for k, v in rows.items()}, **settings)
        g.p, g.q = g.chosen_logps, g.rejected_logps
        g.a = g.p - getattr(g, "ref_chosen_logps", 0.0)
        g.b = g.q - getattr(g, "ref_rejected_logps", 0.0)
        g.m, g.n = getattr(g, "chosen_lengths", None), getattr(g, "rejected_lengths", None)
        g.x = getattr(g, "beta", math.nan) * (g.a - g.b)
        g.e = getattr(g, "label_smoothing", 0.0)
        found.append(FORMULAS[kind](g))
    return found
