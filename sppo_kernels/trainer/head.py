"""Moved to `sppo_kernels.head`, which the integrations share; the names stay importable here."""

from sppo_kernels.head import Head, HeadProbeError, backbone, causal_lm, find_head
from sppo_kernels.head_probe import probe_head

__all__ = ["Head", "HeadProbeError", "backbone", "causal_lm", "find_head", "probe_head"]
