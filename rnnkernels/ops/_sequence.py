"""What every recurrent operator does around its recurrence, for all steps at once."""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from rnnkernels.kernels.directions import each_direction, one_after_the_other
from rnnkernels.kernels.eager.products import linear
from rnnkernels.kernels.eager.variable_length import padding


def kernels(backend: str, operator: str) -> ModuleType:
    """The module that implements ``operator`` on ``backend``, imported on first use."""
    return importlib.import_module(f"rnnkernels.kernels.{backend}.{operator}")


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way.

    No custom operator takes part in them: the reference, plain PyTorch, serves there.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def project(input: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor:
    r"""The input's share of every pre-activation, $W_{ih} x_t + b_{ih} + b_{hh}$, in one matrix product.

    Returns a new contiguous tensor, with gates * hidden_size features; for both directions, along a leading dimension.
    """
    biases = [bias for bias in (bias_ih, bias_hh) if bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    if weight_ih.dim() == 3:
        return project_both(input, weight_ih, bias, input.new_empty(2, *input.shape[:-1], weight_ih.shape[1]))
    return linear(input.flatten(0, -2), weight_ih, bias).view(*input.shape[:-1], weight_ih.shape[0])


def project_both(input: Tensor, weight_ih: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """The products of the input with the weights of each direction, and its bias, in ``out``."""
    rows = input.flatten(0, -2)
    for direction, weight in enumerate(weight_ih):
        linear(rows, weight, None if bias is None else bias[direction], out=out[direction].flatten(0, -2))
    return out


def project_normalized(
    input: Tensor, weight_ih: Tensor, norm_ih: Tensor | None, groups: tuple[int, ...], biases: Sequence[Tensor | None]
) -> Tensor:
    """The input's share of every pre-activation, each group of columns normalized where ``norm_ih`` is its gain."""
    projected = functional.linear(input, weight_ih)
    if norm_ih is not None:
        parts = zip(projected.split(groups, -1), norm_ih.split(groups), strict=True)
        projected = torch.cat([functional.layer_norm(part, gain.shape, gain) for part, gain in parts], -1)
    return sum((bias for bias in biases if bias is not None), projected)


def without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with zeros in the padding: NaN there would meet zeros in sums over all steps, and be NaN in the sum."""
    return input if lengths is None else input.masked_fill(padding(lengths, input.shape[0]), 0)


def projection_gradients(
    grad_projected: Tensor,
    input: Tensor,
    weight_ih: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``input``, ``weight_ih`` and a bias, through :func:`project`; empty where not needed."""
    flat = grad_projected.flatten(0, -2)
    needs_input, needs_weight, needs_bias = needs
    grad_input = linear(flat, weight_ih.t()).view(input.shape) if needs_input else input.new_empty(0)
    grad_weight = linear(flat.t(), input.flatten(0, -2).t()) if needs_weight else input.new_empty(0)
    grad_bias = flat.sum(0) if needs_bias else input.new_empty(0)
    return grad_input, grad_weight, grad_bias


def recurrent_weight_gradient(
    grad_projected: Tensor, output: Tensor, h_0: Tensor, lengths: Tensor | None, reverse: bool
) -> Tensor:
    r"""The gradient of $W_{hh}$: $\sum_t \delta_t h_{t-1}^\top$, where $\delta_t$ is the gradient of $a_t$.

    Padding holds zeros in ``grad_projected`` and ``output``, so it adds nothing.
    """
    later, earlier = (grad_projected[:-1], output[1:]) if reverse else (grad_projected[1:], output[:-1])
    if lengths is not None and reverse:
        first = grad_projected[lengths - 1, torch.arange(len(lengths), device=lengths.device)]
    else:
        first = grad_projected[-1 if reverse else 0]
    later, earlier = later.flatten(0, 1), earlier.flatten(0, 1)
    return linear(later.t(), earlier.t()).addmm_(first.t(), h_0)


def layer_gradients(
    grad_projected: Tensor,
    output: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    input: Tensor,
    lengths: Tensor | None,
    needs: Sequence[bool],
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``input``, both weights and a bias; empty where not needed."""
    needs_input, needs_weight_ih, needs_weight_hh, needs_bias = needs
    grad_input, grad_weight_ih, grad_bias = projection_gradients(
        grad_projected, input, weight_ih, (needs_input, needs_weight_ih, needs_bias)
    )
    grad_weight_hh = weight_hh.new_empty(0)
    if needs_weight_hh:
        grad_weight_hh = recurrent_weight_gradient(grad_projected, output, h_0, lengths, reverse)
    return grad_input, grad_weight_ih, grad_weight_hh, grad_bias


def of_directions(
    gradients: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    *others,
    needs: Sequence[bool],
    reverse: bool | None,
) -> tuple[Tensor, ...]:
    """What ``gradients`` returns, of the input first and then of weights; of both directions where ``reverse`` is None.

    Those of the input are summed then, the others stand along a leading dimension.
    """
    if reverse is not None:
        return gradients(*tensors, *others, needs, reverse=reverse)
    of_input, *of_weights = each_direction(gradients, tensors, *others, needs)
    stacked = (torch.stack(both) if need else both[0] for both, need in zip(of_weights, needs[1:], strict=True))
    return of_input[0].add_(of_input[1]), *stacked


def results_of(
    reference: Callable[..., Sequence[Tensor]],
    input: Tensor,
    tensors: Sequence[Tensor | None],
    *,
    reverse: bool | None,
    **options,
) -> Sequence[Tensor]:
    """What the reference gives for a direction, or for both where ``reverse`` is None."""
    if reverse is not None:
        return reference(input, *tensors, reverse=reverse, **options)
    return one_after_the_other(functools.partial(reference, input, **options), tensors)


AT_ONCE = 2**27
"""Elements of gates that exist at once on a GPU where none are kept: beyond, pieces of time follow each other."""


def pieces_of_time(input: Tensor, width: int, reverse: bool | None, kept: bool, backend: str) -> list[slice]:
    """Steps in pieces of :data:`AT_ONCE` elements, ``width`` of a row, in the order in which they are taken.

    One piece where the gates are kept, where a sequence does not lie in a GPU's memory, and for both directions.
    """
    sequence_length, batch, _ = input.shape
    size = max(1, AT_ONCE // max(1, batch * width))
    if kept or reverse is None or backend != "triton" or size >= sequence_length:
        return [slice(0, sequence_length)]
    pieces = [slice(start, min(start + size, sequence_length)) for start in range(0, sequence_length, size)]
    return pieces[::-1] if reverse else pieces


def lengths_within(lengths: Tensor | None, steps: slice) -> Tensor | None:
    """How many of some steps each sequence has."""
    return None if lengths is None else (lengths - steps.start).clamp(0, steps.stop - steps.start)


def state_before(states: Tensor, initial: Tensor, lengths: Tensor | None, reverse: bool, steps: slice) -> Tensor:
    """The state before some steps are taken, from the states after all; anything where a sequence has ended."""
    if not reverse:
        return states[steps.start - 1] if steps.start else initial
    if steps.stop == len(states):
        return initial
    later = states[steps.stop]
    return later if lengths is None else torch.where((lengths > steps.stop).unsqueeze(-1), later, initial)


def state_after(final: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """The state after some steps; the one before where a sequence has none of them."""
    return final if lengths is None else torch.where((lengths > 0).unsqueeze(-1), final, before)


def total(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of what pieces of time give a parameter, rounded once; empty where nobody asks."""
    if len(gradients) == 1:
        return gradients[0]
    accumulated = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(list(gradients)).sum(0, dtype=accumulated).to(gradients[0].dtype)


def given(gradients: Sequence[Tensor | None], results: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of an operator's results, zeros where autograd has none.

    Autograd would make zeros for what is kept for the backward pass too, the largest tensors of all.
    """
    pairs = zip(gradients, results, strict=False)
    return [torch.zeros_like(result) if gradient is None else gradient for gradient, result in pairs]


def differentiable_gradients(
    results: Sequence[Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of ``tensors`` through ``results``, as a graph that can be differentiated again."""
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(results, wanted, cotangents, create_graph=True))
    return [next(gradients) if need else None for need in needs]
