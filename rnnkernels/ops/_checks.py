"""Checks of arguments that the operators share. Each error names the argument, what was expected, and what came."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels._backend import autocast_dtype, resolve


def check_tensor(name: str, value: object, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """Check that ``value`` is a floating-point tensor of this shape, on the device and in the type of ``like``.

    A dimension of ``shape`` is a size, or a name where any size will do.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    matches = value.dim() == len(shape) and all(
        isinstance(expected, str) or expected == size for expected, size in zip(shape, value.shape, strict=True)
    )
    if not matches:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, as input has, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, where input is, got {value.device}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_lengths(lengths: object, sequence_length: int, batch: int, device: torch.device) -> Tensor:
    """Check the lengths of the sequences of a batch, and return them on ``device``.

    The values are checked where that costs no synchronization: lengths on a GPU must be within bounds as they come.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a Tensor, got {type(lengths).__name__}")
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths: expected dtype torch.int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), one length a sequence, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        shortest, longest = (int(bound) for bound in torch.aminmax(lengths))
        if shortest < 1 or longest > sequence_length:
            raise ValueError(f"lengths: expected 1 to {sequence_length} steps, got {shortest} to {longest}")
    return lengths.to(device)


class Arguments(NamedTuple):
    """Checked arguments of a recurrent operator, in the type that autocast asks for."""

    tensors: list[Tensor | None]
    lengths: Tensor | None
    backend: str


def differentiable(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_recurrent(
    input: Tensor,
    states: dict[str, Tensor],
    gates: int,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    lengths: Tensor | None,
) -> Arguments:
    """Check what every recurrent operator takes. ``gates`` is how many rows of the weights a hidden unit has."""
    check_tensor("input", input, ("sequence_length", "batch", "input_size"))
    sequence_length, batch, input_size = input.shape
    if sequence_length == 0:
        raise ValueError("input: expected at least 1 step, got an empty sequence")
    tensors = {**states, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    dtype = autocast_dtype(input.device)
    if dtype is not None:
        input = input.to(dtype)
        tensors = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in tensors.items()}
    for name in states:
        check_tensor(name, tensors[name], (batch, "hidden_size"), like=input)
    hidden_size = tensors["h_0"].shape[1]
    check_tensor("weight_ih", tensors["weight_ih"], (gates * hidden_size, input_size), like=input)
    check_tensor("weight_hh", tensors["weight_hh"], (gates * hidden_size, hidden_size), like=input)
    for name in ("bias_ih", "bias_hh"):
        if tensors[name] is not None:
            check_tensor(name, tensors[name], (gates * hidden_size,), like=input)
    if lengths is not None:
        lengths = check_lengths(lengths, sequence_length, batch, input.device)
    backend = resolve(input.device, input.dtype)
    return Arguments([input, *tensors.values()], lengths, backend)
