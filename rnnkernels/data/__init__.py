"""Data sets that need no download, and what a recurrent network needs around them.

Text comes as one long string, turned into integer tokens by a `Vocabulary`, divided in order by `split`, and cut into
batches by `token_streams` (contiguous, so that a hidden state can be carried on) or `token_windows` (random places).
Time series come as tensors, scaled by a `Standardizer` that has seen the training part only, and cut into past and
future by `forecast_windows`. Synthetic tasks (`copying_memory`, `adding_problem`, `parity`, `dyck_language`,
`selective_recall`) come in batches of any length, each with its `trivial_score`. Every batch is time first, ``(T, B)``
or ``(T, B, F)``, as `torch.nn.RNN` expects it.
"""

from .series import Standardizer, forecast_windows, sunspots
from .splitting import split
from .tasks import adding_problem, copying_memory, dyck_language, parity, selective_recall, trivial_score
from .text import Vocabulary, pydoc_topics, token_streams, token_windows

__all__ = [
    "Standardizer",
    "Vocabulary",
    "adding_problem",
    "copying_memory",
    "dyck_language",
    "forecast_windows",
    "parity",
    "pydoc_topics",
    "selective_recall",
    "split",
    "sunspots",
    "token_streams",
    "token_windows",
    "trivial_score",
]
