"""The long short-term memory over a whole sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnnkernels import reference
from rnnkernels.kernels.directions import each_direction
from rnnkernels.kernels.eager import onednn
from rnnkernels.kernels.eager.general import with_gates
from rnnkernels.kernels.eager.variable_length import padding, reversed_within
from rnnkernels.kernels.recurrence import Recurrence, Trace, Weights
from rnnkernels.ops._checks import Arguments, check_recurrent, check_tensor, differentiable
from rnnkernels.ops._general import Options, check_options, run
from rnnkernels.ops._sequence import (
    differentiable_gradients,
    given,
    kernels,
    layer_gradients,
    lengths_within,
    of_directions,
    pieces_of_time,
    project,
    project_normalized,
    results_of,
    state_after,
    state_before,
    total,
    transformed,
    without_padding,
)

FEW_STEPS = 2
"""So many steps are trained faster cell by cell than by oneDNN's layer (a CPU, 1 thread, torch 2.13)."""

_OF_OPTIONS = ("weight_hr", "weight_peephole", "norm_ih", "norm_hh", "norm_cell_weight", "norm_cell_bias")


def lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    weight_peephole: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    grad_clip: float | None = None,
    recompute_gates: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The long short-term memory over a whole sequence: one layer, one direction.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    With ``weight_hr``, $h_t = W_{hr} (o_t \odot \tanh(c_t))$. With ``weight_peephole``, $p_i \odot c_{t-1}$,
    $p_f \odot c_{t-1}$ and $p_o \odot c_t$ join the arguments of the gates i, f and o.

    Differentiable in every tensor, from the gradients of all results; twice where ``create_graph=True``. Back ends and
    determinism as for :func:`rnnkernels.ops.rnn`. The cell state is float32 or better from step to step.

    Parameters
    ----------
    input, reverse, lengths, reset, recurrent_dropout, zoneout, training, seed
        As in :func:`rnnkernels.ops.rnn`.
    h_0 : Tensor, shape (batch, state_size)
        ``state_size`` is that of the projection, or ``hidden_size`` without one.
    c_0 : Tensor, shape (batch, hidden_size)
        The states before the first step taken. Type and device as ``input``, here and below.
    weight_ih : Tensor, shape (4 * hidden_size, input_size)
        $W_{ii}$, $W_{if}$, $W_{ig}$ and $W_{io}$, one below the other.
    weight_hh : Tensor, shape (4 * hidden_size, state_size)
        $W_{hi}$, $W_{hf}$, $W_{hg}$ and $W_{ho}$.
    bias_ih, bias_hh : Tensor, shape (4 * hidden_size,), optional
        Left out where None.
    weight_hr : Tensor, shape (state_size, hidden_size), optional
        The projection of the state [1]_.
    weight_peephole : Tensor, shape (3, hidden_size), optional
        $p_i$, $p_f$ and $p_o$ [2]_.
    norm_ih, norm_hh : Tensor, shape (4 * hidden_size,), optional
        Gains of layer normalizations of the products with ``weight_ih`` and ``weight_hh``, over all gates together,
        before the biases are added [3]_.
    norm_cell_weight, norm_cell_bias : Tensor, shape (hidden_size,), optional
        Gain and bias of a layer normalization of $c_t$ where it enters $h_t$ [3]_. Both or none.
    zoneout_cell : float
        As ``zoneout``, for the cell state. $h_t$ is made from the new cell state, before its zoneout [4]_. Default: 0.
    grad_clip : float, optional
        Bound on each element of the gradients of the gates' arguments, on their way back through time [5]_. Default:
        none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes the gates again, of all steps at once, from the states
        and the input. Between the passes that saves sequence_length * batch * 4 * hidden_size values, and those that
        ``norm_hh`` and ``zoneout_cell`` add. On a CPU the plain LSTM keeps nothing but its arguments then, and runs the
        forward pass again. On Triton, where gates are not kept, be it for this or because no gradient is wanted, a long
        sequence runs in pieces of time, so that those of few steps exist at once. Default: False.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, state_size)
        $h_t$ for every step.
    h_n : Tensor, shape (batch, state_size)
    c_n : Tensor, shape (batch, hidden_size)
        The states after the last step taken.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`rnnkernels.ops.rnn`.

    References
    ----------
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), 1735-1780; forget gate: Gers,
    Schmidhuber and Cummins, Neural Computation 12 (2000), 2451-2471.

    .. [1] Sak, Senior and Beaufays, "Long short-term memory based recurrent neural network architectures for large
       vocabulary speech recognition", arXiv:1402.1128 (2014).
    .. [2] Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3 (2002),
       115-143.
    .. [3] Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), supplementary material.
    .. [4] Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017, section
       3.2.
    .. [5] Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850 (2013), section 2.1.

    Examples
    --------
    >>> input, zeros = torch.randn(7, 2, 3), torch.zeros(2, 5)
    >>> output, h_n, c_n = lstm(input, zeros, zeros, torch.randn(20, 3), torch.randn(20, 5), zoneout=0.1, seed=1)
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 5]), torch.Size([2, 5]))
    """
    options = check_options(
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        zoneout_cell=zoneout_cell,
        training=training,
        seed=seed,
        grad_clip=grad_clip,
        recompute_gates=recompute_gates,
    )
    if (norm_cell_weight is None) != (norm_cell_bias is None):
        missing = "norm_cell_weight" if norm_cell_weight is None else "norm_cell_bias"
        raise ValueError(f"{missing}: expected a Tensor, as norm_cell_weight and norm_cell_bias go together, got None")
    arguments = check_recurrent(
        4,
        input=input,
        h_0=h_0,
        c_0=c_0,
        weight_ih=weight_ih,
        weight_hh=weight_hh,
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        weight_hr=weight_hr,
        weight_peephole=weight_peephole,
        norm_ih=norm_ih,
        norm_hh=norm_hh,
        norm_cell_weight=norm_cell_weight,
        norm_cell_bias=norm_cell_bias,
        lengths=lengths,
        reset=reset,
    )
    tensors = arguments.tensors
    if transformed():
        return reference.lstm(
            **tensors,
            reverse=reverse,
            lengths=arguments.lengths,
            reset=arguments.reset,
            **options.of_reference("recurrent_dropout", "zoneout", "zoneout_cell"),
        )
    if options.needed or reset is not None or any(tensors[name] is not None for name in _OF_OPTIONS):
        return _with_options(arguments, options, reverse)
    plain = [tensor for name, tensor in tensors.items() if name not in _OF_OPTIONS]
    if arguments.backend == "eager" and tensors["h_0"].numel() and onednn.available(tensors["input"]):
        # While it is compiled or exported, the number of steps must stay open.
        few = not torch.compiler.is_compiling() and lengths is None and len(input) <= FEW_STEPS
        if few and not recompute_gates and differentiable(plain):
            return _steps(*plain, reverse)
        return _native(*plain, arguments.lengths, reverse, recompute_gates)
    keeps_none = recompute_gates or not differentiable(plain)
    return torch.ops.rnnkernels.lstm(*plain, arguments.lengths, reverse, keeps_none, arguments.backend)[:3]


def _with_options(arguments: Arguments, options: Options, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    tensors = arguments.tensors
    weight_ih = tensors["weight_ih"]
    projected = project_normalized(
        without_padding(tensors["input"], arguments.lengths),
        weight_ih,
        tensors["norm_ih"],
        (weight_ih.shape[0],),
        (tensors["bias_ih"], tensors["bias_hh"]),
    )
    return run("lstm", projected, arguments, options, reverse=reverse)


def _steps(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain LSTM cell by cell."""
    states, output = (h_0, c_0), []
    for step in input.flip(0).unbind(0) if reverse else input.unbind(0):
        states = torch.lstm_cell(step, states, weight_ih, weight_hh, bias_ih, bias_hh)
        output.append(states[0])
    return torch.stack(output[::-1] if reverse else output), *states


