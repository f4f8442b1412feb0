"""Any cell with any of its options, in PyTorch: a loop forward, hand-written BPTT backward.

``forward`` and ``backward`` are the loop, with what is the same for all cells; a cell's own mathematics stands in its
class. Everything that does not wait for the step before is done for all steps at once.
"""

import functools
import math

import torch
from torch import Tensor

from rnnkernels.kernels.eager import random
from rnnkernels.kernels.eager.products import add_linear, linear
from rnnkernels.kernels.eager.rnn import ACTIVATE, derivative
from rnnkernels.kernels.eager.variable_length import before, blocks, order_of_steps, padding
from rnnkernels.kernels.recurrence import Gradients, Recurrence, Trace, Weights


class _Norm:
    """Layer normalization of one group of columns of every step, and its backward pass."""

    def __init__(self, gain: Tensor, bias: Tensor | None, epsilon: float):
        self.gain, self.bias, self.epsilon = gain, bias, epsilon

    def __call__(self, values: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(values, self.gain.shape, self.gain, self.bias, self.epsilon)

    def prepare(self, values: Tensor) -> None:
        """Keep what the backward pass needs of all steps."""
        self.values = values
        _, self.mean, self.reciprocal = torch.native_layer_norm(
            values, self.gain.shape, self.gain, self.bias, self.epsilon
        )

    def backward(self, gradient: Tensor, t: int) -> Tensor:
        """The gradient of what is normalized at step t."""
        return torch.ops.aten.native_layer_norm_backward(
            gradient,
            self.values[t],
            self.gain.shape,
            self.mean[t],
            self.reciprocal[t],
            self.gain,
            self.bias,
            (True, False, False),
        )[0]


class _Cell:
    """What the cells share. A hidden unit has ``parts`` values in ``gates``, and ``rows`` rows of the weights."""

    parts: int
    rows: int

    def __init__(self, weights: Weights, recurrence: Recurrence):
        self.weights, self.recurrence = weights, recurrence
        self.hidden_size = weights.weight_hh.shape[0] // self.rows
        self.weight_hh = weights.weight_hh.contiguous()
        self.bound = recurrence.grad_clip

    @functools.cached_property
    def weight_hh_t(self) -> Tensor:
        """The recurrent weights transposed, for the way back."""
        return self.weight_hh.t().contiguous()

    def norm(self, rows: slice) -> _Norm | None:
        gain = self.weights.norm_hh
        return None if gain is None else _Norm(gain[rows], None, self.recurrence.epsilon)

    def clip_(self, gradient: Tensor) -> Tensor:
        return gradient if math.isinf(self.bound) else gradient.clamp_(-self.bound, self.bound)


class _RNN(_Cell):
    parts = rows = 1

    def __init__(self, weights: Weights, recurrence: Recurrence):
        super().__init__(weights, recurrence)
        self.norm_hh = self.norm(slice(None))
        if self.norm_hh is not None:
            self.norm_hh.bias = weights.bias

    def forward(self, projected, product, gates, recurrent, h, c):
        if self.norm_hh is None:
            add_linear(projected, recurrent, self.weight_hh, out=gates)
        else:
            add_linear(projected, recurrent, self.weight_hh, out=product)
            gates.copy_(self.norm_hh(product))
        return ACTIVATE[self.recurrence.nonlinearity](gates, out=gates), None

    def prepare(self, trace: Trace, recurrent: Tensor, h: Tensor, c: Tensor | None, slopes: Tensor) -> None:
        slopes.copy_(derivative(self.recurrence.nonlinearity, trace.gates))
        if self.norm_hh is not None:
            self.norm_hh.prepare(trace.products)

    def backward(self, t, grad_h, grad_c, slopes, grad_product):
        grad_a = self.clip_(slopes.mul_(grad_h))
        if self.norm_hh is not None:
            grad_a = grad_product.copy_(self.norm_hh.backward(grad_a, t))
        return linear(grad_a, self.weight_hh_t), None, None


class _GRU(_Cell):
    parts, rows = 4, 3

    def __init__(self, weights: Weights, recurrence: Recurrence):
        super().__init__(weights, recurrence)
        self.weight_rz, self.weight_n = self.weight_hh.split((2 * self.hidden_size, self.hidden_size))
        # In the order of the parts, (n, r, z), for one product where nothing stands between a product and its sum.
        self.rolled = self.weight_hh.roll(self.hidden_size, 0) if recurrence.reset_after else None
        self.at_once = recurrence.reset_after and weights.norm_hh is None
        self.norm_rz = self.norm(slice(0, 2 * self.hidden_size))
        self.norm_n = self.norm(slice(2 * self.hidden_size, None))

    @functools.cached_property
    def rolled_t(self) -> Tensor:
        return self.rolled.t().contiguous()

    def forward(self, projected, product, gates, recurrent, h, c):
        size = self.hidden_size
        if self.at_once:
            gates[:, :size] = 0 if self.weights.bias is None else self.weights.bias
            gates[:, size:] = projected
            add_linear(gates[:, : 3 * size], recurrent, self.rolled, out=gates[:, : 3 * size])
            gates[:, size : 3 * size].sigmoid_()
            hn, r, z, n = gates.split(size, -1)
            return torch.lerp(n.addcmul_(r, hn).tanh_(), h, z), None
        (hn, rz, n), (given_rz, given_n) = (
            tensor.split(widths, -1)
            for tensor, widths in ((gates, (size, 2 * size, size)), (projected, (2 * size, size)))
        )
        if self.norm_rz is None:
            add_linear(given_rz, recurrent, self.weight_rz, out=rz)
        else:
            torch.add(
                given_rz, self.norm_rz(torch.mm(recurrent, self.weight_rz.t(), out=product[:, : 2 * size])), out=rz
            )
        r, z = rz.sigmoid_().chunk(2, -1)
        reset_after = self.recurrence.reset_after
        carried = torch.mm(recurrent if reset_after else r * recurrent, self.weight_n.t())
        if self.norm_n is not None:
            product[:, 2 * size :] = carried
            carried = self.norm_n(carried)
        if reset_after:
            hn.copy_(carried) if self.weights.bias is None else torch.add(carried, self.weights.bias, out=hn)
            torch.addcmul(given_n, r, hn, out=n)
        else:
            hn.zero_()
            torch.add(given_n, carried, out=n)
        return torch.lerp(n.tanh_(), h, z), None

    def prepare(self, trace: Trace, recurrent: Tensor, h: Tensor, c: Tensor | None, slopes: Tensor) -> None:
        """Leave in ``slopes`` what gradients are multiplied by: for r and hn that of n's argument, else that of h."""
        (hn, r, z, n), (slope_hn, slope_r, slope_z, slope_n) = (
            tensor.unflatten(-1, (4, self.hidden_size)).unbind(-2) for tensor in (trace.gates, slopes)
        )
        torch.addcmul(z, z, z, value=-1, out=slope_z).mul_(h - n)
        torch.addcmul(n.new_ones(()), n, n, value=-1, out=slope_n).mul_(1 - z)
        torch.addcmul(r, r, r, value=-1, out=slope_r).mul_(hn if self.recurrence.reset_after else recurrent)
        slope_hn.copy_(r)
        self.update = z
        if self.norm_rz is not None:
            self.norm_rz.prepare(trace.products[..., : 2 * self.hidden_size])
            self.norm_n.prepare(trace.products[..., 2 * self.hidden_size :])

    def backward(self, t, grad_h, grad_c, slopes, grad_product):
        size = self.hidden_size
        hn, r, _, n = slopes.split(size, -1)
        zn = slopes[:, 2 * size :]
        self.clip_(zn.view(-1, 2, size).mul_(grad_h.unsqueeze(1)))
        if self.recurrence.reset_after:
            slopes[:, : 2 * size].view(-1, 2, size).mul_(n.unsqueeze(1))
            self.clip_(r)
            if self.at_once:
                return linear(slopes[:, : 3 * size], self.rolled_t), grad_h * self.update[t], None
            grad_carried = hn
            if self.norm_n is not None:
                grad_carried = self._through(self.norm_n, hn, t, grad_product[:, 2 * size :])
            grad_recurrent = grad_carried @ self.weight_n
        else:
            grad_carried = n if self.norm_n is None else self._through(self.norm_n, n, t, grad_product[:, 2 * size :])
            grad_reset = grad_carried @ self.weight_n
            grad_recurrent = grad_reset * hn  # the slope of hn holds r
            self.clip_(r.mul_(grad_reset))
            hn.zero_()
        grad_rz = slopes[:, size : 3 * size]
        if self.norm_rz is not None:
            grad_rz = self._through(self.norm_rz, grad_rz, t, grad_product[:, : 2 * size])
        return grad_recurrent.addmm_(grad_rz, self.weight_rz), grad_h * self.update[t], None

    @staticmethod
    def _through(norm: _Norm, gradient: Tensor, t: int, out: Tensor) -> Tensor:
        return out.copy_(norm.backward(gradient, t))


class _LSTM(_Cell):
    parts = rows = 4

    def __init__(self, weights: Weights, recurrence: Recurrence):
        super().__init__(weights, recurrence)
        self.peephole = weights.weight_peephole
        self.projection = weights.weight_hr
        self.norm_hh = self.norm(slice(None))
        self.norm_cell = None
        if weights.norm_cell_weight is not None:
            self.norm_cell = _Norm(weights.norm_cell_weight, weights.norm_cell_bias, recurrence.epsilon)

    def shown(self, cells: Tensor) -> Tensor:
        """tanh of the cell state as the output gate sees it."""
        return torch.tanh(cells if self.norm_cell is None else self.norm_cell(cells.to(self.weight_hh.dtype)))

    def forward(self, projected, product, gates, recurrent, h, c):
        size = self.hidden_size
        if self.norm_hh is None:
            add_linear(projected, recurrent, self.weight_hh, out=gates)
        else:
            torch.add(projected, self.norm_hh(torch.mm(recurrent, self.weight_hh.t(), out=product)), out=gates)
        i, f, g, o = gates.split(size, -1)
        if self.peephole is not None:
            i.addcmul_(self.peephole[0], c.to(i.dtype))
            f.addcmul_(self.peephole[1], c.to(f.dtype))
        gates[:, : 2 * size].sigmoid_()
        new_c = (f * c).addcmul_(i, g.tanh_())
        if self.peephole is not None:
            o.addcmul_(self.peephole[2], new_c.to(o.dtype))
        new_h = (o.sigmoid_() * self.shown(new_c)).to(gates.dtype)
        return new_h if self.projection is None else new_h @ self.projection.t(), new_c

    def prepare(self, trace: Trace, recurrent: Tensor, h: Tensor, c: Tensor | None, slopes: Tensor) -> None:
        """Leave in ``slopes`` what gradients are multiplied by: of i, f and g that of c, of o that of h."""
        cells = trace.cells if trace.new_cells is None else trace.new_cells
        (i, f, g, o), (slope_i, slope_f, slope_g, slope_o) = (
            tensor.unflatten(-1, (4, self.hidden_size)).unbind(-2) for tensor in (trace.gates, slopes)
        )
        one, shown = i.new_ones(()), self.shown(cells)
        torch.addcmul(i, i, i, value=-1, out=slope_i).mul_(g)
        torch.addcmul(f, f, f, value=-1, out=slope_f).mul_(c)
        torch.addcmul(one, g, g, value=-1, out=slope_g).mul_(i)
        torch.addcmul(o, o, o, value=-1, out=slope_o).mul_(shown)
        self.slope_c = torch.addcmul(shown.new_ones(()), shown, shown, value=-1).mul_(o)
        self.forget = f
        if self.norm_hh is not None:
            self.norm_hh.prepare(trace.products)
        if self.norm_cell is not None:
            self.norm_cell.prepare(cells.to(self.weight_hh.dtype))

    def backward(self, t, grad_h, grad_c, slopes, grad_product):
        size = self.hidden_size
        if self.projection is not None:
            grad_h = grad_h @ self.projection
        i, f, _, o = slopes.split(size, -1)
        self.clip_(o.mul_(grad_h))
        if self.norm_cell is None:
            grad_c = torch.addcmul(grad_c, grad_h, self.slope_c[t])
        else:
            shown = (grad_h * self.slope_c[t]).to(self.weight_hh.dtype)
            grad_c = grad_c + self.norm_cell.backward(shown, t)
        if self.peephole is not None:
            grad_c = torch.addcmul(grad_c, o, self.peephole[2])
        self.clip_(slopes[:, : 3 * size].view(-1, 3, size).mul_(grad_c.unsqueeze(1)))
        grad_c = grad_c * self.forget[t]
        if self.peephole is not None:
            grad_c.addcmul_(i, self.peephole[0]).addcmul_(f, self.peephole[1])
        if self.norm_hh is not None:
            slopes = grad_product.copy_(self.norm_hh.backward(slopes, t))
        return linear(slopes, self.weight_hh_t), None, grad_c


_CELLS = {"rnn": _RNN, "gru": _GRU, "lstm": _LSTM}


def recurrent_mask(h_0: Tensor, recurrence: Recurrence) -> Tensor | None:
    """What multiplies the state in every recurrent product; None where nothing does."""
    if not (recurrence.training and recurrence.recurrent_dropout):
        return None
    return random.kept(recurrence.key, random.RECURRENT, recurrence.recurrent_dropout, h_0.shape, h_0)


class _Zoneout:
    """Mixes old and new states of one kind, and their gradients."""

    def __init__(self, probability: float, stream: int, sequence_length: int, state: Tensor, recurrence: Recurrence):
        self.probability, self.stays = probability, None
        if probability and recurrence.training:
            shape = (sequence_length, *state.shape)
            self.stays = random.dropped(recurrence.key, stream, probability, shape, state.device)

    def __call__(self, t: int, old: Tensor, new: Tensor) -> Tensor:
        if self.stays is not None:
            return torch.where(self.stays[t], old, new)
        return torch.lerp(new, old, self.probability) if self.probability else new

    def backward(self, t: int, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the new and of the old state; None for one that is zero."""
        if self.stays is not None:
            stays = self.stays[t]
            return gradient.masked_fill(stays, 0), torch.where(stays, gradient, 0)
        if self.probability:
            return gradient * (1 - self.probability), gradient * self.probability
        return gradient, None


def _sum(*terms: Tensor | None) -> Tensor:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0])


def forward(
    projected: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
    *,
    gates: Tensor | None = None,
) -> Trace:
    """Run the cell over the projected input. ``gates`` is where to leave the gates; it may be ``projected`` itself."""
    cell = _CELLS[recurrence.cell](weights, recurrence)
    sequence_length, batch, _ = projected.shape
    has_cells = c_0 is not None
    output = projected.new_empty(sequence_length, batch, h_0.shape[1])
    if gates is None:
        gates = projected.new_empty(sequence_length, batch, cell.parts * cell.hidden_size)
    products = None if weights.norm_hh is None else torch.empty_like(projected, memory_format=torch.contiguous_format)
    h, c, c_type = h_0, None, None
    cells = new_cells = None
    if has_cells:
        c_type = torch.promote_types(c_0.dtype, torch.float32)
        c = c_0.to(c_type)
        cells = torch.empty(sequence_length, *c_0.shape, dtype=c_type, device=c_0.device)
        new_cells = torch.empty_like(cells) if recurrence.zoneout_cell else None
    mask = recurrent_mask(h_0, recurrence)
    zone_h = _Zoneout(recurrence.zoneout, random.ZONEOUT, sequence_length, h_0, recurrence)
    zone_c = _Zoneout(recurrence.zoneout_cell, random.ZONEOUT_CELL, sequence_length, c_0, recurrence)
    active = None if lengths is None else ~padding(lengths, sequence_length)
    cleared = None if reset is None else reset.unsqueeze(-1)
    for t in order_of_steps(sequence_length, recurrence.reverse):
        old_h, old_c = h, c
        if cleared is not None:
            old_h = h.masked_fill(cleared[t], 0)
            old_c = c.masked_fill(cleared[t], 0) if has_cells else None
        recurrent = old_h if mask is None else old_h * mask
        product = None if products is None else products[t]
        new_h, new_c = cell.forward(projected[t], product, gates[t], recurrent, old_h, old_c)
        if new_cells is not None:
            new_cells[t] = new_c
        new_h = zone_h(t, old_h, new_h)
        new_c = zone_c(t, old_c, new_c) if has_cells else None
        if active is None:
            h, c = new_h, new_c
        else:
            h = torch.where(active[t], new_h, h)
            c = torch.where(active[t], new_c, c) if has_cells else None
        output[t] = new_h
        if has_cells:
            cells[t] = c
    if active is not None:
        for written in (output, gates, products, new_cells):
            if written is not None:
                written.masked_fill_(~active, 0)
    c_n = c.to(c_0.dtype, copy=True) if has_cells else None
    return Trace(output, h.clone(), c_n, gates, cells, new_cells, products)


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    trace: Trace,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
) -> Gradients:
    """Gradients of what :func:`forward` computed."""
    cell = _CELLS[recurrence.cell](weights, recurrence)
    sequence_length = len(trace.output)
    has_cells = c_0 is not None
    mask = recurrent_mask(h_0, recurrence)
    zone_h = _Zoneout(recurrence.zoneout, random.ZONEOUT, sequence_length, h_0, recurrence)
    zone_c = _Zoneout(recurrence.zoneout_cell, random.ZONEOUT_CELL, sequence_length, c_0, recurrence)
    active = None if lengths is None else ~padding(lengths, sequence_length)
    cleared = None if reset is None else reset.unsqueeze(-1)
    grad_gates = torch.empty_like(trace.gates)
    grad_products = None if trace.products is None else torch.empty_like(trace.products)
    keeps_states = weights.weight_hr is not None or weights.norm_cell_weight is not None
    grad_states = torch.empty_like(trace.output) if keeps_states else None
    grad_h = grad_h_n
    grad_c = grad_c_n.to(trace.cells.dtype) if has_cells else None
    width = cell.parts * cell.hidden_size
    for some in blocks([len(h_0)] * sequence_length, width, from_the_first=recurrence.reverse):
        old_h, old_c, recurrent = previous_states(trace, h_0, c_0, lengths, reset, recurrence, mask, some)
        cell.prepare(_some(trace, some), recurrent, old_h, old_c, grad_gates[some])
        for t in order_of_steps(some.stop - some.start, not recurrence.reverse):
            time = some.start + t
            arriving_h, arriving_c = grad_h + grad_output[time], grad_c
            if active is not None:
                arriving_h = arriving_h.masked_fill(~active[time], 0)
                arriving_c = grad_c.masked_fill(~active[time], 0) if has_cells else None
            new_h, stayed_h = zone_h.backward(time, arriving_h)
            new_c, stayed_c = zone_c.backward(time, arriving_c) if has_cells else (None, None)
            if grad_states is not None:
                grad_states[time] = new_h
            grad_product = None if grad_products is None else grad_products[time]
            through, beside, through_c = cell.backward(t, new_h, new_c, grad_gates[time], grad_product)
            earlier_h = _sum(through if mask is None else through * mask, beside, stayed_h)
            earlier_c = _sum(through_c, stayed_c) if has_cells else None
            if cleared is not None:
                earlier_h = earlier_h.masked_fill(cleared[time], 0)
                earlier_c = earlier_c.masked_fill(cleared[time], 0) if has_cells else None
            if active is None:
                grad_h, grad_c = earlier_h, earlier_c
            else:
                grad_h = torch.where(active[time], earlier_h, grad_h)
                grad_c = torch.where(active[time], earlier_c, grad_c) if has_cells else None
    grad_c_0 = grad_c.to(c_0.dtype, copy=True) if has_cells else None
    return Gradients(grad_gates, grad_products, grad_states, grad_h.clone(), grad_c_0)


def with_gates(
    projected: Tensor,
    trace: Trace,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
    *,
    gates: Tensor | None = None,
) -> Trace:
    """The trace with the gates, new cell states and products that were not kept.

    All states are known, so that every step is computed at once, as one step of a batch of all. ``gates`` is as in
    :func:`forward`.
    """
    cell = _CELLS[recurrence.cell](weights, recurrence)
    mask = recurrent_mask(h_0, recurrence)
    h, c, recurrent = previous_states(trace, h_0, c_0, lengths, reset, recurrence, mask)
    if gates is None:
        gates = projected.new_empty(*projected.shape[:2], cell.parts * cell.hidden_size)
    products = None if weights.norm_hh is None else torch.empty_like(projected, memory_format=torch.contiguous_format)
    rows = (
        None if tensor is None else tensor.flatten(0, 1) for tensor in (projected, products, gates, recurrent, h, c)
    )
    _, new_cells = cell.forward(*rows)
    new_cells = new_cells.view_as(trace.cells) if recurrence.zoneout_cell else None
    if lengths is not None:
        ended = padding(lengths, len(gates))
        for written in (gates, products, new_cells):
            if written is not None:
                written.masked_fill_(ended, 0)
    return trace._replace(gates=gates, new_cells=new_cells, products=products)


def _some(trace: Trace, steps: slice) -> Trace:
    """The trace of some steps."""
    sequences = ("output", "gates", "cells", "new_cells", "products")
    given = {name: getattr(trace, name) for name in sequences}
    return trace._replace(**{name: value[steps] for name, value in given.items() if value is not None})


def previous_states(
    trace: Trace,
    h_0: Tensor,
    c_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
    mask: Tensor | None,
    steps: slice | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """For each step, or some: the state and cell state it starts from, and the state in its recurrent products."""
    steps = slice(0, len(trace.output)) if steps is None else steps
    h = before(trace.output, h_0, lengths, recurrence.reverse, steps)
    c = None if c_0 is None else before(trace.cells, c_0.to(trace.cells.dtype), lengths, recurrence.reverse, steps)
    if reset is not None:
        cleared = reset[steps].unsqueeze(-1)
        h = h.masked_fill(cleared, 0)
        c = None if c is None else c.masked_fill(cleared, 0)
    return h, c, h if mask is None else h * mask
