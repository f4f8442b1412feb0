"""The gated recurrent unit's recurrence in PyTorch: an in-place loop forward, hand-written BPTT backward.

``gates`` is one buffer of shape (sequence_length, batch, 4 * hidden_size), for the parts

    W_hn h + b_hn  |  r  |  z  |  n

of every step: what comes from the input has its place in the last three parts, what comes from the state in the first
three, so that each is one matrix product.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.variable_length import descending, padding, running


def _rolled(weight_hh: Tensor) -> Tensor:
    """The rows for (r, z, n) in the order of the buffer, (n, r, z)."""
    return weight_hh.roll(weight_hh.shape[0] // 3, 0)


def forward(
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place; return the states and the final state."""
    order = None if lengths is None else descending(lengths)
    if order is None:
        return _forward_sorted(gates, h_0, weight_hh, bias_hh, lengths, reverse)
    ordered = gates.index_select(1, order)
    output, h_n = _forward_sorted(ordered, h_0[order], weight_hh, bias_hh, lengths[order], reverse)
    inverse = torch.argsort(order)
    torch.index_select(ordered, 1, inverse, out=gates)
    return output.index_select(1, inverse), h_n[inverse]


def _forward_sorted(
    gates: Tensor, h_0: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    sequence_length, batch, width = gates.shape
    hidden_size = width // 4
    weight_rz_t, weight_n_t = weight_hh[: 2 * hidden_size].t(), weight_hh[2 * hidden_size :].t()
    bias_n = gates.new_zeros(()) if bias_hh is None else bias_hh[2 * hidden_size :]
    output = gates.new_empty(sequence_length, batch, hidden_size)
    rows = torch.arange(batch, device=gates.device)
    counts = None if lengths is None else running(lengths, sequence_length)
    if lengths is not None and reverse:
        # A row that joins late finds its initial state where its predecessor would stand: in the padding.
        late = lengths < sequence_length
        output[lengths[late], rows[late]] = h_0[late]
    parts = gates.split((hidden_size, 2 * hidden_size, hidden_size), dim=-1)
    steps = list(zip(*(part.unbind(0) for part in (*parts, output)), strict=True))
    hidden = h_0
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        hn, rz, n, new = steps[t]
        full = new
        if counts is not None and counts[t] < batch:
            hn, rz, n, new, hidden = (tensor[: counts[t]] for tensor in (hn, rz, n, new, hidden))
        torch.addmm(bias_n, hidden, weight_n_t, out=hn)
        r, z = rz.addmm_(hidden, weight_rz_t).sigmoid_().chunk(2, dim=-1)
        n.addcmul_(r, hn).tanh_()
        torch.lerp(n, hidden, z, out=new)
        hidden = full
    if lengths is None:
        return output, hidden.clone()
    h_n = output[0].clone() if reverse else output[lengths - 1, rows]
    ended = padding(lengths, sequence_length)
    gates.masked_fill_(ended, 0)
    return output.masked_fill_(ended, 0), h_n


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the four parts of ``gates`` before their activations, and of the initial state."""
    order = None if lengths is None else descending(lengths)
    if order is None:
        return _backward_sorted(grad_output, grad_h_n, output, gates, h_0, weight_hh, lengths, reverse)
    sequences = (tensor.index_select(1, order) for tensor in (grad_output, output, gates))
    grad_output, output, gates = sequences
    grad_gates, grad_h_0 = _backward_sorted(
        grad_output, grad_h_n[order], output, gates, h_0[order], weight_hh, lengths[order], reverse
    )
    inverse = torch.argsort(order)
    return grad_gates.index_select(1, inverse), grad_h_0[inverse]


def _previous(output: Tensor, h_0: Tensor, lengths: Tensor | None, reverse: bool) -> list[Tensor]:
    """The state before each step."""
    if not reverse:
        return [h_0, *output[:-1].unbind(0)]
    if lengths is None:
        return [*output[1:].unbind(0), h_0]
    # Where a shorter sequence begins, the state of the step after holds padding.
    first = torch.arange(1, output.shape[0] + 1, device=lengths.device).unsqueeze(1) == lengths
    after = torch.cat([output[1:], h_0.unsqueeze(0)])
    return list(torch.where(first.unsqueeze(-1), h_0, after).unbind(0))


def _backward_sorted(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    sequence_length, batch, hidden_size = output.shape
    rolled = _rolled(weight_hh)
    grad_gates = torch.empty_like(gates)
    grad_output = grad_output.clone(memory_format=torch.contiguous_format)
    if lengths is None:
        counts = [batch] * sequence_length
        grad_output[0 if reverse else -1] += grad_h_n
    else:
        counts = running(lengths, sequence_length)
        rows = torch.arange(batch, device=lengths.device)
        last, first = (torch.zeros_like(lengths), lengths - 1) if reverse else (lengths - 1, torch.zeros_like(lengths))
        grad_output[last, rows] += grad_h_n
    before = _previous(output, h_0, lengths, reverse)
    outer, parts = grad_output.unbind(0), gates.unflatten(-1, (4, hidden_size)).unbind(0)
    inner = grad_gates.unflatten(-1, (4, hidden_size)).unbind(0)
    from_state = grad_gates[..., : 3 * hidden_size].unbind(0)
    update = gates[..., 2 * hidden_size : 3 * hidden_size].unbind(0)
    one = output.new_ones(())
    previous, carrying = 0, 0
    for t in range(sequence_length) if reverse else reversed(range(sequence_length)):
        carrying = min(carrying, counts[t])
        if carrying:
            carried = outer[t][:carrying]
            carried.addcmul_(outer[previous][:carrying], update[previous][:carrying])
            carried.addmm_(from_state[previous][:carrying], rolled)
        hn, r, z, n = parts[t].unbind(1)
        slope_hn, slope_r, slope_z, slope_n = inner[t].unbind(1)
        # What the gradient of the state is multiplied by to give those of the four parts
        torch.sub(before[t], n, out=slope_z)
        torch.mul(slope_z, torch.addcmul(z, z, z, value=-1), out=slope_z)
        torch.addcmul(one, n, n, value=-1, out=slope_n)
        slope_n.addcmul_(slope_n, z, value=-1)
        torch.mul(slope_n, r, out=slope_hn)
        torch.mul(torch.addcmul(hn, hn, r, value=-1), slope_hn, out=slope_r)
        inner[t][: counts[t]].mul_(outer[t][: counts[t]].unsqueeze(1))
        inner[t][counts[t] :].zero_()
        previous, carrying = t, counts[t]
    if lengths is None:
        reached, gates_reached, from_reached = outer[previous], update[previous], from_state[previous]
    else:
        reached, gates_reached = grad_output[first, rows], gates[first, rows, 2 * hidden_size : 3 * hidden_size]
        from_reached = grad_gates[first, rows, : 3 * hidden_size]
    return grad_gates, torch.addcmul(from_reached @ rolled, reached, gates_reached)
