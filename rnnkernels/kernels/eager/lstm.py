"""The LSTM's recurrence in PyTorch: the general loop over a cell without options, its gates activated in place.

``rnnkernels.kernels.eager.onednn`` is faster where it can be used.
"""

from torch import Tensor

from rnnkernels.kernels.eager import general
from rnnkernels.kernels.recurrence import Recurrence, Trace, Weights


def forward(
    gates: Tensor, h_0: Tensor, c_0: Tensor, weight_hh: Tensor, lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place; return states, final states and all cell states."""
    recurrence = Recurrence("lstm", reverse=reverse)
    trace = general.forward(gates, h_0, c_0, Weights(weight_hh), lengths, None, recurrence, gates=gates)
    return trace.output, trace.h_n, trace.c_n, trace.cells


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the four gates before their activations, and of the initial states."""
    trace = Trace(output, h_0, c_0, gates, cells, None, None)
    recurrence = Recurrence("lstm", reverse=reverse)
    gradients = general.backward(
        grad_output, grad_h_n, grad_c_n, trace, h_0, c_0, Weights(weight_hh), lengths, None, recurrence
    )
    return gradients.gates, gradients.h_0, gradients.c_0
