"""The plain RNN's recurrence in PyTorch: an in-place loop forward, hand-written BPTT backward.

Measured on a CPU (2 threads, float32, torch 2.13), the in-place loop is faster than ``torch.nn.RNN``'s native forward
at every shape of the benchmark, so it serves inference too. ``benchmarks/`` repeats the measurement.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.products import Recurrent
from rnnkernels.kernels.eager.variable_length import descending, padding, running


def _identity(states: Tensor, out: Tensor) -> Tensor:
    return out if states is out else out.copy_(states)


def _relu(states: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(states, min=0, out=out)


ACTIVATE = {"tanh": torch.tanh, "relu": _relu, "sigmoid": torch.sigmoid, "identity": _identity}


def derivative(nonlinearity: str, output: Tensor) -> Tensor:
    """$f'(a_t)$ from $h_t = f(a_t)$, for all steps at once, in a new tensor."""
    if nonlinearity == "tanh":
        return torch.addcmul(output.new_ones(()), output, output, value=-1)
    if nonlinearity == "sigmoid":
        return torch.addcmul(output, output, output, value=-1)
    if nonlinearity == "relu":
        return (output <= 0).logical_not_().to(output.dtype)  # NaN counts as active, as in torch
    return torch.ones_like(output)


def forward(
    output: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool,
) -> Tensor:
    """Turn the projected input that ``output`` holds into the states, in place, and return the final state."""
    if lengths is None:
        return _forward_full(output, h_0, weight_hh, nonlinearity, reverse)
    order = descending(lengths)
    if order is None:
        return _forward_sorted(output, h_0, weight_hh, lengths, nonlinearity, reverse)
    ordered = output.index_select(1, order)
    h_n = _forward_sorted(ordered, h_0[order], weight_hh, lengths[order], nonlinearity, reverse)
    inverse = torch.argsort(order)
    torch.index_select(ordered, 1, inverse, out=output)
    return h_n[inverse]


def _forward_full(output: Tensor, h_0: Tensor, weight_hh: Tensor, nonlinearity: str, reverse: bool) -> Tensor:
    activate = ACTIVATE[nonlinearity]
    product = Recurrent(weight_hh, len(h_0))
    steps = output.unbind(0)
    hidden = h_0
    for step in reversed(steps) if reverse else steps:
        activate(product(hidden, step, out=step), out=step)
        hidden = step
    return hidden.clone()


def _forward_sorted(
    output: Tensor, h_0: Tensor, weight_hh: Tensor, lengths: Tensor, nonlinearity: str, reverse: bool
) -> Tensor:
    activate = ACTIVATE[nonlinearity]
    product = Recurrent(weight_hh, len(h_0))
    sequence_length, batch = output.shape[:2]
    counts = running(lengths, sequence_length)
    rows = torch.arange(batch, device=output.device)
    if reverse:
        # A row that joins late finds its initial state where its predecessor would stand: in the padding.
        late = lengths < sequence_length
        output[lengths[late], rows[late]] = h_0[late]
    hidden = h_0
    steps = output.unbind(0)
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        step, hidden = steps[t][: counts[t]], hidden[: counts[t]]
        activate(product(hidden, step, out=step), out=step)
        hidden = steps[t]
    h_n = output[0].clone() if reverse else output[lengths - 1, rows]
    output.masked_fill_(padding(lengths, sequence_length), 0)
    return h_n


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projected input and of the initial state."""
    if lengths is None:
        return _backward_full(grad_output, grad_h_n, output, weight_hh, nonlinearity, reverse)
    order = descending(lengths)
    if order is None:
        return _backward_sorted(grad_output, grad_h_n, output, weight_hh, lengths, nonlinearity, reverse)
    grad_projected, grad_h_0 = _backward_sorted(
        grad_output.index_select(1, order),
        grad_h_n[order],
        output.index_select(1, order),
        weight_hh,
        lengths[order],
        nonlinearity,
        reverse,
    )
    inverse = torch.argsort(order)
    return grad_projected.index_select(1, inverse), grad_h_0[inverse]


def _backward_full(
    grad_output: Tensor, grad_h_n: Tensor, output: Tensor, weight_hh: Tensor, nonlinearity: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    grad_projected = derivative(nonlinearity, output)
    product = Recurrent(weight_hh.t(), len(grad_h_n))
    carried = torch.empty_like(grad_h_n)
    outer, inner = grad_output.unbind(0), grad_projected.unbind(0)
    sequence_length = len(inner)
    previous = None
    for t in range(sequence_length) if reverse else reversed(range(sequence_length)):
        arriving = grad_h_n + outer[t] if previous is None else product(previous, outer[t], out=carried)
        previous = inner[t].mul_(arriving)
    return grad_projected, previous @ weight_hh


def _backward_sorted(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    weight_hh: Tensor,
    lengths: Tensor,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    sequence_length, batch = output.shape[:2]
    counts = running(lengths, sequence_length)
    rows = torch.arange(batch, device=output.device)
    grad_projected = derivative(nonlinearity, output).masked_fill_(padding(lengths, sequence_length), 0)
    grad_output = grad_output.clone()
    last, first = (torch.zeros_like(lengths), lengths - 1) if reverse else (lengths - 1, torch.zeros_like(lengths))
    grad_output[last, rows] += grad_h_n
    product = Recurrent(weight_hh.t(), batch)
    outer, inner = grad_output.unbind(0), grad_projected.unbind(0)
    previous, carrying = None, 0
    for t in range(sequence_length) if reverse else reversed(range(sequence_length)):
        carrying = min(carrying, counts[t])
        if carrying:
            arriving = outer[t][:carrying]
            arriving.copy_(product(previous[:carrying], arriving, out=arriving))
        inner[t][: counts[t]].mul_(outer[t][: counts[t]])
        previous, carrying = inner[t], counts[t]
    return grad_projected, grad_projected[first, rows] @ weight_hh
