"""The gated recurrent unit's recurrence in PyTorch: an in-place loop forward, hand-written BPTT backward.

``gates`` is one buffer of shape (sequence_length, batch, 4 * hidden_size), for the parts

    W_hn h + b_hn  |  r  |  z  |  n

of every step: what comes from the input has its place in the last three parts, what comes from the state in the first
three, so that each is one matrix product.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.products import Recurrent
from rnnkernels.kernels.eager.variable_length import before, blocks, descending, padding, running


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
    product = Recurrent(_rolled(weight_hh), batch)
    gates[..., :hidden_size] = 0 if bias_hh is None else bias_hh[2 * hidden_size :]
    output = gates.new_empty(sequence_length, batch, hidden_size)
    rows = torch.arange(batch, device=gates.device)
    counts = None if lengths is None else running(lengths, sequence_length)
    if lengths is not None and reverse:
        # A row that joins late finds its initial state where its predecessor would stand: in the padding.
        late = lengths < sequence_length
        output[lengths[late], rows[late]] = h_0[late]
    from_state, two_gates = gates[..., : 3 * hidden_size], gates[..., hidden_size : 3 * hidden_size]
    parts = (from_state, two_gates, *gates.split(hidden_size, dim=-1), output)
    steps = list(zip(*(part.unbind(0) for part in parts), strict=True))
    hidden = h_0
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        step = steps[t]
        full = step[-1]
        if counts is not None and counts[t] < batch:
            step, hidden = [part[: counts[t]] for part in step], hidden[: counts[t]]
        sums, rz, hn, r, z, n, new = step
        a = product(hidden, sums, out=sums)
        if a is sums:
            rz.sigmoid_()
        else:
            hn.copy_(a[:, :hidden_size])
            torch.sigmoid(a[:, hidden_size:], out=rz)
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


def _slopes(gates: Tensor, previous: Tensor, out: Tensor) -> None:
    """What the gradient of the state is multiplied by to give those of the four parts, for some steps at once."""
    (hn, r, z, n), (slope_hn, slope_r, slope_z, slope_n) = gates.unbind(-2), out.unbind(-2)
    torch.sub(previous, n, out=slope_z)
    slope_z.mul_(torch.addcmul(z, z, z, value=-1))
    torch.mul(n, n, out=slope_n).neg_().add_(1)
    slope_n.addcmul_(slope_n, z, value=-1)
    torch.mul(slope_n, r, out=slope_hn)
    torch.mul(torch.addcmul(hn, hn, r, value=-1), slope_hn, out=slope_r)


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
    product = Recurrent(rolled.t(), batch)
    grad_gates = torch.empty_like(gates)
    counts = [batch] * sequence_length
    first = last = 0 if reverse else sequence_length - 1
    if lengths is not None:
        counts = running(lengths, sequence_length)
        rows = torch.arange(batch, device=lengths.device)
        last, first = (torch.zeros_like(lengths), lengths - 1) if reverse else (lengths - 1, torch.zeros_like(lengths))
        grad_output = grad_output.clone(memory_format=torch.contiguous_format)
        grad_output[last, rows] += grad_h_n
    previous_states = before(output, h_0, lengths, reverse)
    parts, inner = (tensor.unflatten(-1, (4, hidden_size)) for tensor in (gates, grad_gates))
    outer, slopes = grad_output.unbind(0), inner.unbind(0)
    from_state = grad_gates[..., : 3 * hidden_size].unbind(0)
    update = parts[..., 2, :].unbind(0)
    buffer = output.new_empty(batch, hidden_size)
    total, previous = None, None
    for some in blocks(sequence_length, 4 * batch * hidden_size, forward=reverse):
        _slopes(parts[some], previous_states[some], inner[some])
        for t in range(some.start, some.stop) if reverse else reversed(range(some.start, some.stop)):
            arriving, slope = outer[t], slopes[t]
            if previous is None:
                total = arriving + grad_h_n if lengths is None else arriving
            elif lengths is None:
                kept = torch.addcmul(arriving, total, update[previous], out=buffer)
                total, buffer = product(from_state[previous], kept, out=kept), total
            else:
                carrying = min(counts[previous], counts[t])
                if carrying:
                    kept = arriving[:carrying]
                    kept.addcmul_(outer[previous][:carrying], update[previous][:carrying])
                    kept.copy_(product(from_state[previous][:carrying], kept, out=kept))
                total = arriving
            if counts[t] < batch:
                slope[counts[t] :].zero_()
                slope = slope[: counts[t]]
            slope.mul_(total[: counts[t]].unsqueeze(1))
            previous = t
    if lengths is None:
        reached, gates_reached, from_reached = total, update[previous], from_state[previous]
    else:
        reached, gates_reached = grad_output[first, rows], parts[first, rows, 2]
        from_reached = grad_gates[first, rows, : 3 * hidden_size]
    return grad_gates, torch.addcmul(from_reached @ rolled, reached, gates_reached)
