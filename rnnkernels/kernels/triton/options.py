"""What the options of a cell do to a step, for the step's own kernels and for those of the persistent design.

Where a tensor is not given, a constant stands for it, so that each equation is written once.
"""

import triton
import triton.language as tl

from rnnkernels.kernels.eager import random
from rnnkernels.kernels.triton.random import dropped

DRAWN = ("key", "zoneout", "zoneout_cell")
"""Arguments of masks, on whose value no kernel is specialized."""

STATE, CELL = tl.constexpr(random.ZONEOUT), tl.constexpr(random.ZONEOUT_CELL)
"""Streams of the masks of zoneout."""


@triton.jit
def at(time, batch, rows):
    """Rows of a sequence, seen as (sequence_length * batch, size)."""
    return tl.cast(time, tl.int64) * batch + rows


@triton.jit
def read(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def is_reset(reset, time, rows, batch, within):
    """Whether these rows start from a state of zero; ``within`` says which there are."""
    if reset is None:
        return tl.zeros_like(rows) != 0
    else:
        return tl.load(reset + at(time, batch, rows), mask=within, other=0) != 0


@triton.jit
def forget(state, cleared):
    """A state, or its gradient, where no reset has cleared it."""
    return tl.where(cleared, 0.0, state)


@triton.jit
def factor_of(recurrent_mask, offsets, mask):
    """What recurrent dropout multiplies the state by."""
    if recurrent_mask is None:
        return tl.full(offsets.shape, 1.0, tl.float32)
    else:
        return read(recurrent_mask + offsets, mask)


@triton.jit
def as_read(state, factor, cleared):
    """A state, as a product reads it; or the gradient of the state, from that of what was read."""
    return forget(state.to(tl.float32) * factor, cleared)


@triton.jit
def probability_of(bound):
    """What a mask drawn with this bound drops: see ``rnnkernels.kernels.triton.random``."""
    return bound.to(tl.float32) * (1.0 / 4294967296.0)


@triton.jit
def zone_out(old, new, index, key, bound, STREAM: tl.constexpr, ZONEOUT: tl.constexpr):
    """``old`` where the mask says so, else ``new``; or the expectation of that."""
    if ZONEOUT == "drawn":
        return tl.where(dropped(index, key, bound, STREAM), old, new)
    elif ZONEOUT == "expected":
        return new + probability_of(bound) * (old - new)
    else:
        return new


@triton.jit
def through_zoneout(gradient, index, key, bound, STREAM: tl.constexpr, ZONEOUT: tl.constexpr):
    """Gradients of the old and of the new state."""
    if ZONEOUT == "drawn":
        stays = dropped(index, key, bound, STREAM)
        return tl.where(stays, gradient, 0.0), tl.where(stays, 0.0, gradient)
    elif ZONEOUT == "expected":
        old = probability_of(bound) * gradient
        return old, gradient - old
    else:
        return tl.zeros_like(gradient), gradient
