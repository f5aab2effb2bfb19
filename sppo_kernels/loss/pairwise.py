"""One interface for preference losses that need only sequence log-probabilities.

With log-probs from `linear_sequence_logps` every one of them costs three GEMMs; docs/objectives.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.loss.objectives import ALIASES, KINDS, REFUSED, Objective, Pair
from sppo_kernels.loss.reduce import checked_weights, reduced

__all__ = ["pairwise_loss"]

# what settings may be, beside finite: a half-open or open range
_RANGES = {
    "beta": (0.0, math.inf),
    "tau": (0.0, math.inf),
    "label_smoothing": (0.0, 1.0),
    "reference_share": (0.0, 1.0),
    "nll_weight": (0.0, math.inf),
    "penalty": (0.0, math.inf),
}
_ABOVE_ZERO = ("beta", "tau")


def pairwise_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    kind: str,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    chosen_win: Tensor | None = None,
    rejected_win: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    previous_chosen_logps: Tensor | None = None,
    previous_rejected_logps: Tensor | None = None,
    kl: Tensor | float | None = None,
    reward_shift: Tensor | float | None = None,
    tau: float | None = None,
    margin: float | None = None,
    nll_weight: float | None = None,
    alpha: float | None = None,
    penalty: float | None = None,
    reference_share: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Preference loss of pairs of responses, from the log-probabilities of the responses.

    Values agree with TRL's and Liger's of the same name; so "sppo_hard" is twice "sppo" with win
    rates 1 and 0.

    Args:
        chosen_logps, rejected_logps: [P] log π_θ(y|x), summed over tokens, in nats; differentiable,
            as are all other log-probabilities.
        ref_chosen_logps, ref_rejected_logps: [P] log π_ref(y|x).
        kind: one of those below; `sppo_kernels.loss.objectives.KINDS` says what each takes.
        beta: β, above 0; 1/η for SPPO, η for INPO, λ for ORPO. None is 0.1.
        label_smoothing: ε in [0, 1]; below ½ for "robust", inside (0, 1) for "exo_pair".
        chosen_win, rejected_win: [P] win rates in [0, 1] ("sppo"); chosen_win alone, the
            probability that y_w beats y_l ("sppo_single").
        chosen_lengths, rejected_lengths: [P] tokens of the responses; 0 counts as 1.
        previous_chosen_logps, previous_rejected_logps: [P] log π_t(y|x) ("inpo").
        kl: [] or [P], z, at least 0 ("kto").
        reward_shift: [] or [P], δ, the running mean of rewards ("bco_pair"); None is 0.
        tau: "discopop", above 0; 0.05. Above 1 its loss grows exponentially in −x.
        margin: γ of "simpo" and "alphapo", 0.5; δ of "slic", 1.
        nll_weight: λ of "cpo", "orpo", "slic", "rrhf"; 1.
        alpha: α of "rdpo" and "alphapo"; not 0 for the latter.
        penalty: λ of "dpop"; 50.
        reference_share: s = τ/η of "inpo", in [0, 1].
        weights: [P] weight of each pair, at least 0, or None for 1. Not with "aot" kinds.
        reduction: "mean" (Σ weights·L / Σ weights), "sum" or "none" (weights·L; "aot" kinds: in
            sorted order).

    Returns:
        float32 (float64 for float64 chosen_logps), shape [] or, with reduction "none", [P].

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value, or the
            kind needs it and it is missing, or does not take it and it is given.
    """
    objective = find_kind(kind)
    given = {
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_win": chosen_win,
        "rejected_win": rejected_win,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "previous_chosen_logps": previous_chosen_logps,
        "previous_rejected_logps": previous_rejected_logps,
        "kl": kl,
        "reward_shift": reward_shift,
    }
    settings = checked_settings(
        objective,
        {
            "beta": beta,
            "label_smoothing": label_smoothing or None,
            "tau": tau,
            "margin": margin,
            "nll_weight": nll_weight,
            "alpha": alpha,
            "penalty": penalty,
            "reference_share": reference_share,
        },
    )
    pair = _checked_pair(objective, chosen_logps, rejected_logps, given)
    if weights is not None and not objective.paired:
        raise ValueError(f"weights: kind={objective.name!r} sorts, so its rows are no pairs")
    loss = objective.function(pair, settings)
    weights = checked_weights(weights, reduction, loss, "chosen_logps", "pair")
    return reduced(loss, weights, reduction)


