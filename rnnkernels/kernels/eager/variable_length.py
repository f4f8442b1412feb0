"""What the recurrences share where the sequences of a batch differ in length."""

import torch
from torch import Tensor


def running(lengths: Tensor, sequence_length: int) -> list[int]:
    """How many sequences are still running at each step."""
    steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
    return (lengths > steps).sum(1).tolist()


def padding(lengths: Tensor, sequence_length: int) -> Tensor:
    """True at the steps after the end of each sequence, of shape (sequence_length, batch, 1)."""
    steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
    return (lengths <= steps).unsqueeze(-1)


def descending(lengths: Tensor) -> Tensor | None:
    """The order that sorts the batch by length, longest first; None where it is sorted already."""
    if bool((lengths[:-1] >= lengths[1:]).all()):
        return None
    return torch.argsort(lengths, descending=True, stable=True)


def before(sequence: Tensor, initial: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step, from the states after it."""
    if not reverse:
        return torch.cat([initial.unsqueeze(0), sequence[:-1]])
    earlier = torch.cat([sequence[1:], initial.unsqueeze(0)])
    if lengths is not None:
        # Where a shorter sequence begins, the state of the step after holds padding.
        first = torch.arange(1, sequence.shape[0] + 1, device=lengths.device).unsqueeze(1) == lengths
        earlier = torch.where(first.unsqueeze(-1), initial, earlier)
    return earlier


_IN_CACHE = 2**16
"""Elements of a sequence that are worked on at once, so that they are still in a cache when they are needed again."""


def blocks(sequence_length: int, step_size: int, forward: bool) -> list[slice]:
    """Steps in blocks of about as many elements as a cache holds, from the first or from the last."""
    size = max(1, _IN_CACHE // max(1, step_size))
    starts = range(0, sequence_length, size)
    slices = [slice(start, min(start + size, sequence_length)) for start in starts]
    return slices if forward else slices[::-1]
