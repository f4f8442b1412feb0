"""One direction of a layer, or both in one launch.

A recurrence takes ``reverse``: False, True, or None for both directions. These know nothing of each other. All tensors
but ``lengths`` then have a leading dimension, the reversed direction second, and so has the grid of the kernels at its
end: a *lane* for each direction. A kernel for two lanes learns its direction from its lane; for one, it is constant.

Where no design holds two lanes, one direction runs after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def lane_and_direction(REVERSE: tl.constexpr):
    """The lane of a program, and whether its steps run from the last to the first."""
    if REVERSE is None:
        lane = tl.program_id(2)
        return lane, lane == 1
    else:
        return 0, REVERSE


def lanes_of(reverse: bool | None) -> int:
    """Directions that run."""
    return 2 if reverse is None else 1


def last_taken(sequence: Tensor, reverse: bool | None) -> Tensor:
    """What stands at the last step taken."""
    if reverse is None:
        return torch.stack((sequence[0, -1], sequence[1, 0]))
    return sequence[0 if reverse else -1]
