"""Result types of the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SPPOOutput(NamedTuple):
    """What the fused losses return.

    Attributes:
        loss: the reduced loss, float32, shape [] (or [S] with `reduction="none"`); differentiable.
        logps: log-probability of every response under the policy, float32, shape [S], in nats;
            detached, for metrics.
    """

    loss: Tensor
    logps: Tensor
