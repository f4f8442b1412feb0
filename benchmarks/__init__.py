"""Benchmarks of rnnkernels beside ``torch.nn``: ``python -m benchmarks``, or ``make bench``."""
