"""What the recurrences share where the sequences of a batch differ in length."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def padding(lengths: Tensor, sequence_length: int) -> Tensor:
    """True at the steps after the end of each sequence, of shape (sequence_length, batch, 1)."""
    steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
    return (lengths <= steps).unsqueeze(-1)


def reversed_within(lengths: Tensor, sequence_length: int) -> Tensor:
    """For each step, the step that takes its place when every sequence is read backwards: (sequence_length, batch)."""
    steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
    return torch.where(steps < lengths, lengths - 1 - steps, steps)


def before(sequence: Tensor, initial: Tensor, lengths: Tensor | None, reverse: bool, steps: slice) -> Tensor:
    """The state before each of some steps, from the states after all steps. A view where that will do."""
    start, stop = steps.start, steps.stop
    if not reverse:
        return sequence[start - 1 : stop - 1] if start else torch.cat([initial.unsqueeze(0), sequence[: stop - 1]])
    whole = stop < len(sequence)
    earlier = sequence[start + 1 : stop + 1] if whole else torch.cat([sequence[start + 1 :], initial.unsqueeze(0)])
    if lengths is not None:
        # Where a shorter sequence begins, the state of the step after holds padding.
        first = torch.arange(start + 1, stop + 1, device=lengths.device).unsqueeze(1) == lengths
        earlier = torch.where(first.unsqueeze(-1), initial, earlier)
    return earlier


_IN_CACHE = 2**16
"""Elements of a sequence that are worked on at once, so that they are still in a cache when they are needed again."""


def blocks(counts: list[int], width: int, from_the_first: bool, elements: int | None = None) -> list[slice]:
    """Steps in blocks of about as many elements as a cache holds; ``width`` is that of a row."""
    size = max(1, (elements or _IN_CACHE) // max(1, width * max(counts)))
    slices = [slice(start, min(start + size, len(counts))) for start in range(0, len(counts), size)]
    return slices if from_the_first else slices[::-1]


def order_of_steps(sequence_length: int, reverse: bool) -> range:
    """The steps in the order in which they are taken."""
    return range(sequence_length - 1, -1, -1) if reverse else range(sequence_length)


_VIEWS = 256
"""Views that exist at once: some thousand more objects, and Python's collector looks through everything there is."""


def each_step(
    sequences: Sequence[Tensor], counts: list[int], steps: slice, reverse: bool
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each of some steps, in the order in which it is taken, with its rows of every sequence.

    The sequences begin with the first of ``steps``.
    """
    offsets = [0, *itertools.accumulate(counts[steps])]
    size = max(1, _VIEWS // len(sequences))
    pieces = [(first, min(first + size, len(offsets) - 1)) for first in range(0, len(offsets) - 1, size)]
    for first, last in reversed(pieces) if reverse else pieces:
        rows, taken = slice(offsets[first], offsets[last]), range(steps.start + first, steps.start + last)
        views = list(zip(*(sequence[rows].split([counts[t] for t in taken]) for sequence in sequences), strict=True))
        yield from zip(taken[:: -1 if reverse else 1], views[:: -1 if reverse else 1], strict=True)


def joined(carried: Tensor, initial: Tensor, final: Tensor, count: int) -> Tensor:
    """What a step of ``count`` rows starts from: ``carried``, less the rows that end here, which go to ``final``.

    Rows that begin here come from ``initial``.
    """
    if len(carried) < count:
        return torch.cat([carried, initial[len(carried) : count]]) if len(carried) else initial[:count]
    if len(carried) > count:
        final[count : len(carried)] = carried[count:]
    return carried[:count] if len(carried) > count else carried
