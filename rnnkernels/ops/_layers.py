"""All layers of a plain stack in one operator, which takes neighbouring layers in one launch where they fit.

On Triton alone: elsewhere nothing is gained over an operator for each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rnnkernels import reference
from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.kernels.eager.products import linear
from rnnkernels.kernels.eager.random import key_of
from rnnkernels.ops._checks import check_recurrent
from rnnkernels.ops._general import PARTS, ROWS
from rnnkernels.ops._sequence import (
    differentiable_gradients,
    given,
    kernels,
    projection_gradients,
    recurrent_weight_gradient,
    without_padding,
)
from rnnkernels.ops.dropout import dropout as drop
from rnnkernels.ops.gru import projection_bias

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Weights of a layer, in the operator's order; the biases may be absent from all layers."""


def serves(cell: str, input: Tensor, hidden_size: int, num_layers: int) -> bool:
    """Whether :func:`layers` is for this input: on Triton, and where any two layers fit in one launch.

    While it is compiled, sizes must stay open: the operator then chooses for itself.
    """
    dtype = autocast_dtype(input.device) or input.dtype
    if resolve(input.device, dtype) != "triton":
        return False
    if torch.compiler.is_compiling():
        return True
    dispatch = kernels("triton", "dispatch")
    return dispatch.wavefront(cell, hidden_size, input.shape[1], num_layers, dtype, input.device) is not None


def layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[dict[str, Tensor]],
    *,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Sequence[Tensor] = (),
    nonlinearity: str = "tanh",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stack of plain layers over a whole sequence, each reading the states of the one below.

    Parameters
    ----------
    cell : {"rnn", "gru", "lstm"}
    input : Tensor, shape (sequence_length, batch, input_size)
    states : sequence of Tensor, shape (layer, batch, hidden_size)
        h_0, and c_0 for the LSTM.
    weights : sequence of dict
        Those of each layer by name.
    lengths : Tensor of int64, shape (batch,), optional
    dropout : float
        Probability of zeroing an output of each layer but the last.
    seeds : sequence of Tensor
        The seed of :func:`rnnkernels.ops.dropout` for each layer but the last; none where there is no dropout.
    nonlinearity : str
        The RNN's.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
        The states of the last layer.
    final : tuple of Tensor, shape (layer, batch, hidden_size)
        The final states.
    """
    flat = []
    for layer, own in enumerate(weights):
        named = dict(zip(("h_0", "c_0"), (state[layer] for state in states), strict=False))
        of_layer = input if layer == 0 else states[0][:1]
        arguments = check_recurrent(
            ROWS[cell], input=of_layer, **named, **own, lengths=None if layer else lengths, reset=None
        )
        if layer == 0:
            input, lengths, backend = arguments.tensors["input"], arguments.lengths, arguments.backend
        flat += [arguments.tensors[name] for name in own]
    states = [state.to(input.dtype) for state in states]
    h_0, c_0 = states if len(states) == 2 else (states[0], None)
    output, h_n, c_n, *_ = torch.ops.rnnkernels.layers(
        input,
        h_0,
        c_0,
        flat,
        lengths,
        torch.stack(list(seeds)) if seeds else None,
        dropout,
        cell,
        nonlinearity,
        backend,
    )
    return output, (h_n,) if c_0 is None else (h_n, c_n)


@dataclass(frozen=True)
class _Stack:
    """What both passes are given, layer by layer."""

    h_0: Tensor
    c_0: Tensor | None
    weights: Sequence[Tensor]
    lengths: Tensor | None
    seeds: Tensor | None
    dropout: float
    cell: str
    nonlinearity: str
    backend: str

    def __len__(self) -> int:
        return len(self.h_0)

    @property
    def hidden_size(self) -> int:
        return self.h_0.shape[-1]

    def named(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer by name."""
        each = len(self.weights) // len(self)
        return dict(zip(NAMES, self.weights[each * layer : each * (layer + 1)], strict=False))

    def outer_bias(self, layer: int) -> Tensor | None:
        """What is added to the product with the layer's input."""
        weights = self.named(layer)
        if "bias_ih" not in weights:
            return None
        if self.cell == "gru":
            return projection_bias(weights["bias_ih"], weights["bias_hh"])
        return weights["bias_ih"] + weights["bias_hh"]

    def lane_biases(self, first: int, last: int) -> Tensor:
        """(lane, part, unit): what the wavefront adds to every sum; its lowest lane has the outer bias already."""
        rows = []
        for layer in range(first, last):
            bias = self.outer_bias(layer) if layer > first else None
            row = self.h_0.new_zeros(ROWS[self.cell] * self.hidden_size) if bias is None else bias
            if self.cell == "gru":
                inner = self.named(layer).get("bias_hh")
                inner = row.new_zeros(self.hidden_size) if inner is None else inner[2 * self.hidden_size :]
                row = torch.cat([inner, row])
            rows.append(row)
        return torch.stack(rows).view(last - first, PARTS[self.cell], self.hidden_size)

    def squares(self, first: int, last: int):
        """The weights of these layers, as the wavefront takes them."""
        named = [self.named(layer) for layer in range(first, last)]
        outer, inner = [own["weight_ih"] for own in named[1:]], [own["weight_hh"] for own in named]
        return kernels(self.backend, "wavefront").squares(self.cell, outer, inner)

    def between(self, first: int, last: int):
        """Dropout between these layers."""
        if self.seeds is None:
            return None
        keys = [key_of(seed) for seed in self.seeds[first : last - 1].tolist()]
        return kernels(self.backend, "wavefront").Dropout(self.dropout, keys)

    def dropped(self, output: Tensor, layer: int) -> Tensor:
        """What the layer above reads of the states of a layer; or the gradient of the states from that of it."""
        if self.seeds is None:
            return output
        return kernels(self.backend, "random").dropout(output, self.dropout, key_of(int(self.seeds[layer])), False)

    def design(self, batch: int):
        """The design that takes several layers in one launch; None where there is none."""
        dispatch = kernels(self.backend, "dispatch")
        return dispatch.wavefront(self.cell, self.hidden_size, batch, len(self), self.h_0.dtype, self.h_0.device)


