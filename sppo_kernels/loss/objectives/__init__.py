"""The objectives of `pairwise_loss`: KINDS maps each name to its equation, source and arguments."""

from sppo_kernels.loss.objectives import logistic, reference_free, separate, squared
from sppo_kernels.loss.objectives.base import Objective, Pair

__all__ = ["ALIASES", "KINDS", "REFUSED", "Objective", "Pair"]

FAMILIES = (squared, logistic, separate, reference_free)
KINDS: dict[str, Objective] = {
    found.name: found
    for family in FAMILIES
    for found in vars(family).values()
    if isinstance(found, Objective)
}
ALIASES = {"sigmoid": "dpo"}
REFUSED = {
    "sft": "its mean runs over tokens and not pairs; use -linear_token_logps(...)",
    "kto_pair": "its KL estimate is the caller's; use kind='kto' with kl=",
    "bco": "its weights come from a classifier of prompts; use kind='bco_pair' with weights=",
}
