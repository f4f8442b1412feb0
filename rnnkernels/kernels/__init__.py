"""Implementations of the operators: ``eager`` (PyTorch, any device) and ``triton`` (GPU)."""
