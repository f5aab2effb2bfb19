"""The demo's judge under the name by which older run folders know it."""

from sppo_kernels.selfplay.demo import judge

__all__ = ["judge"]
