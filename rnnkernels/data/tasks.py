"""Synthetic tasks that ask for one kind of memory each, at any length."""

import math
from typing import NamedTuple

import torch

from . import _checks

IGNORED = -100
"""Target where nothing is asked: the default ``ignore_index`` of `torch.nn.functional.cross_entropy`."""


class Batch(NamedTuple):
    """Sequences of a task, time first, shorter ones padded at the end."""

    input: torch.Tensor
    """(T, B) int64 tokens; (T, B, 2) float32 for `adding_problem`. Zero in the padding."""
    target: torch.Tensor
    """(T, B) int64, `IGNORED` where nothing is asked; (B,) float32 for `adding_problem`."""
    lengths: torch.Tensor
    """(B,) int64: steps of each sequence."""


def copying_memory(batch, delay, symbols=10, alphabet=8, generator=None):
    """Remember a string over a long silence, then repeat it.

    A string of `symbols` random tokens is followed by `delay` blanks. Then a cue comes, and from the cue's step on the
    string is to be repeated, one token a step: the sequence has ``delay + 2 * symbols`` steps, of which the last
    `symbols` are asked. (Earlier steps, where the classical target is a blank, are not: they cost nothing to answer.)

    Parameters
    ----------
    batch : int
        Sequences B.
    delay : int or (int, int)
        Blanks before the cue, at least 1; a pair: drawn for each sequence from the first to the second.
    symbols : int, default 10
        Length of the string.
    alphabet : int, default 8
        Tokens 1 to `alphabet` make the string; 0 is the blank and ``alphabet + 1`` the cue, so there are
        ``alphabet + 2`` tokens. Targets are 0 to ``alphabet - 1``: the token less one.
    generator : torch.Generator, optional
        Source of randomness; PyTorch's default one if None.

    Returns
    -------
    Batch
        ``input`` and ``target`` of shape (T, B).

    Notes
    -----
    Trivial score: whoever forgets the string is right with probability ``1 / alphabet``, at a cross-entropy of
    ``log(alphabet)``. `trivial_score` gives both.

    References
    ----------
    S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9, 1997; in this form: M. Arjovsky,
    A. Shah and Y. Bengio, "Unitary evolution recurrent neural networks", ICML 2016, section 4.1.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import copying_memory
    >>> batch = copying_memory(1, delay=3, symbols=2, generator=torch.Generator().manual_seed(0))
    >>> batch.input[:, 0].tolist(), batch.target[-2:, 0].tolist()
    ([8, 6, 0, 0, 0, 9, 0], [7, 5])
    """
    _checks.positive_int("batch", batch)
    _checks.positive_int("symbols", symbols)
    _checks.positive_int("alphabet", alphabet)
    delays = _sizes("delay", delay, batch, generator, least=1)
    string = torch.randint(1, alphabet + 1, (symbols, batch), generator=generator)
    lengths = delays + 2 * symbols
    input = torch.zeros(int(lengths.max()), batch, dtype=torch.int64)
    target = torch.full_like(input, IGNORED)
    input[:symbols] = string
    rows = torch.arange(batch)
    input[symbols + delays, rows] = alphabet + 1
    for i in range(symbols):
        target[symbols + delays + i, rows] = string[i] - 1
    return Batch(input, target, lengths)


def adding_problem(batch, length, generator=None):
    """Add the two marked numbers of a long sequence.

    Each step brings a number, uniform in [0, 1), and a mark. Two steps are marked by a 1, one in each half of the
    sequence; the target is the sum of their numbers.

    Parameters
    ----------
    batch : int
        Sequences B.
    length : int or (int, int)
        Steps, at least 2; a pair: drawn for each sequence from the first to the second.
    generator : torch.Generator, optional
        Source of randomness; PyTorch's default one if None.

    Returns
    -------
    Batch
        ``input`` of shape (T, B, 2), numbers and marks; ``target`` of shape (B,).

    Notes
    -----
    Trivial score: who always answers 1, the mean, has a mean squared error of 1/6, the variance of the sum.

    References
    ----------
    S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9, 1997, experiment 4; in this form:
    Q. V. Le, N. Jaitly and G. E. Hinton, arXiv:1504.00941 (2015), section 4.1.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import adding_problem
    >>> input, target, lengths = adding_problem(4, (10, 20))
    >>> numbers, marks = input.unbind(-1)
    >>> torch.allclose((numbers * marks).sum(0), target), marks.sum(0).tolist()
    (True, [2.0, 2.0, 2.0, 2.0])
    """
    _checks.positive_int("batch", batch)
    lengths = _sizes("length", length, batch, generator, least=2)
    numbers = torch.rand(int(lengths.max()), batch, generator=generator)
    half = lengths // 2
    rows = torch.arange(batch)
    marks = torch.zeros_like(numbers)
    marks[_below(half, generator), rows] = 1
    marks[half + _below(lengths - half, generator), rows] = 1
    numbers = numbers * (torch.arange(len(numbers)).unsqueeze(1) < lengths)
    return Batch(torch.stack([numbers, marks], -1), (numbers * marks).sum(0), lengths)


