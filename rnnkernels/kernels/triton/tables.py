"""What kernels share that find their tensors through a table of addresses in the GPU's memory."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import triton.language as tl

KEPT = 64
"""Tables, or graphs, of each kind that are kept."""

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def kept(cache: OrderedDict, key: tuple, make: Callable[[], object]):
    """What the cache holds for the key; made where it holds nothing, and the entry longest unused makes room."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > KEPT:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
