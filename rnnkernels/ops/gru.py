"""The gated recurrent unit over a whole sequence."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnnkernels import reference
from rnnkernels.kernels.directions import one_after_the_other
from rnnkernels.kernels.eager import gru as eager
from rnnkernels.kernels.eager.general import with_gates
from rnnkernels.kernels.eager.memory import empty
from rnnkernels.kernels.eager.packing import packing
from rnnkernels.kernels.eager.packing import recurrent_weight_gradient as eager_weight_gradient
from rnnkernels.kernels.eager.products import by_onednn, linear, wants_contiguous_rows
from rnnkernels.kernels.eager.variable_length import reversed_within
from rnnkernels.kernels.recurrence import Recurrence, Trace, Weights
from rnnkernels.ops._checks import Arguments, check_recurrent, differentiable
from rnnkernels.ops._general import Options, check_options, run
from rnnkernels.ops._sequence import (
    differentiable_gradients,
    given,
    kernels,
    lengths_within,
    of_directions,
    pieces_of_time,
    project_both,
    project_normalized,
    projection_gradients,
    recurrent_weight_gradient,
    results_of,
    state_after,
    state_before,
    total,
    transformed,
    without_padding,
)


def gru(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    grad_clip: float | None = None,
    recompute_gates: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The gated recurrent unit over a whole sequence: one layer, one direction.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    or, with ``reset_after=False``,

    .. math:: n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

    Differentiable in every tensor, from the gradients of both results; twice where ``create_graph=True``. Back ends,
    precision and determinism as for :func:`rnnkernels.ops.rnn`.

    Parameters
    ----------
    input, h_0, reverse, lengths, reset, recurrent_dropout, zoneout, training, seed
        As in :func:`rnnkernels.ops.rnn`.
    weight_ih : Tensor, shape (3 * hidden_size, input_size)
        $W_{ir}$, $W_{iz}$ and $W_{in}$, one below the other.
    weight_hh : Tensor, shape (3 * hidden_size, hidden_size)
        $W_{hr}$, $W_{hz}$ and $W_{hn}$.
    bias_ih, bias_hh : Tensor, shape (3 * hidden_size,), optional
        Left out where None.
    reset_after : bool
        Whether the reset gate acts after the product with $W_{hn}$, as in cuDNN and ``torch.nn.GRU``, or before it, as
        first published. Default: True.
    norm_ih, norm_hh : Tensor, shape (3 * hidden_size,), optional
        Gains of layer normalizations of the products with ``weight_ih`` and ``weight_hh``: over the rows of r and z
        together, and over those of n, before the biases are added [1]_.
    grad_clip : float, optional
        Bound on each element of the gradients of the arguments of $\sigma$ and $\tanh$, on their way back through time
        (Graves, arXiv:1308.0850, section 2.1). Default: none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes the gates again, of all steps at once, from the states
        and the input. Between the passes that saves sequence_length * batch * 4 * hidden_size values, and those that
        ``norm_hh`` adds. On Triton, where gates are not kept, be it for this or because no gradient is wanted, a long
        sequence runs in pieces of time, so that those of few steps exist at once. Default: False.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
        $h_t$ for every step.
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`rnnkernels.ops.rnn`.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3; with the reset gate after the product, as in ``torch.nn.GRU``.

    .. [1] Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), supplementary material.

    Examples
    --------
    >>> output, h_n = gru(torch.randn(7, 2, 3), torch.zeros(2, 5), torch.randn(15, 3), torch.randn(15, 5))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """
    options = check_options(
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
        grad_clip=grad_clip,
        recompute_gates=recompute_gates,
    )
    tensors = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    norms = {"norm_ih": norm_ih, "norm_hh": norm_hh}
    arguments = check_recurrent(3, input=input, h_0=h_0, **tensors, **norms, lengths=lengths, reset=reset)
    tensors = arguments.tensors
    if transformed():
        return reference.gru(
            **tensors,
            reset_after=reset_after,
            reverse=reverse,
            lengths=arguments.lengths,
            reset=arguments.reset,
            **options.of_reference("recurrent_dropout", "zoneout"),
        )
    if options.needed or reset is not None or not reset_after or norm_ih is not None or norm_hh is not None:
        return _with_options(arguments, options, reverse=reverse, reset_after=reset_after)
    del tensors["norm_ih"], tensors["norm_hh"]
    wanted = differentiable(tensors.values())
    if arguments.backend == "eager" and not wanted:
        packs = lengths is not None and input.numel() and not torch.compiler.is_compiling()
        if packs or (lengths is None and not by_onednn(h_0, weight_hh)):
            return _native_forward(**tensors, lengths=arguments.lengths, reverse=reverse)
    keeps_none = recompute_gates or not wanted
    output, h_n, _ = torch.ops.rnnkernels.gru(
        *tensors.values(), arguments.lengths, reverse, keeps_none, arguments.backend
    )
    return output, h_n