def parity(batch, length, generator=None):
    """Say at every step whether the number of ones so far is odd.

    One bit of memory that every single input may flip: no fading average of the past will do.

    Parameters
    ----------
    batch : int
        Sequences B.
    length : int or (int, int)
        Steps, at least 1; a pair: drawn for each sequence from the first to the second.
    generator : torch.Generator, optional
        Source of randomness; PyTorch's default one if None.

    Returns
    -------
    Batch
        ``input`` of shape (T, B), bits; ``target`` of shape (T, B), 1 where the count is odd.

    Notes
    -----
    Trivial score: a guess is right half of the time, at a cross-entropy of ``log(2)``. (Where a sequence is only
    judged by its last step, use ``target[lengths - 1, range(B)]``.)

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import parity
    >>> batch = parity(1, 6, generator=torch.Generator().manual_seed(1))
    >>> batch.input[:, 0].tolist(), batch.target[:, 0].tolist()
    ([1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 0])
    """
    _checks.positive_int("batch", batch)
    lengths = _sizes("length", length, batch, generator, least=1)
    input = torch.randint(0, 2, (int(lengths.max()), batch), generator=generator)
    past_end = torch.arange(len(input)).unsqueeze(1) >= lengths
    input = input.masked_fill(past_end, 0)
    return Batch(input, (input.cumsum(0) % 2).masked_fill(past_end, IGNORED), lengths)


def dyck_language(batch, length, kinds=2, depth=4, generator=None):
    """Close brackets in the order in which they must close: a stack, of bounded depth.

    Sequences are balanced strings of `kinds` kinds of brackets, never nested more than `depth` deep. At every step that
    is followed by a closing bracket, the target is its kind: which is decided by the brackets that are open.

    Parameters
    ----------
    batch : int
        Sequences B.
    length : int or (int, int)
        Steps, an even number of at least 2; a pair: drawn for each sequence among the even numbers from the first to
        the second.
    kinds : int, default 2
        Tokens 0 to ``kinds - 1`` open, ``kinds`` to ``2 * kinds - 1`` close. Targets are 0 to ``kinds - 1``.
    depth : int, default 4
        Most brackets that are open at once.
    generator : torch.Generator, optional
        Source of randomness; PyTorch's default one if None.

    Returns
    -------
    Batch
        ``input`` and ``target`` of shape (T, B). Padding is 0, which is also a bracket: mind ``lengths``.

    Notes
    -----
    Where both are possible, a bracket opens or closes with equal probability. Trivial score: who does not look at the
    stack is right with probability ``1 / kinds``, at a cross-entropy of ``log(kinds)``. Who knows the last token alone
    does better: a bracket that has just been opened is the next to close.

    References
    ----------
    J. Hewitt, M. Hahn, S. Ganguli, P. Liang and C. D. Manning, "RNNs can generate bounded hierarchical languages with
    optimal memory", EMNLP 2020.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import dyck_language
    >>> batch = dyck_language(1, 10, generator=torch.Generator().manual_seed(3))
    >>> "".join("([)]"[token] for token in batch.input[:, 0])
    '([[()()]])'
    >>> batch.target[:, 0].tolist()
    [-100, -100, -100, 0, -100, 0, 1, 1, 0, -100]
    """
    _checks.positive_int("batch", batch)
    _checks.positive_int("kinds", kinds)
    _checks.positive_int("depth", depth)
    lengths = _sizes("length", length, batch, generator, least=2, even=True)
    steps = int(lengths.max())
    kind = torch.randint(0, kinds, (steps, batch), generator=generator)
    chance = torch.rand(steps, batch, generator=generator)
    rows = torch.arange(batch)
    stack = torch.zeros(depth + 1, batch, dtype=torch.int64)
    height = torch.zeros(batch, dtype=torch.int64)
    input = torch.zeros(steps, batch, dtype=torch.int64)
    target = torch.full_like(input, IGNORED)
    for t in range(steps):
        active = t < lengths
        may_open = (height < depth) & (height < lengths - t)
        opens = may_open & ((height == 0) | (chance[t] < 0.5))
        top = stack[(height - 1).clamp(min=0), rows]
        input[t] = torch.where(opens, kind[t], top + kinds).where(active, 0)
        if t > 0:
            target[t - 1] = top.where(active & ~opens, IGNORED)
        stack[height, rows] = torch.where(opens, kind[t], stack[height, rows])
        height = torch.where(active, height + torch.where(opens, 1, -1), 0)
    return Batch(input, target, lengths)


