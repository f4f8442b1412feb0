"""What is done for both directions of a layer, whose tensors lie along a leading dimension, the reversed one second."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def each_direction(
    run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], *others
) -> list[tuple[Tensor, Tensor]]:
    """What ``run`` returns for one direction after the other, in pairs.

    It takes each direction's part of ``tensors``, then ``others``, and ``reverse``.
    """
    parts = zip(*((None, None) if tensor is None else tensor.unbind(0) for tensor in tensors), strict=True)
    return list(zip(*(run(*part, *others, reverse=bool(d)) for d, part in enumerate(parts)), strict=True))


def one_after_the_other(
    run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], *others
) -> list[Tensor]:
    """What :func:`each_direction` returns, along a leading dimension."""
    return [torch.stack(both) for both in each_direction(run, tensors, *others)]