@torch.library.custom_op("rnnkernels::layers", mutates_args=())
def _layers(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    seeds: Tensor | None,
    dropout: float,
    cell: str,
    nonlinearity: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States of the last layer, final states, final cell states; for the backward pass the states of the other layers,
    and the gates and cell states of all. Empty where the cell has none."""
    stack = _Stack(h_0, c_0, weights, lengths, seeds, dropout, cell, nonlinearity, backend)
    (steps, batch, _), size, number = input.shape, stack.hidden_size, len(stack)
    below, output = input.new_empty(number - 1, steps, batch, size), input.new_empty(steps, batch, size)
    gates = input.new_empty(0 if cell == "rnn" else (number, steps, batch, 4 * size))
    cells = input.new_empty((number, steps, batch, size) if cell == "lstm" else 0, dtype=torch.float32)
    h_n = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    c_n = torch.empty_like(h_n) if cell == "lstm" else h_n.new_empty(0)
    with torch.cuda.device_of(input):
        first, design = 0, stack.design(batch)
        while first < number:
            last = min(first + design.lanes, number) if design else first + 1
            states = below[first] if first < number - 1 else output
            place = states if cell == "rnn" else gates[first]
            place = place.flatten(0, 1)[:, size:] if cell == "gru" else place.flatten(0, 1)
            linear(input.flatten(0, 1), stack.named(first)["weight_ih"], stack.outer_bias(first), out=place)
            if last - first > 1:
                highest = below[last - 1] if last < number else output
                final = kernels(backend, "wavefront").forward(
                    cell,
                    replace(design, lanes=last - first),
                    gates[first:last] if cell != "rnn" else below[first:],
                    h_0[first:last],
                    None if c_0 is None else c_0[first:last],
                    stack.squares(first, last),
                    stack.lane_biases(first, last),
                    lengths,
                    below[first : last - 1],
                    highest,
                    None if c_0 is None else cells[first:last],
                    stack.between(first, last),
                    nonlinearity,
                )
                if final is None:  # the GPU refused the launch
                    design = None
                    continue
                h_n[first:last] = final
                if cell == "lstm":
                    c_n[first:last] = cells[first:last, -1]
                states = highest
            else:
                _forward_alone(stack, first, states, gates, cells, h_n, c_n)
            if last < number:
                input = stack.dropped(states, last - 1)
            first = last
    return output, h_n, c_n, below, gates, cells


def _forward_alone(
    stack: _Stack, layer: int, states: Tensor, gates: Tensor, cells: Tensor, h_n: Tensor, c_n: Tensor
) -> None:
    """One layer of the forward pass in a launch of its own."""
    module, weights = kernels(stack.backend, stack.cell), stack.named(layer)
    h_0, weight_hh, lengths = stack.h_0[layer], weights["weight_hh"], stack.lengths
    if stack.cell == "rnn":
        h_n[layer] = module.forward(states, h_0, weight_hh, lengths, stack.nonlinearity, False)
    elif stack.cell == "gru":
        output, h_n[layer] = module.forward(gates[layer], h_0, weight_hh, weights.get("bias_hh"), lengths, False)
        states.copy_(output)
    else:
        output, h_n[layer], c_n[layer], cells[layer] = module.forward(
            gates[layer], h_0, stack.c_0[layer], weight_hh, lengths, False
        )
        states.copy_(output)


@_layers.register_fake
def _(input, h_0, c_0, weights, lengths, seeds, dropout, cell, nonlinearity, backend):
    (steps, batch, _), (number, _, size) = input.shape, h_0.shape
    has_cells = cell == "lstm"
    return (
        input.new_empty(steps, batch, size),
        input.new_empty(number, batch, size),
        input.new_empty((number, batch, size) if has_cells else 0),
        input.new_empty(number - 1, steps, batch, size),
        input.new_empty(0 if cell == "rnn" else (number, steps, batch, 4 * size)),
        input.new_empty((number, steps, batch, size) if has_cells else 0, dtype=torch.float32),
    )


@torch.library.custom_op("rnnkernels::layers_backward", mutates_args=())
def _layers_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    output: Tensor,
    below: Tensor,
    gates: Tensor,
    cells: Tensor,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    seeds: Tensor | None,
    dropout: float,
    cell: str,
    nonlinearity: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of input, both states and all weights; empty where there is none or ``needs`` says that nobody asks."""
    stack = _Stack(h_0, c_0, weights, lengths, seeds, dropout, cell, nonlinearity, backend)
    number, each = len(stack), len(weights) // len(stack)
    needs_input, *needs_weights = needs
    grad_h_0 = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    grad_c_0 = h_0.new_empty(0) if c_0 is None else torch.empty_like(c_0, memory_format=torch.contiguous_format)
    grad_weights = [None] * len(weights)
    states = [*below, output]
    with torch.cuda.device_of(input):
        last, design = number, stack.design(input.shape[1])
        while last > 0:
            first = max(last - design.lanes, 0) if design else last - 1
            if last - first > 1:
                gradients = output.new_empty(last - first, *output.shape[:2], PARTS[cell] * stack.hidden_size)
                final = kernels(backend, "wavefront").backward(
                    cell,
                    replace(design, lanes=last - first),
                    grad_output,
                    grad_h_n[first:last],
                    None if c_0 is None else grad_c_n[first:last],
                    below[first : last - 1],
                    states[last - 1],
                    None if cell == "rnn" else gates[first:last],
                    None if c_0 is None else cells[first:last],
                    h_0[first:last],
                    None if c_0 is None else c_0[first:last],
                    stack.squares(first, last),
                    lengths,
                    stack.between(first, last),
                    gradients,
                    nonlinearity,
                )
                if final is None:  # the GPU refused the launch
                    design = None
                    continue
                grad_h_0[first:last] = final[0]
                if c_0 is not None:
                    grad_c_0[first:last] = final[1]
            else:
                saved = states[first], gates[first : first + 1], cells[first : first + 1]
                gradients = [_backward_alone(stack, first, grad_output, grad_h_n, grad_c_n, saved, grad_h_0, grad_c_0)]
            for layer, gradient in zip(range(first, last), gradients, strict=True):
                needs_weights_here = needs_weights[each * layer : each * (layer + 1)]
                needs_input_here = layer == first if first else needs_input and layer == 0
                values = without_padding(input, lengths) if layer == 0 else states[layer - 1]
                if layer and needs_weights_here[0]:
                    values = stack.dropped(values, layer - 1)
                grad_input, *own = _gradients_around(
                    stack, layer, gradient, values, states[layer], (needs_input_here, *needs_weights_here)
                )
                grad_weights[each * layer : each * (layer + 1)] = own
                if layer == first:
                    of_lowest = grad_input
            if first:
                grad_output = stack.dropped(of_lowest, first - 1)
            last = first
    return of_lowest, grad_h_0, grad_c_0, grad_weights


def _backward_alone(
    stack: _Stack,
    layer: int,
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    grad_h_0: Tensor,
    grad_c_0: Tensor,
) -> Tensor:
    """One layer of the backward pass in a launch of its own: the gradients of its gates before their activations."""
    module, weight_hh = kernels(stack.backend, stack.cell), stack.named(layer)["weight_hh"]
    h_0, lengths, (output, gates, cells) = stack.h_0[layer], stack.lengths, saved
    if stack.cell == "rnn":
        gradient, grad_h_0[layer] = module.backward(
            grad_output, grad_h_n[layer], output, weight_hh, lengths, stack.nonlinearity, False
        )
    elif stack.cell == "gru":
        gradient, grad_h_0[layer] = module.backward(
            grad_output, grad_h_n[layer], output, gates[0], h_0, weight_hh, lengths, False
        )
    else:
        gradient, grad_h_0[layer], grad_c_0[layer] = module.backward(
            *(grad_output, grad_h_n[layer], grad_c_n[layer], output, gates[0], cells[0]),
            *(h_0, stack.c_0[layer], weight_hh, lengths, False),
        )
    return gradient


def _gradients_around(
    stack: _Stack, layer: int, gradient: Tensor, values: Tensor, states: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of a layer's input ``values`` and of its weights, from that of its gates; empty where not needed."""
    weights, size, is_gru = stack.named(layer), stack.hidden_size, stack.cell == "gru"
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh = (*needs, False, False)[:5]
    from_input, from_state = (gradient[..., size:], gradient[..., : 3 * size]) if is_gru else (gradient, gradient)
    grad_input, grad_weight_ih, grad_bias_ih = projection_gradients(
        from_input.flatten(0, 1),
        values.flatten(0, 1),
        weights["weight_ih"],
        (needs_input, needs_weight_ih, needs_bias_ih or (needs_bias_hh and not is_gru)),
    )
    grad_weight_hh, grad_bias_hh = gradient.new_empty(0), gradient.new_empty(0)
    # The GRU's parts stand in the order (n, r, z), the rows of its weights in (r, z, n).
    if needs_weight_hh:
        grad_weight_hh = recurrent_weight_gradient(from_state, states, stack.h_0[layer], stack.lengths, False)
        grad_weight_hh = grad_weight_hh.roll(-size, 0) if is_gru else grad_weight_hh
    if needs_bias_hh:
        # Two parameters must not share the memory of their gradients.
        grad_bias_hh = from_state.flatten(0, 1).sum(0).roll(-size, 0) if is_gru else grad_bias_ih.clone()
    grad_input = grad_input.view(values.shape) if needs_input else grad_input
    return [grad_input, *(grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh)[: len(weights)]]


@_layers_backward.register_fake
def _(grad_output, grad_h_n, grad_c_n, output, below, gates, cells, input, h_0, c_0, weights, *options, **named):
    needs_input, *needs_weights = named["needs"] if "needs" in named else options[-1]
    return (
        input.new_empty(input.shape if needs_input else 0),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(0 if c_0 is None else c_0.shape),
        [weight.new_empty(weight.shape if need else 0) for weight, need in zip(weights, needs_weights, strict=True)],
    )


def _setup_context(ctx, inputs, output):
    input, h_0, c_0, weights, lengths, seeds, *options = inputs
    ctx.mark_non_differentiable(*output[3:], *([output[2]] if c_0 is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, input, h_0, c_0, lengths, seeds, *weights)
    ctx.options = dict(zip(("dropout", "cell", "nonlinearity", "backend"), options, strict=True))


def _backward(ctx, *gradients):
    output, h_n, c_n, *kept, input, h_0, c_0, lengths, seeds = ctx.saved_tensors[:11]
    weights = list(ctx.saved_tensors[11:])
    results = (output, h_n) if c_0 is None else (output, h_n, c_n)
    cotangents = given(gradients, results)
    needs_input, needs_h_0, needs_c_0, needs_weights, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        tensors = input, h_0, c_0, *weights
        needs = needs_input, needs_h_0, needs_c_0, *needs_weights
        results = _reference(*tensors[:3], weights, lengths, seeds, **ctx.options)
        grad_input, grad_h_0, grad_c_0, *grad_weights = differentiable_gradients(results, tensors, needs, cotangents)
    else:
        grad_input, grad_h_0, grad_c_0, grad_weights = torch.ops.rnnkernels.layers_backward(
            *(*cotangents, None)[:3],
            output,
            *kept,
            input,
            h_0,
            c_0,
            weights,
            lengths,
            seeds,
            **ctx.options,
            needs=[needs_input, *needs_weights],
        )
        grad_input, grad_h_0 = grad_input if needs_input else None, grad_h_0 if needs_h_0 else None
        grad_c_0 = grad_c_0 if needs_c_0 else None
        grad_weights = [g if need else None for g, need in zip(grad_weights, needs_weights, strict=True)]
    return grad_input, grad_h_0, grad_c_0, grad_weights, None, None, *[None] * 4


def _reference(input, h_0, c_0, weights, lengths, seeds, *, dropout, cell, nonlinearity, backend) -> tuple[Tensor, ...]:
    """The stack in the reference's equations, for what is differentiated twice."""
    stack = _Stack(h_0, c_0, weights, lengths, seeds, dropout, cell, nonlinearity, backend)
    options = {"nonlinearity": nonlinearity} if cell == "rnn" else {}
    final = []
    for layer in range(len(stack)):
        states = [state[layer] for state in (h_0, c_0) if state is not None]
        output, *last = getattr(reference, cell)(input, *states, **stack.named(layer), lengths=lengths, **options)
        final.append(last)
        if seeds is not None and layer < len(stack) - 1:
            input = drop(output, dropout, seed=seeds[layer])
        else:
            input = output
    return output, *(torch.stack(kind) for kind in zip(*final, strict=True))


_layers.register_autograd(_backward, setup_context=_setup_context)
