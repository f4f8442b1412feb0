"""The plain RNN over a whole sequence."""

import torch
from torch import Tensor

from rnnkernels import reference
from rnnkernels.kernels.eager import rnn as eager
from rnnkernels.kernels.eager.packing import packing
from rnnkernels.kernels.eager.packing import recurrent_weight_gradient as eager_weight_gradient
from rnnkernels.ops._checks import check_choice, check_recurrent
from rnnkernels.ops._general import check_options, run
from rnnkernels.ops._sequence import (
    differentiable_gradients,
    kernels,
    layer_gradients,
    of_directions,
    project,
    project_normalized,
    projection_gradients,
    results_of,
    transformed,
    without_padding,
)

NONLINEARITIES = tuple(reference.ACTIVATIONS)


def rnn(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    norm_hh: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    grad_clip: float | None = None,
    recompute_gates: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The plain (Elman) RNN over a whole sequence: one layer, one direction.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Differentiable in every tensor, from the gradients of both results; twice where ``create_graph=True``. Triton
    kernels do the work on CUDA tensors, PyTorch on all others (see :func:`rnnkernels.use_backend`). Accumulation is in
    float32 or better; float32 products on a GPU follow ``torch.get_float32_matmul_precision()``. The same call gives
    the same bits each time.

    Parameters
    ----------
    input : Tensor, shape (sequence_length, batch, input_size)
        float64, float32, bfloat16 or float16. ``sequence_length`` is at least 1.
    h_0 : Tensor, shape (batch, hidden_size)
        The state before the first step taken. Type and device as ``input``, here and below.
    weight_ih : Tensor, shape (hidden_size, input_size)
    weight_hh : Tensor, shape (hidden_size, hidden_size)
    bias_ih, bias_hh : Tensor, shape (hidden_size,), optional
        Left out where None.
    nonlinearity : {"tanh", "relu", "sigmoid", "identity"}
        $f$. Default: ``"tanh"``.
    reverse : bool
        Run from the last step to the first. ``output[t]`` stays the state at time ``t``. Default: False.
    lengths : Tensor of int64, shape (batch,), optional
        Steps of each sequence, 1 to ``sequence_length``, in any order. At ``t >= lengths[b]`` the state is carried over
        unchanged and the output is zero, so a reversed sequence starts at its own last step. On the CPU the values are
        checked; lengths that already lie on a GPU are not, since that would wait for it.
    reset : Tensor of bool, shape (sequence_length, batch), optional
        Where True, the state that the step starts from is zero: a new sequence begins there.
    norm_hh : Tensor, shape (hidden_size,), optional
        Gain of a layer normalization of $W_{ih} x_t + W_{hh} h_{t-1}$, before the biases are added [1]_.
    recurrent_dropout : float
        Probability of a unit of $h_{t-1}$ to be missing from the product with $W_{hh}$, the same units at every step of
        a sequence; the others are scaled by the reciprocal of its complement [2]_. In training only. Default: 0.
    zoneout : float
        Probability of a unit to keep its old state at a step [3]_. Out of training, the expectation: the old state with
        this weight, the new one with the rest. Default: 0.
    training : bool
        Whether masks are drawn. Default: True.
    seed : int or Tensor, optional
        Of the masks, a 64-bit integer (or an int64 scalar on the CPU). The same seed gives the same masks on every
        device; the backward pass draws them again, so that none is stored. Default: drawn from PyTorch's generator.
    grad_clip : float, optional
        Bound on each element of the gradient of $f$'s argument, on its way back through time [4]_. Default: none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes $f$ again, of all steps at once, where an option above
        makes it differ from the states. The plain RNN keeps its states alone, with or without. Default: False.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
        $h_t$ for every step.
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Raises
    ------
    TypeError
        If an argument is not a tensor, or not of the type of ``input``.
    ValueError
        If a shape, a device, a length, an option or ``nonlinearity`` does not fit.
    RuntimeError
        If ``use_backend("triton")`` holds and Triton can't run on these tensors.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211. The backward pass is backpropagation
    through time: Werbos, Proceedings of the IEEE 78 (1990), 1550-1560.

    .. [1] Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), equation 4.
    .. [2] Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS
       2016, section 4.
    .. [3] Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017, section
       3.2.
    .. [4] Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850 (2013), section 2.1.

    Examples
    --------
    >>> input, h_0 = torch.randn(7, 2, 3), torch.zeros(2, 5)
    >>> weight_ih, weight_hh = torch.randn(5, 3), torch.randn(5, 5, requires_grad=True)
    >>> output, h_n = rnn(input, h_0, weight_ih, weight_hh, lengths=torch.tensor([7, 4]))
    >>> output.shape, bool((output[4:, 1] == 0).all())
    (torch.Size([7, 2, 5]), True)
    >>> output.square().mean().backward()
    >>> weight_hh.grad.shape
    torch.Size([5, 5])
    """
    check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    options = check_options(
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        training=training,
        seed=seed,
        grad_clip=grad_clip,
        recompute_gates=recompute_gates,
    )
    weights = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    arguments = check_recurrent(1, input=input, h_0=h_0, **weights, norm_hh=norm_hh, lengths=lengths, reset=reset)
    tensors = arguments.tensors
    if transformed():
        return reference.rnn(
            **tensors,
            nonlinearity=nonlinearity,
            reverse=reverse,
            lengths=arguments.lengths,
            reset=arguments.reset,
            **options.of_reference("recurrent_dropout", "zoneout"),
        )
    if options.needed or reset is not None or norm_hh is not None:
        biases, inner = [bias for bias in (tensors["bias_ih"], tensors["bias_hh"]) if bias is not None], None
        if norm_hh is not None and biases:  # they are added after the normalization
            inner, biases = sum(biases[1:], biases[0]), []
        projected = project_normalized(
            without_padding(tensors["input"], arguments.lengths), tensors["weight_ih"], None, (), biases
        )
        return run("rnn", projected, arguments, options, reverse=reverse, bias=inner, nonlinearity=nonlinearity)
    del tensors["norm_hh"]
    return torch.ops.rnnkernels.rnn(
        *tensors.values(), arguments.lengths, nonlinearity=nonlinearity, reverse=reverse, backend=arguments.backend
    )


@torch.library.custom_op("rnnkernels::rnn", mutates_args=())
def _rnn(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """States and final state.

    On Triton ``reverse`` may be None: both directions, along a leading dimension of states, weights and results.
    """
    if backend == "eager":
        rows = packing(lengths, *input.shape[:2])
        states = project(rows.packed(input), weight_ih, bias_ih, bias_hh)
        h_n = eager.forward(states, rows.sorted(h_0), weight_hh, rows.counts, nonlinearity, reverse)
        return rows.padded(states), rows.unsorted(h_n)
    output = project(input, weight_ih, bias_ih, bias_hh)
    with torch.cuda.device_of(input):
        h_n = kernels(backend, "rnn").forward(output, h_0, weight_hh, lengths, nonlinearity, reverse)
    return output, h_n


@_rnn.register_fake
def _(input, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, nonlinearity, reverse, backend):
    steps, batch, _ = input.shape
    *both, _, hidden_size = weight_hh.shape
    return input.new_empty(*both, steps, batch, hidden_size), input.new_empty(*both, batch, hidden_size)


@torch.library.custom_op("rnnkernels::rnn_backward", mutates_args=())
def _rnn_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, h_0, weight_ih, weight_hh and a bias; empty where ``needs`` says that nobody asks."""
    needs_input, _, needs_weight_ih, needs_weight_hh, needs_bias = needs
    if backend == "eager":
        rows = packing(lengths, *input.shape[:2])
        states = rows.packed(output)
        gradient, grad_h_0 = eager.backward(
            rows.packed(grad_output), rows.sorted(grad_h_n), states, weight_hh, rows.counts, nonlinearity, reverse
        )
        grad_input, grad_weight_ih, grad_bias = projection_gradients(
            gradient, rows.packed(input), weight_ih, (needs_input, needs_weight_ih, needs_bias)
        )
        grad_weight_hh = weight_hh.new_empty(0)
        if needs_weight_hh:
            grad_weight_hh = eager_weight_gradient(gradient, states, rows.sorted(h_0), rows.counts, reverse)
        grad_input = rows.padded(grad_input) if needs_input else grad_input
        return grad_input, rows.unsorted(grad_h_0), grad_weight_ih, grad_weight_hh, grad_bias
    with torch.cuda.device_of(input):
        gradient, grad_h_0 = kernels(backend, "rnn").backward(
            grad_output, grad_h_n, output, weight_hh, lengths, nonlinearity, reverse
        )
    grad_input, *of_weights = of_directions(
        layer_gradients,
        (gradient, output, h_0, weight_ih, weight_hh),
        without_padding(input, lengths),
        lengths,
        needs=(needs_input, needs_weight_ih, needs_weight_hh, needs_bias),
        reverse=reverse,
    )
    return grad_input, grad_h_0, *of_weights


