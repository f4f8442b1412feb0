"""The minimal recurrent layers: gates that see the input alone, around a linear recurrence."""

import torch
from torch import Tensor
from torch.nn import functional

from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.kernels.eager import minimal as eager
from rnnkernels.kernels.eager.memory import empty
from rnnkernels.kernels.eager.minimal import NONLINEARITIES, PARTS, step_maps
from rnnkernels.kernels.eager.products import linear
from rnnkernels.ops._sequence import differentiable_gradients, given, projection_gradients, transformed
from rnnkernels.ops.linear_scan import linear_scan

__all__ = ["NONLINEARITIES", "PARTS", "minimal"]

FUSED_FROM = 2**22
"""States from which it takes less time on a CPU to find gates again than to keep them. Measured between 2 and 8 million
states, of 64 and 256 units; ``python -m benchmarks.scan --part training`` has both shapes."""


def minimal(
    input: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    h_0: Tensor | None,
    *,
    kind: str,
    nonlinearity: str,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer in one direction of :class:`rnnkernels.MinGRU` or :class:`rnnkernels.MinLSTM`, which check arguments.

    Parameters
    ----------
    input : Tensor, shape (sequence_length, batch, input_size)
    weight_ih : Tensor, shape (parts * hidden_size, input_size)
    bias_ih : Tensor, shape (parts * hidden_size,), optional
    h_0 : Tensor, shape (batch, hidden_size), optional
        The state before the first step taken, in float32 or better. Default: zeros.
    kind : {"MinGRU", "MinLSTM"}
    nonlinearity : str
        A key of ``NONLINEARITIES``.
    reverse, lengths, reset
        As in :func:`rnnkernels.ops.linear_scan`.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
    h_n : Tensor, shape (batch, hidden_size)
        Both in float32 or better: gates near one do not exist in 16 bits.
    """
    masked = lengths is not None or reset is not None
    hidden_size = weight_ih.shape[0] // PARTS[kind]
    fused = (
        input.device.type == "cpu"
        and autocast_dtype(input.device) is None
        and input.dtype in (torch.float32, torch.float64)
        and not (masked or transformed())
        and input.shape[0] * input.shape[1] * hidden_size >= FUSED_FROM
        and resolve(input.device, input.dtype) == "eager"
    )
    if not fused:
        arguments = {"kind": kind, "nonlinearity": nonlinearity, "reverse": reverse, "lengths": lengths, "reset": reset}
        return _composed(input, weight_ih, bias_ih, h_0, **arguments)
    if h_0 is None:
        h_0 = input.new_zeros(input.shape[1], hidden_size)
    output, h_n, _ = torch.ops.rnnkernels.minimal(input, weight_ih, bias_ih, h_0, kind, nonlinearity, reverse)
    return output, h_n


def _composed(
    input: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    h_0: Tensor | None,
    *,
    kind: str,
    nonlinearity: str,
    reverse: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer of operators that do all else: other devices, types, masks, and further derivatives."""
    wide = torch.promote_types(autocast_dtype(input.device) or input.dtype, torch.float32)
    decay, added = step_maps(kind, nonlinearity, functional.linear(input, weight_ih, bias_ih).to(wide))
    if len(decay) == 1 and lengths is None and reset is None:  # as when a model generates, step by step
        state = added[0] if h_0 is None else torch.addcmul(added[0], decay[0], h_0)
        return state.unsqueeze(0), state
    return linear_scan(decay, added, h_0, reverse=reverse, lengths=lengths, reset=reset)


@torch.library.custom_op("rnnkernels::minimal", mutates_args=(), device_types="cpu")
def _minimal(
    input: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    h_0: Tensor,
    kind: str,
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """States, final state, and the pre-activations that the backward pass wants."""
    rows = weight_ih.shape[0]
    projected = empty((*input.shape[:2], rows), input.dtype, input.device)
    linear(input.flatten(0, 1), weight_ih, bias_ih, out=projected.flatten(0, 1))
    return *eager.forward(projected, h_0, kind, nonlinearity, reverse), projected


@_minimal.register_fake
def _(input, weight_ih, bias_ih, h_0, kind, nonlinearity, reverse):
    steps = input.shape[:2]
    return input.new_empty(*steps, h_0.shape[-1]), h_0.new_empty(h_0.shape), input.new_empty(*steps, len(weight_ih))


@torch.library.custom_op("rnnkernels::minimal_backward", mutates_args=(), device_types="cpu")
def _minimal_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    projected: Tensor,
    input: Tensor,
    weight_ih: Tensor,
    h_0: Tensor,
    kind: str,
    nonlinearity: str,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, empty where ``needs`` says that nobody asks, and of h_0."""
    grad_projected, grad_h_0 = eager.backward(
        grad_output, grad_h_n, output, projected, h_0, kind, nonlinearity, reverse
    )
    needs_input, needs_weight, needs_bias = needs
    grad_input, grad_weight, grad_bias = projection_gradients(
        grad_projected, input, weight_ih, (needs_input, False, needs_bias)
    )
    if needs_weight:
        # MKL transposes as it multiplies; oneDNN would have to copy both, at the size of the sequence.
        grad_weight = grad_projected.flatten(0, 1).t().mm(input.flatten(0, 1))
    return grad_input, grad_weight, grad_bias, grad_h_0


@_minimal_backward.register_fake
def _(grad_output, grad_h_n, output, projected, input, weight_ih, h_0, kind, nonlinearity, reverse, needs):
    shapes = input.shape, weight_ih.shape, weight_ih.shape[:1]
    wanted = (input.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return *wanted, h_0.new_empty(h_0.shape)


def _setup_context(ctx, inputs, output):
    *tensors, kind, nonlinearity, reverse = inputs
    states, final, projected = output
    ctx.mark_non_differentiable(projected)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, final, projected)
    ctx.options = {"kind": kind, "nonlinearity": nonlinearity, "reverse": reverse}


def _backward(ctx, *gradients):
    input, weight_ih, bias_ih, h_0, output, h_n, projected = ctx.saved_tensors
    cotangents = given(gradients, (output, h_n))
    needs = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():
        tensors = input, weight_ih, bias_ih, h_0
        gradients = differentiable_gradients(_composed(*tensors, **ctx.options), tensors, needs, cotangents)
    else:
        gradients = torch.ops.rnnkernels.minimal_backward(
            *cotangents, output, projected, input, weight_ih, h_0, needs=needs[:3], **ctx.options
        )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


_minimal.register_autograd(_backward, setup_context=_setup_context)