def _native(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    recompute_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain LSTM on oneDNN, with lengths or without."""
    absent = None if bias_ih is not None and bias_hh is not None else weight_ih.new_zeros(weight_ih.shape[0])
    biases = tuple(absent if bias is None else bias for bias in (bias_ih, bias_hh))
    if lengths is None:
        return _layer(input, h_0, c_0, weight_ih, weight_hh, *biases, reverse, recompute_gates)
    order = None
    if reverse:
        # Every sequence starts at its own last step: read each backwards, within its length.
        order = reversed_within(lengths, input.shape[0]).unsqueeze(-1)
        input = input.gather(0, order.expand_as(input))
    weights = onednn.weight_that_holds(weight_ih), weight_hh, *biases
    over_time = _in_parts if _parts_pay(input, weight_ih, weight_hh) else _at_once
    output, c_n = over_time(input, h_0, c_0, weights, lengths, recompute_gates)
    h_n = output.gather(0, (lengths - 1).view(1, -1, 1).expand(1, *h_0.shape)).squeeze(0)
    if order is not None:
        output = output.gather(0, order.expand_as(output))
    return output.masked_fill(padding(lengths, output.shape[0]), 0), h_n, c_n


def _at_once(
    input: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Tensor, recompute_gates: bool
) -> tuple[Tensor, Tensor]:
    """All states, anything in the padding, and the final cell states."""
    output, _, c_n = _layer(onednn.hold_in_padding(input, lengths), h_0, c_0, *weights, False, recompute_gates)
    return output, c_n


PARTS = 4
"""Parts of time in which sequences of different lengths run, each without those that ended before it."""

_ENOUGH = 1e8
"""Multiplications from which parts pay (a CPU, 2 threads, torch 2.13)."""


def _parts_pay(input: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> bool:
    if torch.compiler.is_compiling():  # sizes must stay open, and lengths are unknown
        return False
    sequence_length, batch, _ = input.shape
    return batch >= PARTS and sequence_length * batch * (weight_ih.numel() + weight_hh.numel()) >= _ENOUGH


def _in_parts(
    input: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Tensor, recompute_gates: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`_at_once` computes: a part ends where a quarter of the sequences have."""
    batch = len(lengths)
    order = torch.argsort(lengths, descending=True, stable=True)
    inverse, longest_first = torch.argsort(order), lengths[order]
    ends = longest_first.tolist()
    input, h, c = input.index_select(1, order), h_0.index_select(0, order), c_0.index_select(0, order)
    states, final, start, running = [], [], 0, batch
    for stop in sorted({ends[batch * part // PARTS] for part in range(PARTS)}):
        held = onednn.hold_in_padding(input[start:stop, :running], longest_first[:running] - start)
        output, _, c = _layer(held, h, c, *weights, False, recompute_gates)
        states.append(functional.pad(output, (0, 0, 0, batch - running)))
        running = sum(end > stop for end in ends[:running])
        final.append(c[running:])
        h, c, start = output[-1, :running], c[:running], stop
    states.append(input.new_zeros(len(input) - start, batch, h_0.shape[1]))
    return torch.cat(states).index_select(1, inverse), torch.cat(final[::-1]).index_select(0, inverse)


def run_onednn(
    input: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain LSTM for a module that has checked all but its weights, where :func:`onednn.available` holds.

    ``weights`` end with both biases, or have none.
    """
    rows = 4 * h_0.shape[1]
    shapes = (rows, input.shape[2]), (rows, h_0.shape[1]), (rows,), (rows,)
    for name, weight, shape in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, shapes, strict=False):
        if weight.shape != shape or weight.dtype != input.dtype or weight.device != input.device:
            check_tensor(name, weight, shape, like=input)
    if len(weights) == 2:
        absent = input.new_zeros(rows)
        weights = *weights, absent, absent
    return _layer(input, h_0, c_0, *weights, reverse)


def _layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse, recompute_gates=False):
    tensors = input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    if torch.compiler.is_compiling() or (recompute_gates and differentiable(tensors)):
        return torch.ops.rnnkernels.lstm_onednn(*tensors, reverse)
    return onednn.forward(*tensors, reverse)[:3]


@torch.library.custom_op("rnnkernels::lstm_onednn", mutates_args=())
def _lstm_onednn(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """oneDNN's layer for torch.compile and torch.export, and where the gates are not to be kept.

    The first two have to know the shape of all that is kept, and only oneDNN knows that of its workspace. The backward
    pass runs the forward pass again.
    """
    tensors = input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    with torch.no_grad():
        return onednn.forward(*tensors, reverse)[:3]


@_lstm_onednn.register_fake
def _(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse):
    return (
        input.new_empty(*input.shape[:2], h_0.shape[1]),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        torch.empty_like(c_0, memory_format=torch.contiguous_format),
    )


@torch.library.custom_op("rnnkernels::lstm_onednn_backward", mutates_args=())
def _lstm_onednn_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    return onednn.backward(grad_output, grad_h_n, grad_c_n, *tensors, reverse)


@_lstm_onednn_backward.register_fake
def _(grad_output, grad_h_n, grad_c_n, *tensors_and_reverse):
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors_and_reverse[:7])


def _setup_onednn(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward_onednn(ctx, *cotangents):
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:7]
    if torch.is_grad_enabled():
        results = reference.lstm(*tensors, reverse=ctx.reverse)
        return *differentiable_gradients(results, tensors, needs, cotangents), None
    gradients = torch.ops.rnnkernels.lstm_onednn_backward(*cotangents, *tensors, ctx.reverse)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None


_lstm_onednn.register_autograd(_backward_onednn, setup_context=_setup_onednn)


@torch.library.custom_op("rnnkernels::lstm", mutates_args=())
def _lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool | None,
    recompute_gates: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, final states, activated gates, empty if not kept, and all cell states.

    On Triton ``reverse`` may be None: both directions, along a leading dimension of states, weights and results.
    """
    pieces = pieces_of_time(input, weight_hh.shape[-2], reverse, not recompute_gates, backend)
    if len(pieces) == 1:
        gates = project(input, weight_ih, bias_ih, bias_hh)
        with torch.cuda.device_of(input):
            output, h_n, c_n, cells = kernels(backend, "lstm").forward(gates, h_0, c_0, weight_hh, lengths, reverse)
        return output, h_n, c_n, input.new_empty(0) if recompute_gates else gates, cells
    output = input.new_empty(*input.shape[:2], weight_hh.shape[1])
    cells = torch.empty_like(output, dtype=torch.promote_types(input.dtype, torch.float32))
    h, c = h_0, c_0.to(cells.dtype)
    for steps in pieces:
        gates, within = project(input[steps], weight_ih, bias_ih, bias_hh), lengths_within(lengths, steps)
        with torch.cuda.device_of(input):
            output[steps], h_n, c, cells[steps] = kernels(backend, "lstm").forward(
                gates, h, c, weight_hh, within, reverse
            )
        h = state_after(h_n, h, within)
    return output, h.clone(), c.to(c_0.dtype, copy=True), input.new_empty(0), cells


@_lstm.register_fake
def _(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, recompute_gates, backend):
    steps, batch, _ = input.shape
    *both, _, hidden_size = weight_hh.shape
    return (
        input.new_empty(*both, steps, batch, hidden_size),
        input.new_empty(*both, batch, hidden_size),
        input.new_empty(*both, batch, hidden_size),
        input.new_empty(0) if recompute_gates else input.new_empty(*both, steps, batch, 4 * hidden_size),
        input.new_empty(*both, steps, batch, hidden_size, dtype=torch.promote_types(input.dtype, torch.float32)),
    )


def _activate_again(
    gates: Tensor,
    output: Tensor,
    cells: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    *,
    reverse: bool,
) -> tuple[()]:
    """Turn ``gates``, which hold the projected input, into the activated gates, from the states."""
    trace = Trace(output, h_0, c_0, gates, cells, None, None)
    recurrence = Recurrence("lstm", reverse=reverse)
    with_gates(gates, trace, h_0, c_0, Weights(weight_hh), lengths, None, recurrence, gates=gates)
    return ()


@torch.library.custom_op("rnnkernels::lstm_backward", mutates_args=())
def _lstm_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool | None,
    recompute_gates: bool,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, both states, both weights and a bias; empty where ``needs`` says that nobody asks."""
    parameters, options = (weight_ih, weight_hh, bias_ih, bias_hh), (reverse, recompute_gates, backend, needs)
    pieces = pieces_of_time(input, weight_hh.shape[-2], reverse, not recompute_gates, backend)
    if len(pieces) == 1:
        cotangents = grad_output, grad_h_n, grad_c_n
        return _back(*cotangents, output, gates, cells, input, h_0, c_0, *parameters, lengths, *options)
    grad_h, grad_c, of_input, of_weights = grad_h_n, grad_c_n.to(cells.dtype), [], []
    for steps in reversed(pieces):
        h = state_before(output, h_0, lengths, reverse, steps)
        c = state_before(cells, c_0.to(cells.dtype), lengths, reverse, steps)
        cotangents, known = (grad_output[steps], grad_h, grad_c), (output[steps], gates, cells[steps], input[steps])
        within = lengths_within(lengths, steps)
        grad_input, grad_h, grad_c, *rest = _back(*cotangents, *known, h, c, *parameters, within, *options)
        of_input.append(grad_input)
        of_weights.append(rest)
    grad_input = torch.cat(of_input if reverse else of_input[::-1])
    return grad_input, grad_h, grad_c.to(c_0.dtype), *map(total, zip(*of_weights, strict=True))


def _back(
    grad_output,
    grad_h_n,
    grad_c_n,
    output,
    gates,
    cells,
    input,
    h_0,
    c_0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    lengths,
    reverse,
    recompute_gates,
    backend,
    needs,
):
    """What the operator returns for some steps, or all."""
    if recompute_gates:
        gates = project(input, weight_ih, bias_ih, bias_hh)
        known = gates, output, cells, h_0, c_0, weight_hh
        if reverse is None:
            each_direction(_activate_again, known, lengths)
        else:
            _activate_again(*known, lengths, reverse=reverse)
    with torch.cuda.device_of(input):
        grad_gates, grad_h_0, grad_c_0 = kernels(backend, "lstm").backward(
            grad_output, grad_h_n, grad_c_n, output, gates, cells, h_0, c_0, weight_hh, lengths, reverse
        )
    grad_input, *of_weights = of_directions(
        layer_gradients,
        (grad_gates, output, h_0, weight_ih, weight_hh),
        without_padding(input, lengths),
        lengths,
        needs=needs,
        reverse=reverse,
    )
    return grad_input, grad_h_0, grad_c_0, *of_weights


@_lstm_backward.register_fake
def _(grad_output, grad_h_n, grad_c_n, output, gates, cells, input, h_0, c_0, weight_ih, weight_hh, *options, **named):
    needs = named["needs"] if "needs" in named else options[-1]
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias = needs
    shapes = (input.shape, h_0.shape, c_0.shape, weight_ih.shape, weight_hh.shape, weight_hh.shape[:-1])
    wanted = (needs_input, True, True, needs_weight_ih, needs_weight_hh, needs_bias)
    return tuple(input.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _setup_context(ctx, inputs, output):
    *tensors, reverse, recompute_gates, backend = inputs
    *results, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *results, gates, cells)
    ctx.options = {"reverse": reverse, "recompute_gates": recompute_gates, "backend": backend}


def _backward(ctx, *gradients):
    *tensors, lengths, output, h_n, c_n, gates, cells = ctx.saved_tensors
    grad_output, grad_h_n, grad_c_n = given(gradients, (output, h_n, c_n))
    input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh = tensors
    needs = list(ctx.needs_input_grad[:7])
    if torch.is_grad_enabled():
        results = results_of(reference.lstm, input, tensors[1:], reverse=ctx.options["reverse"], lengths=lengths)
        gradients = differentiable_gradients(results, tensors, needs, (grad_output, grad_h_n, grad_c_n))
        return *gradients, *[None] * 4
    *gradients, grad_bias = torch.ops.rnnkernels.lstm_backward(
        grad_output,
        grad_h_n,
        grad_c_n,
        output,
        gates,
        cells,
        input,
        h_0,
        c_0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        lengths,
        needs=[needs[0], needs[3], needs[4], needs[5] or needs[6]],
        **ctx.options,
    )
    # Two parameters must not share the memory of their gradients.
    gradients += [grad_bias, grad_bias.clone() if needs[5] and needs[6] else grad_bias]
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 4


_lstm.register_autograd(_backward, setup_context=_setup_context)
