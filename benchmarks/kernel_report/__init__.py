"""Parts of `python -m benchmarks.kernels`: cubins read, occupancy bounded, times predicted."""
