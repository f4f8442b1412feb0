"""Random masks from a counter-based generator: a pure function of key and position, the same on every device.

Nothing is stored for the backward pass, which asks for the same mask again. The generator is Squares: Widynski,
"Squares: a fast counter-based RNG", arXiv:2004.06278. Its 64-bit arithmetic wraps around in int64 as it must.
"""

import torch
from torch import Tensor

RECURRENT, ZONEOUT, ZONEOUT_CELL, ELEMENTS = range(4)
"""Streams: the masks of one key differ by use."""

_LOW = 0xFFFFFFFF
_BLOCK = 2**15
"""Counters at a time: their 64-bit intermediates then fit a cache."""


def key_of(seed: int) -> int:
    """A key for the generator from any 64-bit seed: odd and irregular, as a signed 64-bit integer (SplitMix64)."""
    z = (seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    z = (z ^ (z >> 31)) | 1
    return z - 2**64 if z >= 2**63 else z


def threshold(probability: float) -> int:
    """Below how many of the 2^32 values an element is dropped."""
    return round(probability * 2**32)


def _bits(memory: Tensor, key: int) -> Tensor:
    """32 random bits for each counter in the first row of ``memory``, whose four rows are all overwritten."""
    y, z, x, half = memory
    y.mul_(key)
    torch.add(y, key, out=z)
    torch.addcmul(y, y, y, out=x)
    for addend in (z, y, z):
        torch.bitwise_right_shift(x, 32, out=half)
        x.bitwise_left_shift_(32).bitwise_or_(half.bitwise_and_(_LOW))
        torch.addcmul(addend, x, x, out=x)
    return x.bitwise_right_shift_(32).bitwise_and_(_LOW)


def bits(counter: Tensor, key: int) -> Tensor:
    """32 random bits for each counter, as int64."""
    return _bits(torch.stack([counter.flatten()] * 4), key).view(counter.shape)


def dropped(key: int, stream: int, probability: float, shape: torch.Size | tuple[int, ...], device) -> Tensor:
    """True where an element is dropped, element by element in the order of memory."""
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    flat, first = mask.view(-1), stream << 56
    memory = torch.empty(4, min(_BLOCK, flat.numel()), dtype=torch.int64, device=device)
    for start in range(0, flat.numel(), _BLOCK):
        part = flat[start : start + _BLOCK]
        block = memory[:, : part.numel()]
        torch.arange(first + start, first + start + part.numel(), out=block[0])
        torch.lt(_bits(block, key), threshold(probability), out=part)
    return mask


def scale(probability: float) -> float:
    """What dropout multiplies the elements that it keeps by."""
    return 0.0 if probability == 1 else 1 / (1 - probability)


def kept(key: int, stream: int, probability: float, shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """The mask of dropout: zero, or :func:`scale`, in the type of ``like``."""
    mask = dropped(key, stream, probability, shape, like.device).logical_not_()
    return mask.to(like.dtype).mul_(scale(probability))


def dropout(input: Tensor, probability: float, key: int, shared: bool) -> Tensor:
    """``input`` times the mask of dropout; with ``shared``, one mask for all steps of the first dimension."""
    return input * kept(key, ELEMENTS, probability, input.shape[1:] if shared else input.shape, input)
