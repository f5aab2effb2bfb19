"""A Hugging Face model to its hidden states and its head: one description, one probe."""

from sppo_kernels.models.head import Head, HeadProbeError, causal_lm, find_head
from sppo_kernels.models.probe import probe_head

__all__ = ["Head", "HeadProbeError", "causal_lm", "find_head", "probe_head"]