if pairwise_loss.__doc__ is not None:
    pairwise_loss.__doc__ += """
    Kinds, with a and b the log-ratios log π_θ − log π_ref of y_w (chosen) and y_l (rejected), u and
    v their log-probabilities a token, x = β(a − b), ε = label_smoothing:

""" + "\n".join(f"        {o.name}: {o.equation}  [{o.source}]" for o in KINDS.values())


def find_kind(kind: object) -> Objective:
    """The objective of this name.

    Raises:
        ValueError: there is none; the message says why where the name is known elsewhere.
    """
    if kind in REFUSED:
        raise ValueError(f"kind: {kind!r} cannot be computed here: {REFUSED[kind]}")
    name = ALIASES.get(kind, kind)
    if name not in KINDS:
        raise ValueError(f"kind: expected one of {(*KINDS, *ALIASES)}, got {kind!r}")
    return KINDS[name]


def checked_settings(objective: Objective, given: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers the objective takes, defaults filled in; None in `given` is not given."""
    name = objective.name
    for key, value in given.items():
        if value is not None and key not in objective.settings:
            raise ValueError(f"{key}: kind={name!r} does not take it, got {value}")
    found = {}
    for key, default in objective.settings.items():
        value = given.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{key}: kind={name!r} needs it, and it has no default")
        found[key] = _in_range(name, key, value)
    return found


def _in_range(kind: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key}: expected a number, got {type(value).__name__}")
    low, high = _RANGES.get(key, (-math.inf, math.inf))
    inside = low <= value <= high and math.isfinite(value) and (value > 0 or key not in _ABOVE_ZERO)
    wanted = f"a finite number {'above 0' if key in _ABOVE_ZERO else f'in [{low}, {high}]'}"
    if (kind, key) == ("robust", "label_smoothing"):
        inside, wanted = inside and value < 0.5, "a number in [0, 0.5)"
    elif (kind, key) == ("exo_pair", "label_smoothing"):
        inside, wanted = 0 < value < 1, "a number in (0, 1), such as 1e-3"
    elif (kind, key) == ("alphapo", "alpha"):
        inside, wanted = inside and value != 0, "a finite number other than 0"
    if not inside:
        raise ValueError(f"{key}: expected {wanted} for kind={kind!r}, got {value}")
    return float(value)


def _checked_pair(
    objective: Objective, chosen: object, rejected: object, given: dict[str, object]
) -> Pair:
    chosen = checks.floating("chosen_logps", chosen, 1)
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    found = {"chosen_logps": chosen.to(dtype)}
    allowed = (*objective.needs, *objective.optional)
    for name, value in {"rejected_logps": rejected, **given}.items():
        if name not in allowed and name != "rejected_logps":
            if value is not None:
                raise ValueError(f"{name}: kind={objective.name!r} does not take it")
            continue
        if value is None:
            if name in objective.needs:
                raise ValueError(f"{name}: kind={objective.name!r} needs it, got None")
            continue
        found[name] = _checked_tensor(name, value, chosen).to(dtype)
    optional = [name for name in objective.optional if name.endswith("_lengths")]
    if len(missing := [name for name in optional if name not in found]) == 1:
        raise ValueError(f"{missing[0]}: expected with the other lengths, got None")
    return Pair(**found)


def _checked_tensor(name: str, value: object, chosen: Tensor) -> Tensor:
    if name in ("kl", "reward_shift"):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float64, device=chosen.device)
        value = checks.floating(name, value, (0, 1))
        if value.dim() == 0:
            return value
    elif name.endswith("_lengths") and not torch.is_floating_point(checks.tensor(name, value)):
        value = checks.integers(name, value)
    else:
        value = checks.floating(name, value, 1)
    checks.shape(name, value, chosen.shape, "that of chosen_logps, one for each pair")
    checks.same_device(name, value, "chosen_logps", chosen)
    if name.endswith("_win"):
        checks.win_rates(value, name)
    elif name.endswith("_lengths"):
        checks.weights(value, name)
    return value
