"""The gated recurrent unit's recurrence in PyTorch: an in-place loop forward, hand-written BPTT backward.

A sequence is a matrix whose rows are those of the first step, then those of the second, and so on, ``counts`` of them.
``gates`` is one buffer of 4 * hidden_size columns, for the parts

    W_hn h + b_hn  |  r  |  z  |  n

of every step: what comes from the input has its place in the last three parts, what comes from the state in the first
three, so that each is one matrix product.
"""

import itertools

import torch
from torch import Tensor

from rnnkernels.kernels.eager.memory import empty
from rnnkernels.kernels.eager.packing import previous_rows
from rnnkernels.kernels.eager.products import Recurrent
from rnnkernels.kernels.eager.variable_length import blocks, each_step, joined


def _rolled(weight_hh: Tensor) -> Tensor:
    """The rows for (r, z, n) in the order of the buffer, (n, r, z)."""
    return weight_hh.roll(weight_hh.shape[0] // 3, 0)


def forward(
    gates: Tensor, h_0: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, counts: list[int], reverse: bool
) -> tuple[Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place; return the states and the final state."""
    hidden_size = weight_hh.shape[1]
    product = Recurrent(_rolled(weight_hh), len(gates) / len(counts))
    gates[:, :hidden_size] = 0 if bias_hh is None else bias_hh[2 * hidden_size :]
    states = empty((len(gates), hidden_size), gates.dtype, gates.device)
    sums, two_gates = gates[:, : 3 * hidden_size], gates[:, hidden_size : 3 * hidden_size]
    sequences = sums, two_gates, *gates.split(hidden_size, -1), states
    h_n = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    hidden, count = h_0[:0], -1
    for t, (before, rz, hn, r, z, n, new) in each_step(sequences, counts, slice(0, len(counts)), reverse):
        if counts[t] != count:
            hidden, count = joined(hidden, h_0, h_n, counts[t]), counts[t]
        a = product(hidden, before, before)
        if a is before:
            rz.sigmoid_()
        else:
            hn.copy_(a[:, :hidden_size])
            torch.sigmoid(a[:, hidden_size:], out=rz)
        n.addcmul_(r, hn).tanh_()
        hidden = torch.lerp(n, hidden, z, out=new)
    h_n[:count] = hidden
    return states, h_n


def _finish_slopes(gates: Tensor, slopes: Tensor) -> None:
    """What the gradient of the state is multiplied by to give those of the four parts; z's holds h - n at first."""
    (hn, r, z, n), (slope_hn, slope_r, slope_z, slope_n) = gates.unbind(1), slopes.unbind(1)
    slope_z.mul_(torch.addcmul(z, z, z, value=-1))
    torch.mul(n, n, out=slope_n).neg_().add_(1)
    slope_n.addcmul_(slope_n, z, value=-1)
    torch.mul(slope_n, r, out=slope_hn)
    torch.mul(torch.addcmul(hn, hn, r, value=-1), slope_hn, out=slope_r)


def backward(
    grad_states: Tensor,
    grad_h_n: Tensor,
    states: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    counts: list[int],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the four parts of ``gates`` before their activations, and of the initial state."""
    hidden_size = weight_hh.shape[1]
    product = Recurrent(_rolled(weight_hh).t(), len(gates) / len(counts))
    grad_gates = empty(gates.shape, gates.dtype, gates.device)
    parts, slopes = (tensor.unflatten(-1, (4, hidden_size)) for tensor in (gates, grad_gates))
    grad_h_0 = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    buffers = grad_states.new_empty(2, *h_0.shape)
    starts = [0, *itertools.accumulate(counts)]
    carried, count = grad_h_n[:0], -1
    for some in blocks(counts, 4 * hidden_size, from_the_first=reverse):
        rows = slice(starts[some.start], starts[some.stop])
        slope, update = slopes[rows], parts[rows, 2]
        torch.sub(previous_rows(states, h_0, counts, starts, some, reverse), parts[rows, 3], out=slope[:, 2])
        _finish_slopes(parts[rows], slope)
        sequences = grad_gates[rows, : 3 * hidden_size], slope, update, grad_states[rows]
        for t, (from_state, slope_t, update_t, arriving) in each_step(sequences, counts, some, not reverse):
            if counts[t] != count:
                carried, count = joined(carried, grad_h_n, grad_h_0, counts[t]), counts[t]
                total, kept = buffers[:, :count]
            torch.add(carried, arriving, out=total)
            slope_t.mul_(total.unsqueeze(1))
            torch.mul(total, update_t, out=kept)
            carried = product(from_state, kept, kept)
    grad_h_0[:count] = carried
    return grad_gates, grad_h_0