@_rnn_backward.register_fake
def _(grad_output, grad_h_n, output, input, h_0, weight_ih, weight_hh, lengths, nonlinearity, reverse, backend, needs):
    shapes = (input.shape, h_0.shape, weight_ih.shape, weight_hh.shape, weight_hh.shape[:-1])
    always = (False, True, False, False, False)
    return tuple(
        input.new_empty(shape if need or kept else 0) for shape, need, kept in zip(shapes, needs, always, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, nonlinearity, reverse, backend = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.options = {"nonlinearity": nonlinearity, "reverse": reverse, "backend": backend}


def _backward(ctx, grad_output, grad_h_n):
    *tensors, lengths, output = ctx.saved_tensors
    input, h_0, weight_ih, weight_hh, _, _ = tensors
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled():
        options = {name: ctx.options[name] for name in ("nonlinearity", "reverse")}
        results = results_of(reference.rnn, input, tensors[1:], lengths=lengths, **options)
        gradients = differentiable_gradients(results, tensors, needs, (grad_output, grad_h_n))
        return *gradients, None, None, None, None
    grad_input, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias = torch.ops.rnnkernels.rnn_backward(
        grad_output,
        grad_h_n,
        output,
        input,
        h_0,
        weight_ih,
        weight_hh,
        lengths,
        needs=[*needs[:4], needs[4] or needs[5]],
        **ctx.options,
    )
    gradients = [grad_input, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias, grad_bias]
    if needs[4] and needs[5]:
        gradients[5] = grad_bias.clone()  # two parameters must not share the memory of their gradients
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None


_rnn.register_autograd(_backward, setup_context=_setup_context)
