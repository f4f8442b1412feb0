"""The linear recurrence, whose steps need not wait for each other."""

from functools import reduce

import torch
from torch import Tensor

from rnnkernels import reference
from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.kernels.eager.variable_length import before, padding
from rnnkernels.ops._checks import check_lengths, check_reset, check_tensor
from rnnkernels.ops._sequence import kernels, transformed


def linear_scan(
    decay: Tensor,
    input: Tensor,
    h_0: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The linear recurrence over a whole sequence, element by element.

    .. math:: h_t = a_t \odot h_{t-1} + b_t

    A step maps $h$ to $a_t \odot h + b_t$, and two such maps in a row are a map of the same form: stretches of time can
    be summarized independently of each other, and joined afterwards [1]_. Where time is long and a step small, that is
    what happens, on a CPU as well; where a step alone fills the machine, the steps are taken in turn. It is stable for
    decays of magnitude up to one, as gates have: only products of decays are formed, never quotients or logarithms.
    (Where decays exceed one for long, such a product may overflow before a state does.)

    Differentiable in all three tensors, from the gradients of both results; twice where ``create_graph=True``. Back
    ends and determinism as for :func:`rnnkernels.ops.rnn`. States are accumulated in float32 or better, and rounded
    where they are stored.

    Parameters
    ----------
    decay : Tensor, shape (sequence_length, batch, hidden_size)
        $a_t$. float64, float32, bfloat16 or float16. ``sequence_length`` is at least 1.
    input : Tensor, shape (sequence_length, batch, hidden_size)
        $b_t$. Type and device as ``decay``; under ``torch.autocast`` types may differ, and the widest is taken.
    h_0 : Tensor, shape (batch, hidden_size), optional
        The state before the first step taken. Default: zeros.
    reverse : bool
        Run from the last step to the first. ``output[t]`` stays the state at time ``t``. Default: False.
    lengths : Tensor of int64, shape (batch,), optional
        Steps of each sequence, 1 to ``sequence_length``, in any order. At ``t >= lengths[b]`` the state is carried over
        unchanged and the output is zero. On the CPU the values are checked.
    reset : Tensor of bool, shape (sequence_length, batch), optional
        Where True, the state that the step starts from is zero: a new sequence begins there. It is a decay of zero, so
        that NaN and infinity do cross.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
        $h_t$ for every step.
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Raises
    ------
    TypeError
        If an argument is not a tensor, or not of the type of ``decay``.
    ValueError
        If a shape, a device or a length does not fit.
    RuntimeError
        If ``use_backend("triton")`` holds and Triton can't run on these tensors.

    References
    ----------
    .. [1] Blelloch, "Prefix sums and their applications", CMU-CS-90-190 (1990), section 1.4; for recurrent networks:
       Martin and Cundy, "Parallelizing linear recurrent neural nets over sequence length", ICLR 2018, section 2.

    Examples
    --------
    >>> decay = torch.full((4, 1, 1), 0.5)
    >>> output, h_n = linear_scan(decay, torch.ones(4, 1, 1))
    >>> output.flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    if autocast_dtype(decay.device if isinstance(decay, Tensor) else torch.device("cpu")) is not None:
        given = [tensor for tensor in (decay, input, h_0) if isinstance(tensor, Tensor)]
        widest = reduce(torch.promote_types, (tensor.dtype for tensor in given))
        decay, input, h_0 = (t.to(widest) if isinstance(t, Tensor) else t for t in (decay, input, h_0))
    check_tensor("decay", decay, ("sequence_length", "batch", "hidden_size"))
    if decay.shape[0] == 0:
        raise ValueError("decay: expected at least 1 step, got an empty sequence")
    sequence_length, batch, hidden_size = decay.shape
    check_tensor("input", input, tuple(decay.shape), like=decay, of="decay")
    if h_0 is None:
        h_0 = decay.new_zeros(batch, hidden_size)
    else:
        check_tensor("h_0", h_0, (batch, hidden_size), like=decay, of="decay")
    if lengths is not None:
        lengths = check_lengths(lengths, sequence_length, batch, decay.device)
    if reset is not None:
        reset = check_reset(reset, sequence_length, batch, decay.device)
    if transformed():
        return reference.linear_scan(decay, input, h_0, reverse=reverse, lengths=lengths, reset=reset)
    backend = resolve(decay.device, decay.dtype)
    return torch.ops.rnnkernels.linear_scan(decay, input, h_0, lengths, reset, reverse, backend)


@torch.library.custom_op("rnnkernels::linear_scan", mutates_args=())
def _linear_scan(
    decay: Tensor,
    input: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(decay):
        return kernels(backend, "linear_scan").forward(decay, input, h_0, lengths, reset, reverse)


@_linear_scan.register_fake
def _(decay, input, h_0, lengths, reset, reverse, backend):
    return decay.new_empty(decay.shape), h_0.new_empty(h_0.shape)


@torch.library.custom_op("rnnkernels::linear_scan_backward", mutates_args=())
def _linear_scan_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    decay: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decay, input and h_0."""
    with torch.cuda.device_of(decay):
        return kernels(backend, "linear_scan").backward(
            grad_output, grad_h_n, output, decay, h_0, lengths, reset, reverse
        )


@_linear_scan_backward.register_fake
def _(grad_output, grad_h_n, output, decay, h_0, lengths, reset, reverse, backend):
    return decay.new_empty(decay.shape), decay.new_empty(decay.shape), h_0.new_empty(h_0.shape)


def _setup_context(ctx, inputs, output):
    decay, _, h_0, lengths, reset, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(decay, h_0, lengths, reset, output[0])


def _backward(ctx, grad_output, grad_h_n):
    decay, h_0, lengths, reset, output = ctx.saved_tensors
    arguments = grad_output, grad_h_n, output, decay, h_0, lengths, reset, ctx.reverse, ctx.backend
    differentiated = torch.is_grad_enabled()
    gradients = _gradients(*arguments) if differentiated else torch.ops.rnnkernels.linear_scan_backward(*arguments)
    needs = ctx.needs_input_grad[:3]
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None


def _gradients(grad_output, grad_h_n, output, decay, h_0, lengths, reset, reverse, backend):
    """What the backward operator computes, as a graph that can be differentiated again: it is a linear scan itself."""
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    if lengths is not None:
        past_end = padding(lengths, len(decay))
        decay, grad_output = decay.masked_fill(past_end, 1), grad_output.masked_fill(past_end, 0)
    one = torch.ones_like(decay[:1])
    following = torch.cat([one, decay[:-1]] if reverse else [decay[1:], one])
    gradient, _ = torch.ops.rnnkernels.linear_scan(following, grad_output, grad_h_n, None, None, not reverse, backend)
    grad_h_0 = (decay * gradient)[-1 if reverse else 0]
    grad_decay = gradient * before(output, h_0, lengths, reverse, slice(0, len(output)))
    if lengths is not None:
        gradient, grad_decay = gradient.masked_fill(past_end, 0), grad_decay.masked_fill(past_end, 0)
    if reset is not None:
        grad_decay = grad_decay.masked_fill(reset.unsqueeze(-1), 0)
    return grad_decay, gradient, grad_h_0


_linear_scan.register_autograd(_backward, setup_context=_setup_context)
