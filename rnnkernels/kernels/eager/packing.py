"""A batch of sequences as a matrix: the rows of the first step, then those of the second, and so on.

Sequences of different lengths lie there without their padding. Sorted by length, longest first, those that still run at
a step are its first rows, so that a step is a slice.
"""

import itertools

import torch
from torch import Tensor

from rnnkernels.kernels.eager.products import linear


class Whole:
    """The rows of sequences of one length."""

    def __init__(self, sequence_length: int, batch: int):
        self.shape = sequence_length, batch
        self.counts = [batch] * sequence_length
        """Rows of each step."""

    def packed(self, padded: Tensor) -> Tensor:
        """The rows, (rows, features), of (sequence_length, batch, features)."""
        return padded.flatten(0, 1)

    def padded(self, packed: Tensor) -> Tensor:
        """Back to (sequence_length, batch, features), with zeros in the padding."""
        return packed.unflatten(0, self.shape)

    def sorted(self, state: Tensor) -> Tensor:
        """A state, (batch, features), in the order of the rows."""
        return state

    def unsorted(self, state: Tensor) -> Tensor:
        """Back to the order of the batch."""
        return state


class Packing(Whole):
    """The rows of sequences of different lengths."""

    def __init__(self, lengths: Tensor, sequence_length: int):
        super().__init__(sequence_length, len(lengths))
        self.order = torch.argsort(lengths, descending=True, stable=True)
        self.inverse = torch.argsort(self.order)
        steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
        runs = lengths[self.order] > steps
        self.counts = runs.sum(1).tolist()
        self.rows = (steps * len(lengths) + self.order)[runs]

    def packed(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.rows)

    def padded(self, packed: Tensor) -> Tensor:
        sequence_length, batch = self.shape
        padded = packed.new_zeros(sequence_length * batch, packed.shape[-1])
        return padded.index_copy_(0, self.rows, packed).unflatten(0, self.shape)

    def sorted(self, state: Tensor) -> Tensor:
        return state.index_select(0, self.order)

    def unsorted(self, state: Tensor) -> Tensor:
        return state.index_select(0, self.inverse)


def packing(lengths: Tensor | None, sequence_length: int, batch: int) -> Whole:
    """The rows of a batch; ``lengths`` is None where all sequences have ``sequence_length`` steps."""
    return Whole(sequence_length, batch) if lengths is None else Packing(lengths, sequence_length)


def previous_rows(
    states: Tensor, h_0: Tensor, counts: list[int], starts: list[int], steps: slice, reverse: bool
) -> Tensor:
    """The state before each of some steps, from the row at which each step starts. A view where that will do."""
    batch, (start, stop) = counts[0], (steps.start, steps.stop)
    if counts[-1] == batch:
        first, last = start * batch, stop * batch
        if reverse:
            whole = stop < len(counts)
            return states[first + batch : last + batch] if whole else torch.cat([states[first + batch :], h_0])
        return states[first - batch : last - batch] if start else torch.cat([h_0, states[: last - batch]])
    pieces = []
    for t in range(start, stop):
        earlier = t + 1 if reverse else t - 1
        known = min(counts[earlier], counts[t]) if 0 <= earlier < len(counts) else 0
        pieces += [states[starts[earlier] : starts[earlier] + known]] if known else []
        pieces += [h_0[known : counts[t]]] if known < counts[t] else []
    return torch.cat(pieces) if pieces else states[:0]


def recurrent_weight_gradient(
    gradient: Tensor, states: Tensor, h_0: Tensor, counts: list[int], reverse: bool
) -> Tensor:
    r"""The gradient of $W_{hh}$: $\sum_t \delta_t h_{t-1}^\top$, where $\delta_t$ is the gradient of $a_t$."""
    batch = counts[0]
    if counts[-1] < batch:
        starts, steps = [0, *itertools.accumulate(counts)], slice(0, len(counts))
        return linear(gradient.t(), previous_rows(states, h_0, counts, starts, steps, reverse).t())
    size = len(gradient) - batch
    if reverse:
        later, earlier, first = gradient[:size], states[batch:], gradient[size:]
    else:
        later, earlier, first = gradient[batch:], states[:size], gradient[:batch]
    return linear(later.t(), earlier.t()).addmm_(first.t(), h_0)
