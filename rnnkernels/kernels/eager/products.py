"""Matrix products on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch multiplies float32 matrices with MKL, which leaves the wider vector units of AMD's processors idle. There oneDNN
takes half the time, but more to start: measured on one, it is ahead from about two million multiplications.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

_ENOUGH = 2_000_000
"""Multiplications from which oneDNN is worth its start."""

ENOUGH_COLUMNS = 256
"""Multiplications of each element that pay for copying a matrix whose rows are not contiguous, as oneDNN must."""


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether this is a processor on which oneDNN multiplies faster than MKL."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    description = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        with cpuinfo.open() as file:
            description += file.read(4096)
    return "AuthenticAMD" in description


def _by_onednn(rows: float, inner: int, columns: int, operand: Tensor) -> bool:
    return (
        rows * inner * columns >= _ENOUGH
        and operand.dtype == torch.float32
        and operand.device.type == "cpu"
        and _onednn_is_faster()
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """input weight^T + bias, of matrices: in ``out``, or as a new tensor."""
    rows, inner = input.shape
    pays = (input.is_contiguous() or weight.shape[0] >= ENOUGH_COLUMNS) and (out is None or inner > ENOUGH_COLUMNS)
    if pays and _by_onednn(rows, inner, weight.shape[0], input):
        product = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    if bias is None:
        return torch.mm(input, weight.t(), out=out)
    return torch.addmm(bias, input, weight.t(), out=out)


def add_linear(addend: Tensor, input: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """addend + input weight^T, of matrices, in ``out``."""
    if _by_onednn(*input.shape, weight.shape[0], input):
        return out.copy_(torch.ops.mkldnn._linear_pointwise.binary(input, addend, weight, None, "add"))
    return torch.addmm(addend, input, weight.t(), out=out)


def by_onednn(state: Tensor, weight: Tensor) -> bool:
    """Whether the product of a state with recurrent weights is oneDNN's."""
    return _by_onednn(len(state), *weight.shape[::-1], weight)


class Recurrent:
    """The product of every step's state with the same matrix: ``addend + state weight^T``.

    ``rows`` is how many a state has, in the mean over the steps.
    """

    def __init__(self, weight: Tensor, rows: float):
        self.by_onednn = _by_onednn(rows, weight.shape[1], weight.shape[0], weight)
        self.weight = weight.contiguous() if self.by_onednn else weight
        self.weight_t = weight.t()

    def __call__(self, state: Tensor, addend: Tensor, out: Tensor) -> Tensor:
        """The sum: in ``out``, or in a new tensor, whichever is faster."""
        if self.by_onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(state, addend, self.weight, None, "add")
        return torch.addmm(addend, state, self.weight_t, out=out)
