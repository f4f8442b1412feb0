"""The plain RNN's recurrence in PyTorch: an in-place loop forward, hand-written BPTT backward.

A sequence is a matrix whose rows are those of the first step, then those of the second, and so on, ``counts`` of them.
Measured on a CPU (float32, torch 2.13), the in-place loop is faster than ``torch.nn.RNN``'s native forward at every
shape of the benchmark, so it serves inference too. ``benchmarks/`` repeats the measurement.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.products import Recurrent
from rnnkernels.kernels.eager.variable_length import each_step, joined


def _identity(states: Tensor, out: Tensor) -> Tensor:
    return out if states is out else out.copy_(states)


def _relu(states: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(states, min=0, out=out)


ACTIVATE = {"tanh": torch.tanh, "relu": _relu, "sigmoid": torch.sigmoid, "identity": _identity}


def derivative(nonlinearity: str, states: Tensor) -> Tensor:
    """$f'(a_t)$ from $h_t = f(a_t)$, for all steps at once, in a new tensor."""
    if nonlinearity == "tanh":
        return torch.addcmul(states.new_ones(()), states, states, value=-1)
    if nonlinearity == "sigmoid":
        return torch.addcmul(states, states, states, value=-1)
    if nonlinearity == "relu":
        return (states <= 0).logical_not_().to(states.dtype)  # NaN counts as active, as in torch
    return torch.ones_like(states)


def forward(
    states: Tensor, h_0: Tensor, weight_hh: Tensor, counts: list[int], nonlinearity: str, reverse: bool
) -> Tensor:
    """Turn the projected input that ``states`` holds into the states, in place, and return the final state."""
    activate = ACTIVATE[nonlinearity]
    product = Recurrent(weight_hh, len(states) / len(counts))
    h_n = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    hidden, count = h_0[:0], -1
    for t, (step,) in each_step((states,), counts, slice(0, len(counts)), reverse):
        if counts[t] != count:
            hidden, count = joined(hidden, h_0, h_n, counts[t]), counts[t]
        hidden = activate(product(hidden, step, step), out=step)
    h_n[:count] = hidden
    return h_n


def backward(
    grad_states: Tensor,
    grad_h_n: Tensor,
    states: Tensor,
    weight_hh: Tensor,
    counts: list[int],
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projected input and of the initial state."""
    product = Recurrent(weight_hh.t(), len(states) / len(counts))
    grad_projected = derivative(nonlinearity, states)
    grad_h_0 = torch.empty_like(grad_h_n, memory_format=torch.contiguous_format)
    buffer = torch.empty_like(grad_h_0)
    carried = buffer
    previous, count = None, -1
    for t, (step, arriving) in each_step((grad_projected, grad_states), counts, slice(0, len(counts)), not reverse):
        if counts[t] == count:
            total = product(previous, arriving, carried)
        else:
            # Some sequences end or begin here, against the order of the forward pass.
            reached = grad_h_n[:0] if previous is None else previous @ weight_hh
            count = counts[t]
            total = joined(reached, grad_h_n, grad_h_0, count) + arriving
            carried = buffer[:count]
        previous = step.mul_(total)
    grad_h_0[:count] = previous @ weight_hh
    return grad_projected, grad_h_0
