"""Fused kernels, preference games and a thin trainer for Self-Play Preference Optimization."""

__version__ = "0.1.0"
