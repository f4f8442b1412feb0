"""PyTorch implementations, for the CPU and any device that Triton does not reach."""