def selective_recall(batch, pairs, keys=16, values=16, queries=None, generator=None):
    """Look up what was said of a key: associative recall among many pairs.

    `pairs` different keys come, each followed by its value; then some of the keys again, each as a question at whose
    step its value is asked.

    Parameters
    ----------
    batch : int
        Sequences B.
    pairs : int or (int, int)
        Pairs to remember, at most `keys`; a pair: drawn for each sequence from the first to the second.
    keys, values : int, default 16
        Tokens 0 to ``keys - 1`` are keys, ``keys`` to ``keys + values - 1`` are values, and ``keys + values`` stands
        between the pairs and the questions. Targets are 0 to ``values - 1``.
    queries : int, optional
        Questions, at most as many as the fewest pairs; all pairs of a sequence if None.
    generator : torch.Generator, optional
        Source of randomness; PyTorch's default one if None.

    Returns
    -------
    Batch
        ``input`` and ``target`` of shape (T, B); a sequence of n pairs has ``2 * n + 1 + queries`` steps.

    Notes
    -----
    Trivial score: a guess is right with probability ``1 / values``, at a cross-entropy of ``log(values)``.

    References
    ----------
    J. Ba, G. Hinton, V. Mnih, J. Z. Leibo and C. Ionescu, "Using fast weights to attend to the recent past", NeurIPS
    2016, section 4.1; with several questions: S. Arora et al., "Zoology", ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import selective_recall
    >>> batch = selective_recall(1, 2, keys=4, values=4, generator=torch.Generator().manual_seed(0))
    >>> batch.input[:, 0].tolist(), batch.target[-2:, 0].tolist()
    ([3, 7, 0, 7, 8, 0, 3], [3, 3])
    """
    _checks.positive_int("batch", batch)
    _checks.positive_int("keys", keys)
    _checks.positive_int("values", values)
    numbers = _sizes("pairs", pairs, batch, generator, least=1)
    if numbers.max() > keys:
        raise ValueError(f"pairs must be at most keys = {keys}, got {int(numbers.max())}")
    if queries is not None:
        _checks.positive_int("queries", queries)
        if queries > numbers.min():
            raise ValueError(f"queries must be at most the fewest pairs, {int(numbers.min())}, got {queries}")
    asked = numbers if queries is None else torch.full_like(numbers, queries)
    lengths = 2 * numbers + 1 + asked
    input = torch.zeros(int(lengths.max()), batch, dtype=torch.int64)
    target = torch.full_like(input, IGNORED)
    for b, (number, count) in enumerate(zip(numbers.tolist(), asked.tolist(), strict=True)):
        key = torch.randperm(keys, generator=generator)[:number]
        value = torch.randint(0, values, (number,), generator=generator)
        question = torch.randperm(number, generator=generator)[:count]
        input[: 2 * number, b] = torch.stack([key, keys + value], 1).flatten()
        input[2 * number, b] = keys + values
        input[2 * number + 1 : 2 * number + 1 + count, b] = key[question]
        target[2 * number + 1 : 2 * number + 1 + count, b] = value[question]
    return Batch(input, target, lengths)


def trivial_score(task, **options):
    """What a task's score is without any memory, to draw beside a model's.

    Parameters
    ----------
    task : {"copying_memory", "adding_problem", "parity", "dyck_language", "selective_recall"}
    **options
        Of the task, where they differ from its defaults: ``alphabet``, ``kinds``, ``values``.

    Returns
    -------
    dict[str, float]
        ``"accuracy"`` and ``"cross_entropy"`` (in nats) of a uniform guess; ``"mean_squared_error"`` of the best
        constant for the adding problem.

    Examples
    --------
    >>> from rnnkernels.data import trivial_score
    >>> trivial_score("copying_memory", alphabet=8)
    {'accuracy': 0.125, 'cross_entropy': 2.0794415416798357}
    """
    if task == "adding_problem":
        return {"mean_squared_error": 1 / 6}
    sizes = {
        "copying_memory": ("alphabet", 8),
        "parity": ("", 2),
        "dyck_language": ("kinds", 2),
        "selective_recall": ("values", 16),
    }
    if task not in sizes:
        raise ValueError(f"task must be one of {', '.join(map(repr, [*sizes, 'adding_problem']))}, got {task!r}")
    name, default = sizes[task]
    classes = options.get(name, default)
    return {"accuracy": 1 / classes, "cross_entropy": math.log(classes)}


def _sizes(name, value, batch, generator, least, even=False):
    """A size for each sequence of the batch: `value`, or drawn between two bounds."""
    bounds = value if isinstance(value, (tuple, list)) else (value, value)
    if len(bounds) != 2:
        raise ValueError(f"{name} must be an int or a pair, got {len(bounds)} values")
    for bound in bounds:
        _checks.positive_int(name, bound)
    low, high = bounds
    if low < least or high < low:
        raise ValueError(f"{name} must be at least {least}, and a pair in ascending order, got {value}")
    step = 2 if even else 1
    if even and (low % 2 or high % 2):
        raise ValueError(f"{name} must be even, got {value}")
    return low + step * torch.randint(0, (high - low) // step + 1, (batch,), generator=generator)


def _below(bounds, generator):
    """For each bound, a random integer from 0 to one less."""
    return (torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds).long()
