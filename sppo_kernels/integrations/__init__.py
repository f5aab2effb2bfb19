"""sppo-kernels inside the trainers people already have; docs/integrations.md has the table.

Each module imports its framework only when it is used.
"""
