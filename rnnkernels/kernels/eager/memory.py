"""Memory for large results."""

import ctypes
import functools
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_LARGE = 2**22
"""Bytes from which the C library returns freed memory to the system, so that every call touches fresh pages."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, in huge pages where it is large: on Linux, touching small ones costs more than filling them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    if device.type == "cpu" and advise is not None and tensor.nbytes >= _LARGE:
        start = math.ceil(tensor.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice only: where the system doesn't take it, pages stay small.
        advise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, where the system has huge pages to give."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
