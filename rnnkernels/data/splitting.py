"""Training, validation and test parts of one sequence."""

import math


def split(sequence, fractions=(0.8, 0.1, 0.1)):
    """Cut a sequence, in order, into consecutive parts.

    A sequence is never shuffled before it is split: neighbours resemble each other, and a shuffled test part would sit
    between its own answers.

    Parameters
    ----------
    sequence : str, list, tuple or torch.Tensor
        Anything with a length that can be sliced; a tensor is cut along its first dimension.
    fractions : sequence of float, default (0.8, 0.1, 0.1)
        Share of each part; positive, summing to 1. Part ``i`` ends at ``round(N * sum(fractions[:i + 1]))``.

    Returns
    -------
    tuple
        As many slices of `sequence` as there are fractions; joined, they give `sequence` again.

    Raises
    ------
    TypeError
        If `sequence` has no length or cannot be sliced (a dict, a generator).
    ValueError
        If the fractions are not positive, do not sum to 1, or leave a part empty.

    Examples
    --------
    >>> from rnnkernels.data import split
    >>> split("abcdefghij")
    ('abcdefgh', 'i', 'j')
    >>> train, test = split(list(range(10)), fractions=(0.7, 0.3))
    >>> len(train), len(test)
    (7, 3)
    """
    if not hasattr(sequence, "__len__") or not hasattr(sequence, "__getitem__") or hasattr(sequence, "keys"):
        raise TypeError(f"sequence must have a length and allow slicing, got {type(sequence).__name__}")
    fractions = tuple(fractions)
    if not fractions or not all(f > 0 for f in fractions) or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"fractions must be positive numbers that sum to 1, got {fractions}")
    ends = [round(len(sequence) * sum(fractions[: i + 1])) for i in range(len(fractions))]
    starts = [0, *ends[:-1]]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"sequence of length {len(sequence)} is too short for {len(fractions)} non-empty parts")
    return tuple(sequence[start:end] for start, end in zip(starts, ends, strict=True))
