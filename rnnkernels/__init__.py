"""Recurrent networks on Triton kernels, with PyTorch where there is no GPU: drop-ins for ``torch.nn``'s."""

import importlib

from rnnkernels import clip, nn, ops, reference
from rnnkernels._backend import use_backend
from rnnkernels.clip import *  # noqa: F403
from rnnkernels.nn import *  # noqa: F403

__version__ = "0.1.0"

_LAZY = ("data", "diagnostics", "init", "optim", "training")

__all__ = [*clip.__all__, *nn.__all__, *_LAZY, "nn", "ops", "reference", "use_backend"]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"rnnkernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
