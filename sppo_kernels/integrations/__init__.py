"""Adapters for training code that others wrote. Each imports its package only when used."""
