"""Dropout whose mask is a function of a seed, the same on every device."""

import torch
from torch import Tensor

from rnnkernels._backend import resolve
from rnnkernels.kernels.eager import random
from rnnkernels.ops._checks import check_probability, check_seed
from rnnkernels.ops._sequence import kernels, transformed


def dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    seed: int | Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    r"""Zero elements with probability ``p``, and scale the others by $1 / (1 - p)$.

    The law of ``torch.nn.functional.dropout``, with masks from a counter-based generator: the same seed gives the same
    mask on every device, and the backward pass draws it again, so that it is never stored. With ``shared``, one mask
    serves every step of a sequence: variational dropout of inputs or outputs [1]_.

    Parameters
    ----------
    input : Tensor, of any shape
    p : float
        Probability, from 0 to 1. Default: 0.5.
    training : bool
        Whether to drop anything. Default: True.
    seed : int or Tensor, optional
        A 64-bit integer, or an int64 scalar on the CPU. Default: drawn from PyTorch's generator.
    shared : bool
        Whether all of ``input[0]``, ``input[1]``, … get the same mask. Default: False.

    Returns
    -------
    Tensor, shape and type of ``input``

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15 (2014), 1929-1958.

    .. [1] Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS
       2016, section 4.

    Examples
    --------
    >>> dropped = dropout(torch.ones(4, 1000), 0.25, seed=1, shared=True)
    >>> dropped.unique().tolist() == [0, torch.tensor(1 / 0.75)], torch.equal(dropped[0], dropped[3])
    (True, True)
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating-point dtype, got {input.dtype}")
    if shared and input.dim() == 0:
        raise ValueError("input: expected at least 1 dimension where the mask is shared, got a scalar")
    p = check_probability("p", p)
    if not training or p == 0:
        return input
    if transformed():
        return random.dropout(input, p, random.key_of(int(check_seed(seed))), shared)
    return torch.ops.rnnkernels.dropout(input, check_seed(seed), p, shared, resolve(input.device, input.dtype))


@torch.library.custom_op("rnnkernels::dropout", mutates_args=())
def _dropout(input: Tensor, seed: Tensor, p: float, shared: bool, backend: str) -> Tensor:
    with torch.cuda.device_of(input):
        return kernels(backend, "random").dropout(input.contiguous(), p, random.key_of(int(seed)), shared)


@_dropout.register_fake
def _(input, seed, p, shared, backend):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, seed, *ctx.options = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, gradient):
    (seed,) = ctx.saved_tensors
    return torch.ops.rnnkernels.dropout(gradient, seed, *ctx.options), None, None, None, None


_dropout.register_autograd(_backward, setup_context=_setup_context)
