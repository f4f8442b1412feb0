"""A plain layer in both directions at once, on Triton: one launch where a design holds both."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.ops._checks import check_recurrent
from rnnkernels.ops._general import ROWS
from rnnkernels.ops._sequence import transformed

STATES = {"rnn": ("h_0",), "gru": ("h_0",), "lstm": ("h_0", "c_0")}


def can_run_both(input: Tensor) -> bool:
    """Whether :func:`both_directions` may be called: on Triton, and where no transform is under way."""
    dtype = autocast_dtype(input.device) or input.dtype
    return not transformed() and resolve(input.device, dtype) == "triton"


def both_directions(
    operator: str,
    input: Tensor,
    states: Sequence[Sequence[Tensor]],
    weights: Sequence[dict[str, Tensor]],
    *,
    lengths: Tensor | None,
    **options,
) -> tuple[Tensor, ...]:
    """Run an operator without options in both directions.

    Parameters
    ----------
    operator : {"rnn", "gru", "lstm"}
        Which.
    input : Tensor, shape (sequence_length, batch, input_size)
        As the operator takes it.
    states : pair of sequences of Tensor
        Initial states of the forward and of the reversed direction.
    weights : pair of dict
        Weights and biases of either, by the operator's names. Both have biases, or neither.
    lengths : Tensor of int64, shape (batch,), optional
        As the operator takes it.
    **options
        What the operator takes besides: ``nonlinearity`` of the RNN, ``recompute_gates`` of the others.

    Returns
    -------
    output, h_n, c_n : Tensor
        The operator's results, with a leading dimension for the directions.
    """
    both = []
    for initial, parameters in zip(states, weights, strict=True):
        named = dict(zip(STATES[operator], initial, strict=True))
        arguments = check_recurrent(ROWS[operator], input=input, **named, **parameters, lengths=lengths, reset=None)
        input, *tensors = arguments.tensors.values()  # as autocast has cast it
        lengths = arguments.lengths
        both.append(tensors)
    stacked = [torch.stack(pair) for pair in zip(*both, strict=True)]
    stacked += [None] * (len(STATES[operator]) + 4 - len(stacked))
    run = getattr(torch.ops.rnnkernels, operator)
    results = run(input, *stacked, lengths, **options, reverse=None, backend=arguments.backend)
    return tuple(results[: 1 + len(STATES[operator])])