def _with_options(arguments: Arguments, options: Options, *, reverse: bool, reset_after: bool) -> tuple[Tensor, Tensor]:
    tensors = arguments.tensors
    hidden_size = tensors["weight_hh"].shape[1]
    outer, inner = tensors["bias_hh"], None
    if outer is not None and reset_after:
        # The candidate's belongs inside the reset gate; the others can join the input's.
        inner = outer[2 * hidden_size :]
        outer = torch.cat([outer[: 2 * hidden_size], torch.zeros_like(inner)])
    projected = project_normalized(
        without_padding(tensors["input"], arguments.lengths),
        tensors["weight_ih"],
        tensors["norm_ih"],
        (2 * hidden_size, hidden_size),
        (tensors["bias_ih"], outer),
    )
    return run("gru", projected, arguments, options, reverse=reverse, bias=inner, reset_after=reset_after)


def _native_forward(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own forward pass, the faster one where no gradient is wanted and nothing has to be kept."""
    if (bias_ih is None) != (bias_hh is None):
        absent = weight_ih.new_zeros(weight_ih.shape[0])
        bias_ih, bias_hh = (absent if bias is None else bias for bias in (bias_ih, bias_hh))
    weights = [weight_ih, weight_hh] if bias_ih is None else [weight_ih, weight_hh, bias_ih, bias_hh]
    options = weights, bias_ih is not None, 1, 0.0, False, False
    if lengths is None:
        input = input.flip(0) if reverse else input
        output, h_n = torch.gru(input, h_0.unsqueeze(0), *options, False)
        return output.flip(0) if reverse else output, h_n.squeeze(0)
    if reverse:
        order = reversed_within(lengths, len(input)).unsqueeze(-1)
        input = input.gather(0, order.expand_as(input))
    rows = packing(lengths, *input.shape[:2])
    counts = torch.tensor([count for count in rows.counts if count])
    output, h_n = torch.gru(rows.packed(input), counts, rows.sorted(h_0).unsqueeze(0), *options)
    output = rows.padded(output)
    if reverse:
        output = output.gather(0, order.expand_as(output))
    return output, rows.unsorted(h_n.squeeze(0))


def projection_bias(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """What is added to the product with the input."""
    if bias_hh is None:
        return bias_ih
    # That of the candidate's product with the state belongs inside the reset gate; the others can join the input's.
    hidden_size = bias_hh.shape[-1] // 3
    bias = functional.pad(bias_hh[..., : 2 * hidden_size], (0, hidden_size))
    return bias if bias_ih is None else bias + bias_ih


@torch.library.custom_op("rnnkernels::gru", mutates_args=())
def _gru(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool | None,
    recompute_gates: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """States, final state, and the buffer of activated gates that the kernels' module describes; empty if not kept.

    On Triton ``reverse`` may be None: both directions, along a leading dimension of states, weights and results.
    """
    parameters, options = (weight_ih, weight_hh, bias_ih, bias_hh), (reverse, recompute_gates, backend)
    pieces = pieces_of_time(input, 4 * weight_hh.shape[-1], reverse, not recompute_gates, backend)
    if len(pieces) == 1:
        return _forth(input, h_0, *parameters, lengths, *options)
    output, h = input.new_empty(*input.shape[:2], weight_hh.shape[1]), h_0
    for steps in pieces:
        within = lengths_within(lengths, steps)
        output[steps], h_n, nothing = _forth(input[steps], h, *parameters, within, *options)
        h = state_after(h_n, h, within)
    return output, h.clone(), nothing


def _forth(input, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, recompute_gates, backend):
    """What the operator returns for some steps, or all."""
    steps, batch, _ = input.shape
    *both, _, hidden_size = weight_hh.shape
    gates = empty((*both, steps, batch, 4 * hidden_size), input.dtype, input.device)
    bias = projection_bias(bias_ih, bias_hh)
    nothing = input.new_empty(0)
    if backend == "eager":
        rows = packing(lengths, steps, batch)
        packed = rows.packed(input)
        kept, spare = gates.flatten(0, 1).tensor_split([len(packed)])
        spare.zero_()
        linear(packed, weight_ih, bias, out=kept[:, hidden_size:])
        states, h_n = eager.forward(kept, rows.sorted(h_0), weight_hh, bias_hh, rows.counts, reverse)
        return rows.padded(states), rows.unsorted(h_n), nothing if recompute_gates else gates
    if reverse is None:
        project_both(input, weight_ih, bias, gates[..., hidden_size:])
    else:
        linear(input.flatten(0, 1), weight_ih, bias, out=gates.flatten(0, 1)[:, hidden_size:])
    with torch.cuda.device_of(input):
        output, h_n = kernels(backend, "gru").forward(gates, h_0, weight_hh, bias_hh, lengths, reverse)
    return output, h_n, nothing if recompute_gates else gates


@_gru.register_fake
def _(input, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, recompute_gates, backend):
    steps, batch, _ = input.shape
    *both, _, hidden_size = weight_hh.shape
    return (
        input.new_empty(*both, steps, batch, hidden_size),
        input.new_empty(*both, batch, hidden_size),
        input.new_empty(0) if recompute_gates else input.new_empty(*both, steps, batch, 4 * hidden_size),
    )


def _gates_again(
    output: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    input: Tensor,
    lengths: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor]:
    """The buffer of activated gates, (sequence_length, batch, 4 * hidden_size), from the states."""
    projected = linear(input.flatten(0, 1), weight_ih, projection_bias(bias_ih, bias_hh)).unflatten(0, input.shape[:2])
    weights = Weights(weight_hh, None if bias_hh is None else bias_hh[2 * output.shape[-1] :])
    trace = Trace(output, h_0, None, None, None, None, None)
    recurrence = Recurrence("gru", reverse=reverse)
    return (with_gates(projected, trace, h_0, None, weights, lengths, None, recurrence).gates,)


def _gradients(
    from_input: Tensor,
    from_state: Tensor,
    input: Tensor,
    weight_ih: Tensor,
    weight_gradient: Callable[[Tensor], Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``input``, both weights and both biases; empty where not needed."""
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh = needs
    grad_input, grad_weight_ih, grad_bias_ih = projection_gradients(
        from_input, input, weight_ih, (needs_input, needs_weight_ih, needs_bias_ih)
    )
    grad_weight_hh, grad_bias_hh = input.new_empty(0), input.new_empty(0)
    # The parts of the buffer stand in the order (n, r, z), the rows of the weights in (r, z, n).
    hidden_size = from_state.shape[-1] // 3
    if needs_weight_hh:
        grad_weight_hh = weight_gradient(from_state).roll(-hidden_size, 0)
    if needs_bias_hh:
        grad_bias_hh = from_state.flatten(0, -2).sum(0).roll(-hidden_size, 0)
    return grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh


def _layer_gradients(
    gradient: Tensor,
    output: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    input: Tensor,
    lengths: Tensor | None,
    needs: Sequence[bool],
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`_gradients` returns, of a direction on Triton."""

    def weight_gradient(from_state):
        return recurrent_weight_gradient(from_state, output, h_0, lengths, reverse)

    hidden_size = output.shape[-1]
    from_input, from_state = gradient[..., hidden_size:], gradient[..., : 3 * hidden_size]
    return _gradients(from_input, from_state, input, weight_ih, weight_gradient, needs)


@torch.library.custom_op("rnnkernels::gru_backward", mutates_args=())
def _gru_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    input: Tensor,
    h_0: Tensor,
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
    """Gradients of input, h_0, both weights and both biases; empty where ``needs`` says that nobody asks."""
    parameters, options = (weight_ih, weight_hh, bias_ih, bias_hh), (reverse, recompute_gates, backend, needs)
    pieces = pieces_of_time(input, 4 * weight_hh.shape[-1], reverse, not recompute_gates, backend)
    if len(pieces) == 1:
        return _back(grad_output, grad_h_n, output, gates, input, h_0, *parameters, lengths, *options)
    grad_h, of_input, of_parameters = grad_h_n, [], []
    for steps in reversed(pieces):
        h = state_before(output, h_0, lengths, reverse, steps)
        known, within = (output[steps], gates, input[steps]), lengths_within(lengths, steps)
        grad_input, grad_h, *rest = _back(grad_output[steps], grad_h, *known, h, *parameters, within, *options)
        of_input.append(grad_input)
        of_parameters.append(rest)
    grad_input = torch.cat(of_input if reverse else of_input[::-1])
    return grad_input, grad_h, *map(total, zip(*of_parameters, strict=True))


def _back(
    grad_output,
    grad_h_n,
    output,
    gates,
    input,
    h_0,
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
        known = output, h_0, weight_ih, weight_hh, bias_ih, bias_hh
        if reverse is None:
            (gates,) = one_after_the_other(_gates_again, known, input, lengths)
        else:
            (gates,) = _gates_again(*known, input, lengths, reverse=reverse)
    wanted = [needs[0], *needs[2:]]
    if backend != "eager":
        with torch.cuda.device_of(input):
            gradient, grad_h_0 = kernels(backend, "gru").backward(
                grad_output, grad_h_n, output, gates, h_0, weight_hh, lengths, reverse
            )
        grad_input, *of_weights = of_directions(
            _layer_gradients,
            (gradient, output, h_0, weight_ih),
            without_padding(input, lengths),
            lengths,
            needs=wanted,
            reverse=reverse,
        )
        return grad_input, grad_h_0, *of_weights
    hidden_size = output.shape[-1]
    rows = packing(lengths, *input.shape[:2])
    values, first, states = rows.packed(input), rows.sorted(h_0), rows.packed(output)
    kept = rows.packed(gates) if recompute_gates else gates.flatten(0, 1)[: len(values)]
    gradient, grad_h_0 = eager.backward(
        rows.packed(grad_output), rows.sorted(grad_h_n), states, kept, first, weight_hh, rows.counts, reverse
    )
    from_input, from_state = gradient[:, hidden_size:], gradient[:, : 3 * hidden_size]
    if wants_contiguous_rows(hidden_size):
        from_input, from_state = from_input.contiguous(), from_state.contiguous()

    def weight_gradient(from_state):
        return eager_weight_gradient(from_state, states, first, rows.counts, reverse)

    grad_input, *of_weights = _gradients(from_input, from_state, values, weight_ih, weight_gradient, wanted)
    return rows.padded(grad_input) if needs[0] else grad_input, rows.unsorted(grad_h_0), *of_weights


@_gru_backward.register_fake
def _(grad_output, grad_h_n, output, gates, input, h_0, weight_ih, weight_hh, *biases_and_options, **named):
    needs = named["needs"] if "needs" in named else biases_and_options[-1]
    bias = weight_hh.shape[:-1]
    shapes = (input.shape, h_0.shape, weight_ih.shape, weight_hh.shape, bias, bias)
    kept = (False, True, False, False, False, False)
    return tuple(
        input.new_empty(shape if need or keep else 0) for shape, need, keep in zip(shapes, needs, kept, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, reverse, recompute_gates, backend = inputs
    states, final, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, final, gates)
    ctx.options = {"reverse": reverse, "recompute_gates": recompute_gates, "backend": backend}


def _backward(ctx, *gradients):
    input, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, h_n, gates = ctx.saved_tensors
    grad_output, grad_h_n = given(gradients, (output, h_n))
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled():
        tensors = (input, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
        results = results_of(reference.gru, input, tensors[1:], reverse=ctx.options["reverse"], lengths=lengths)
        gradients = differentiable_gradients(results, tensors, needs, (grad_output, grad_h_n))
    else:
        gradients = torch.ops.rnnkernels.gru_backward(
            grad_output,
            grad_h_n,
            output,
            gates,
            input,
            h_0,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            lengths,
            needs=needs,
            **ctx.options,
        )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 4


_gru.register_autograd(_backward, setup_context=_setup_context)
