"""Checks of arguments that the operators share. Each error names the argument, what was expected, and what came."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels._backend import autocast_dtype, resolve


def check_tensor(
    name: str, value: object, shape: Sequence[int | str], like: Tensor | None = None, of: str = "input"
) -> None:
    """Check that ``value`` is a floating-point tensor of this shape, on the device and in the type of ``like``.

    A dimension of ``shape`` is a size, or a name where any size will do. ``of`` names the argument that ``like`` is.
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
        raise TypeError(f"{name}: expected dtype {like.dtype}, as {of} has, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, where {of} is, got {value.device}")


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
    if _values_are_known(lengths) and batch:
        shortest, longest = (int(bound) for bound in torch.aminmax(lengths))
        if shortest < 1 or longest > sequence_length:
            raise ValueError(f"lengths: expected 1 to {sequence_length} steps, got {shortest} to {longest}")
    return lengths.to(device).contiguous()


def _values_are_known(lengths: Tensor) -> bool:
    """Whether lengths can be looked at without waiting for a GPU."""
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling()


def check_reset(reset: object, sequence_length: int, batch: int, device: torch.device) -> Tensor:
    """Check the mask of the steps at which a new sequence begins, and return it on ``device``."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a Tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected dtype torch.bool, got {reset.dtype}")
    if tuple(reset.shape) != (sequence_length, batch):
        raise ValueError(f"reset: expected shape ({sequence_length}, {batch}), got {tuple(reset.shape)}")
    return reset.to(device)


def check_flag(name: str, value: object) -> None:
    """Check that ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_probability(name: str, value: object) -> float:
    """Check a probability."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
    return float(value)


def check_grad_clip(value: object) -> float:
    """Check the bound on the gradient that flows through time; infinite where it is None."""
    if value is None:
        return float("inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"grad_clip: expected a float or None, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"grad_clip: expected a positive bound, got {value}")
    return float(value)


def check_seed(seed: object) -> Tensor:
    """Check the seed of random masks, and return it as a tensor on the CPU; drawn from torch's generator if None."""
    if seed is None:
        return torch.randint(2**63 - 1, ())
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device.type != "cpu":
            came = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise TypeError(f"seed: expected an integer or an int64 scalar on the CPU, got {came}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    return torch.tensor(seed)


class Arguments(NamedTuple):
    """Checked arguments of a recurrent operator, in the type that autocast asks for."""

    tensors: dict[str, Tensor | None]
    lengths: Tensor | None
    reset: Tensor | None
    backend: str


def differentiable(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


REQUIRED = ("h_0", "c_0", "weight_ih", "weight_hh")


def check_recurrent(
    gates: int, *, lengths: Tensor | None, reset: Tensor | None, input: Tensor, **tensors: Tensor | None
) -> Arguments:
    """Check what every recurrent operator takes. ``gates`` is how many rows of the weights a hidden unit has."""
    check_tensor("input", input, ("sequence_length", "batch", "input_size"))
    sequence_length, batch, input_size = input.shape
    if sequence_length == 0:
        raise ValueError("input: expected at least 1 step, got an empty sequence")
    dtype = autocast_dtype(input.device)
    if dtype is not None:
        input = input.to(dtype)
        tensors = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in tensors.items()}
    check_tensor("h_0", tensors["h_0"], (batch, "hidden_size"), like=input)
    state_size = hidden_size = tensors["h_0"].shape[1]
    if tensors.get("weight_hr") is not None:
        check_tensor("c_0", tensors["c_0"], (batch, "hidden_size"), like=input)
        hidden_size = tensors["c_0"].shape[1]
    rows = gates * hidden_size
    shapes = {
        "h_0": (batch, state_size),
        "c_0": (batch, hidden_size),
        "weight_ih": (rows, input_size),
        "weight_hh": (rows, state_size),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (state_size, hidden_size),
        "weight_peephole": (3, hidden_size),
        "norm_ih": (rows,),
        "norm_hh": (rows,),
        "norm_cell_weight": (hidden_size,),
        "norm_cell_bias": (hidden_size,),
    }
    for name, value in tensors.items():
        if value is not None or name in REQUIRED:
            check_tensor(name, value, shapes[name], like=input)
    if lengths is not None:
        lengths = check_lengths(lengths, sequence_length, batch, input.device)
        if _values_are_known(lengths) and batch and int(lengths.min()) == sequence_length:
            lengths = None  # there is no padding
    if reset is not None:
        reset = check_reset(reset, sequence_length, batch, input.device)
    backend = resolve(input.device, input.dtype)
    return Arguments({"input": input, **tensors}, lengths, reset, backend)
