"""Argument checks shared by the data functions."""

import torch


def positive_int(name, value):
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def tensor(name, value, ndim):
    """Raise unless `value` is a tensor whose number of dimensions is in the tuple `ndim`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim not in ndim:
        expected = " or ".join(str(n) for n in ndim)
        raise ValueError(f"{name} must have {expected} dimension(s), got shape {tuple(value.shape)}")


def tokens(value):
    """Raise unless `value` is a one-dimensional tensor of integers."""
    tensor("tokens", value, (1,))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got dtype {value.dtype}")
