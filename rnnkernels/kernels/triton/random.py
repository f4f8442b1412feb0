"""Random masks from the counter-based generator of ``rnnkernels.kernels.eager.random``, bit for bit.

The functions in Triton serve the cells' kernels, which draw zoneout where they need it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkernels.kernels.eager.random import ELEMENTS, scale, threshold

BLOCK = 1024
"""Elements that a program masks."""


@triton.jit
def swapped_halves(x):
    return (x >> 32) | (x << 32)


@triton.jit
def bits(counter, key):
    """32 random bits for each counter, as unsigned 64-bit integers."""
    key = key.to(tl.uint64)
    y = counter.to(tl.uint64) * key
    z = y + key
    x = swapped_halves(y * y + y)
    x = swapped_halves(x * x + z)
    x = swapped_halves(x * x + y)
    return (x * x + z) >> 32


@triton.jit
def dropped(index, key, bound, STREAM: tl.constexpr):
    """Whether the elements at these 64-bit indices are dropped: where their bits lie below ``bound``."""
    return bits(index + (STREAM << 56), key).to(tl.int64) < bound


@triton.jit
def mask_of(index, key, bound, scale, STREAM: tl.constexpr, KIND: tl.constexpr):
    """The mask of dropout: zero or ``scale``, rounded as that of the eager back end is: both give the same bits."""
    return tl.where(dropped(index, key, bound, STREAM), 0.0, scale).to(KIND).to(tl.float32)


@triton.jit(do_not_specialize=("size", "key", "bound"))
def mask_elements(
    input,
    output,
    size,
    scale,
    key: tl.int64,
    bound: tl.int64,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mask rows of ``size`` elements, every row alike."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = index < size
    mask = mask_of(index, key, bound, scale, STREAM, input.dtype.element_ty)
    x = tl.load(input + row * size + index, mask=within, other=0.0).to(tl.float32)
    tl.store(output + row * size + index, x * mask, mask=within)


def _masked(input: Tensor, probability: float, key: int, stream: int, rows: int) -> Tensor:
    input = input.contiguous()
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    size = input.numel() // rows
    mask_elements[(rows * triton.cdiv(size, BLOCK),)](
        input, output, size, scale(probability), key, threshold(probability), STREAM=stream, BLOCK=BLOCK
    )
    return output


def kept(key: int, stream: int, probability: float, shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """The mask of dropout: zero, or the scale, in the type of ``like``."""
    return _masked(like.new_ones(shape), probability, key, stream, rows=1)


def dropout(input: Tensor, probability: float, key: int, shared: bool) -> Tensor:
    """``input`` times the mask of dropout; with ``shared``, one mask for all steps of the first dimension."""
    return _masked(input, probability, key, ELEMENTS, rows=len(input) if shared else 1)
