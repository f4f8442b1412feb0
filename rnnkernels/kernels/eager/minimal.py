"""The minimal recurrent layers on a CPU: gates, linear recurrence and gradients, a part of the sequence at a time.

Nothing but the pre-activations is kept for the backward pass, which finds the gates again while they are in a cache: on
a CPU, that takes less time than to write them to memory and to read them.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.linear_scan import parts, scan, scan_backward
from rnnkernels.kernels.eager.memory import empty
from rnnkernels.kernels.eager.variable_length import before

PARTS = {"MinGRU": 2, "MinLSTM": 3}
"""How many rows of the weights a hidden unit has."""


def positive(input: Tensor) -> Tensor:
    r"""A positive, continuous and increasing function: $x + 1/2$ where $x \ge 0$, else $\sigma(x)$."""
    above = torch.relu(input)
    return above + torch.sigmoid(input - above)  # torch.where would take twice as long on a CPU


NONLINEARITIES = {"positive": positive, "identity": lambda input: input, "tanh": torch.tanh}
"""The functions $g$ of the candidate state, by the name that ``nonlinearity=`` takes."""


def logit(kind: str, projected: Tensor) -> tuple[Tensor, Tensor]:
    r"""The $u$ of the decay $\sigma(u)$ and of the share $\sigma(-u)$ of what is new, and the candidate before $g$."""
    if kind == "MinGRU":
        gate, candidate = projected.chunk(2, dim=-1)
        return -gate, candidate
    forget, input, candidate = projected.chunk(3, dim=-1)
    # f / (f + i) is the sigmoid of log f - log i, exact where both gates close.
    return torch.nn.functional.logsigmoid(forget) - torch.nn.functional.logsigmoid(input), candidate


def step_maps(kind: str, nonlinearity: str, projected: Tensor) -> tuple[Tensor, Tensor]:
    """What each step multiplies the state by, and what it adds to it."""
    u, candidate = logit(kind, projected)
    # sigmoid(-u) is 1 - sigmoid(u) without cancellation.
    return torch.sigmoid(u), torch.sigmoid(-u) * NONLINEARITIES[nonlinearity](candidate)


def forward(projected: Tensor, h_0: Tensor, kind: str, nonlinearity: str, reverse: bool) -> tuple[Tensor, Tensor]:
    """States at every step, and the final state."""
    shape = (*projected.shape[:2], h_0.shape[-1])
    output = empty(shape, projected.dtype, projected.device)
    state = h_0
    for steps in parts(shape, reverse):
        states = output[steps]
        scan(*step_maps(kind, nonlinearity, projected[steps]), state, states, reverse)
        state = states[0 if reverse else -1]
    return output, state.clone()


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    projected: Tensor,
    h_0: Tensor,
    kind: str,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations and of the initial state."""
    grad_projected = empty(projected.shape, projected.dtype, projected.device)
    carried = grad_h_n
    for steps in parts(output.shape, not reverse):
        u, candidate = logit(kind, projected[steps])
        decay, share = torch.sigmoid(u), torch.sigmoid(-u)
        gradient = torch.empty_like(decay)
        carried = scan_backward(decay, grad_output[steps], carried, gradient, reverse)
        value = NONLINEARITIES[nonlinearity](candidate)
        # Of the decay: the state before. Of its logit, by which the share falls as the decay rises: that less g.
        through = before(output, h_0, None, reverse, steps) - value
        through.mul_(gradient).mul_(decay).mul_(share)
        *gates, last = grad_projected[steps].chunk(PARTS[kind], dim=-1)
        if kind == "MinGRU":
            torch.neg(through, out=gates[0])
        else:
            forget, input, _ = projected[steps].chunk(3, dim=-1)
            torch.mul(through, torch.sigmoid(-forget), out=gates[0])
            torch.mul(through, torch.sigmoid(-input).neg_(), out=gates[1])
        torch.mul(gradient.mul_(share), slope(nonlinearity, candidate, value), out=last)
    return grad_projected, carried.clone()


def slope(nonlinearity: str, candidate: Tensor, value: Tensor) -> Tensor:
    """The derivative of $g$, from its argument and value."""
    if nonlinearity == "identity":
        return torch.ones_like(value)
    if nonlinearity == "tanh":
        return 1 - value.square()
    # sigmoid' = s (1 - s) below zero, one above. There the argument of the sigmoid is zero.
    below = torch.sigmoid(torch.clamp(candidate, max=0))
    return torch.addcmul(below, below, below, value=-1).masked_fill_(candidate > 0, 1)
