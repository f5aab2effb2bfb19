"""Eager PyTorch: the specification of the games."""
