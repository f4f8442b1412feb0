"""Matrix products on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch multiplies float32 matrices with MKL, which uses vectors of 256 bits on AMD's processors. On one whose units
take 512 at once, oneDNN took half the time, but more to start: it was ahead from two million multiplications. On one of
family 25 (Zen 4), whose units take 512 bits in two turns, it is ahead by a fifth from eight million, in the products of
single steps; in those of whole sequences MKL is as fast, and takes half the time where rows are strided.
"""

import functools
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

from rnnkernels.kernels.eager.memory import empty

_ENOUGH = 2_000_000
"""Multiplications from which oneDNN is worth its start, where it is twice as fast."""

_ENOUGH_IN_A_STEP = 8_000_000
"""The same for the product of a step, where it is a fifth faster."""

ENOUGH_COLUMNS = 256
"""Multiplications of each element that pay for copying a matrix whose rows are not contiguous, as oneDNN must."""


@functools.cache
def _onednn_gains() -> tuple[bool, bool]:
    """Whether oneDNN multiplies faster than MKL on this processor: at all, and much so."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False, False
    description = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        with cpuinfo.open() as file:
            description += file.read(4096)
    return _vectors(description)


def _vectors(description: str) -> tuple[bool, bool]:
    """Whether a description names an AMD processor with vectors of 512 bits, and with units as wide."""
    found = re.search(r"family\s*:?\s*(\d+)", description, re.IGNORECASE)
    family = int(found.group(1)) if found and "AuthenticAMD" in description else 0
    return family >= 26 or (family == 25 and "avx512f" in description), family >= 26


def _by_onednn(rows: float, inner: int, columns: int, operand: Tensor, *, in_a_step: bool = False) -> bool:
    if operand.dtype != torch.float32 or operand.device.type != "cpu":
        return False
    multiplications, (faster, much_faster) = rows * inner * columns, _onednn_gains()
    return (much_faster and multiplications >= _ENOUGH) or (
        in_a_step and faster and multiplications >= _ENOUGH_IN_A_STEP
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """input weight^T + bias, of matrices: in ``out``, or as a new tensor."""
    rows, inner = input.shape
    pays = (input.is_contiguous() or weight.shape[0] >= ENOUGH_COLUMNS) and (out is None or inner > ENOUGH_COLUMNS)
    if pays and _by_onednn(rows, inner, weight.shape[0], input):
        product = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    out = empty((rows, weight.shape[0]), input.dtype, input.device) if out is None else out
    if bias is None:
        return torch.mm(input, weight.t(), out=out)
    return torch.addmm(bias, input, weight.t(), out=out)


def add_linear(addend: Tensor, input: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """addend + input weight^T, of matrices, in ``out``."""
    if _by_onednn(*input.shape, weight.shape[0], input, in_a_step=True):
        return out.copy_(torch.ops.mkldnn._linear_pointwise.binary(input, addend, weight, None, "add"))
    return torch.addmm(addend, input, weight.t(), out=out)


def wants_contiguous_rows(columns: int) -> bool:
    """Whether a product with so many columns gains more from contiguous rows than it costs to copy them."""
    return columns >= ENOUGH_COLUMNS and _onednn_gains()[1]


def by_onednn(state: Tensor, weight: Tensor) -> bool:
    """Whether the product of a state with recurrent weights is oneDNN's."""
    return _by_onednn(len(state), *weight.shape[::-1], weight, in_a_step=True)


_PARTS_PAY = 8, 2**19
"""Rows up to which, and elements of the matrix from which, a step's product is faster in parts, one for each thread.

MKL leaves the product of one row to one thread, and those of a few it divides badly. With the copies that they take,
halves needed 0.6 to 0.8 of the time (family 25, 2 threads, 1 to 8 rows, 1536 by 512); at 768 by 256, 0.85 to 1.1.
"""


class Recurrent:
    """The product of every step's state with the same matrix: ``addend + state weight^T``.

    ``rows`` is how many a state has, in the mean over the steps.
    """

    def __init__(self, weight: Tensor, rows: float):
        self.by_onednn = _by_onednn(rows, weight.shape[1], weight.shape[0], weight, in_a_step=True)
        self.weight = weight.contiguous() if self.by_onednn else weight
        self.weight_t = weight.t()
        threads = torch.get_num_threads()
        most_rows, enough = _PARTS_PAY
        in_parts = rows <= most_rows and weight.numel() >= enough and weight.shape[0] % threads == 0
        self.parts = threads if in_parts else 1
        self.weights_t = weight.unflatten(0, (threads, -1)).transpose(1, 2) if in_parts else None

    def __call__(self, state: Tensor, addend: Tensor, out: Tensor) -> Tensor:
        """The sum: in ``out``, or in a new tensor, whichever is faster."""
        if self.by_onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(state, addend, self.weight, None, "add")
        if self.parts == 1:
            return torch.addmm(addend, state, self.weight_t, out=out)
        columns = out.unflatten(1, (self.parts, -1)).transpose(0, 1)
        states = state.expand(self.parts, *state.shape)
        if len(state) == 1 and addend is out:
            torch.baddbmm(columns, states, self.weights_t, out=columns)
        else:
            addends = addend.unflatten(1, (self.parts, -1)).transpose(0, 1)
            columns.copy_(torch.baddbmm(addends, states, self.weights_t))
        return out
