"""Text: the documentation that comes with Python, characters as integers, batches for language modelling."""

import re

import torch

from . import _checks


def pydoc_topics(*, unique=True):
    """Text of Python's own language reference, from the standard library's `pydoc_data.topics`.

    These are the pages that ``help("while")`` or ``help("CONVERSION")`` print. Many of them contain each other, so
    about a fifth of the text occurs twice; left in, the copies put parts of a training text into its test text.

    Parameters
    ----------
    unique : bool, default True
        Keep the first copy of each paragraph only; paragraphs that differ in white space alone count as copies.

    Returns
    -------
    str
        The paragraphs in the order of the topics, separated by blank lines. Roughly 370,000 characters, or 460,000 with
        ``unique=False``; the text differs between versions of Python.

    Raises
    ------
    ImportError
        If this Python was packaged without `pydoc_data`.

    Examples
    --------
    >>> from rnnkernels.data import pydoc_topics
    >>> text = pydoc_topics()
    >>> text.splitlines()[0]
    'The "assert" statement'
    >>> 200_000 < len(text) < len(pydoc_topics(unique=False))
    True
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError("this Python was packaged without the standard library's pydoc_data") from error
    paragraphs = [p for topic in topics.values() for p in re.split(r"\n(?:[ \t]*\n)+", topic.strip("\n"))]
    if unique:
        first_copies = {}
        for paragraph in paragraphs:
            first_copies.setdefault(" ".join(paragraph.split()), paragraph)
        paragraphs = first_copies.values()
    return "\n\n".join(paragraphs)


class Vocabulary:
    """Characters as integers and back, with one integer kept for every character not seen before.

    Parameters
    ----------
    characters : iterable of str
        Distinct single characters. The first gets integer 1, the next 2, and so on; 0 stands for an unknown character.

    Attributes
    ----------
    characters : tuple of str
        All characters in the order of their integers, `UNKNOWN` first.

    Raises
    ------
    TypeError, ValueError
        If an entry is not a string of length 1, occurs twice, or is `UNKNOWN` itself.

    Examples
    --------
    >>> from rnnkernels.data import Vocabulary
    >>> vocabulary = Vocabulary.from_text("abracadabra")
    >>> len(vocabulary)                                     # a, b, c, d, r and the unknown character
    6
    >>> vocabulary.encode("bad!")
    tensor([2, 1, 4, 0])
    >>> vocabulary.decode([2, 1, 4, 0])
    'bad�'
    """

    UNKNOWN = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, characters):
        characters = tuple(characters)
        for character in characters:
            if not isinstance(character, str):
                raise TypeError(f"characters must be strings, got {type(character).__name__}")
            if len(character) != 1:
                raise ValueError(f"characters must be single characters, got {character!r}")
        if len(set(characters)) < len(characters):
            raise ValueError("characters must be distinct, got some of them twice")
        if self.UNKNOWN in characters:
            raise ValueError(f"characters must not contain {self.UNKNOWN!r}, which stands for the unknown character")
        self.characters = (self.UNKNOWN, *characters)
        self._index = {character: i for i, character in enumerate(self.characters)}

    @classmethod
    def from_text(cls, text):
        """Vocabulary of the characters that occur in `text`, in sorted order: give it the training part only."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        return cls(sorted(set(text) - {cls.UNKNOWN}))

    def __len__(self):
        return len(self.characters)

    def __repr__(self):
        return f"{type(self).__name__}({''.join(self.characters[1:])!r})"

    def encode(self, text):
        """Integers of the characters of `text`: tensor of shape (len(text),), int64, 0 where unknown."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        return torch.tensor([self._index.get(character, 0) for character in text], dtype=torch.int64)

    def decode(self, tokens):
        """Text of a one-dimensional tensor or list of integers; inverse of `encode` on known characters."""
        tokens = torch.as_tensor(tokens)
        if tokens.numel() == 0:
            return ""
        _checks.tokens(tokens)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= len(self):
            raise ValueError(f"tokens must lie in 0..{len(self) - 1}, got {low}..{high}")
        return "".join(self.characters[token] for token in tokens.tolist())


def token_streams(tokens, batch_size):
    """Lay one long sequence of tokens out as parallel contiguous streams, with the next token as target.

    Column ``b`` of the result is one unbroken piece of the text, and column ``b + 1`` goes on where column ``b`` stops.
    A hidden state may therefore be carried from one chunk of rows to the next; cut chunks with `torch.Tensor.split`.

    Parameters
    ----------
    tokens : torch.Tensor, shape (N,), integer
        The sequence.
    batch_size : int
        Number of streams B, at most ``N - 1``.

    Returns
    -------
    inputs, targets : torch.Tensor, shape (T, B)
        ``targets[t, b]`` is the token after ``inputs[t, b]``; ``T = (N - 1) // B``. The last ``(N - 1) % B``
        tokens, which fill no row, are left out.

    Raises
    ------
    TypeError, ValueError
        If `tokens` is not a one-dimensional integer tensor, or too short for `batch_size` streams.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import token_streams
    >>> inputs, targets = token_streams(torch.arange(10), batch_size=3)
    >>> inputs.T
    tensor([[0, 1, 2],
            [3, 4, 5],
            [6, 7, 8]])
    >>> targets.T
    tensor([[1, 2, 3],
            [4, 5, 6],
            [7, 8, 9]])
    >>> [chunk.shape for chunk in inputs.split(2)]         # chunks of at most 2 steps, in order
    [torch.Size([2, 3]), torch.Size([1, 3])]
    """
    _checks.tokens(tokens)
    _checks.positive_int("batch_size", batch_size)
    steps = (len(tokens) - 1) // batch_size
    if steps < 1:
        raise ValueError(f"tokens must hold at least batch_size + 1 = {batch_size + 1} tokens, got {len(tokens)}")
    used = steps * batch_size
    inputs = tokens[:used].view(batch_size, steps).T.contiguous()
    targets = tokens[1 : used + 1].view(batch_size, steps).T.contiguous()
    return inputs, targets


def token_windows(tokens, length, batch_size, *, generator=None):
    """One batch of windows that start at random places of a sequence of tokens, with the next token as target.

    Parameters
    ----------
    tokens : torch.Tensor, shape (N,), integer
        The sequence; ``N > length``.
    length : int
        Steps T of each window.
    batch_size : int
        Number of windows B; every start is drawn uniformly, with replacement.
    generator : torch.Generator, optional
        Source of the random starts, a CPU generator; the global one by default.

    Returns
    -------
    inputs, targets : torch.Tensor, shape (T, B)
        ``targets[t, b]`` is the token after ``inputs[t, b]``.

    Raises
    ------
    TypeError, ValueError
        If `tokens` is not a one-dimensional integer tensor, or not longer than `length`.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import token_windows
    >>> inputs, targets = token_windows(torch.arange(100), length=8, batch_size=4)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([8, 4]), True)
    """
    _checks.tokens(tokens)
    _checks.positive_int("length", length)
    _checks.positive_int("batch_size", batch_size)
    if len(tokens) <= length:
        raise ValueError(f"tokens must hold more than length = {length} tokens, got {len(tokens)}")
    starts = torch.randint(len(tokens) - length, (batch_size,), generator=generator).to(tokens.device)
    places = starts + torch.arange(length + 1, device=tokens.device)[:, None]
    windows = tokens[places]
    return windows[:-1], windows[1:]
