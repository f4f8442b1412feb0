"""The linear recurrence in PyTorch: a loop over steps, or over the steps of many chunks of time at once.

Both are in place and accumulate in float32 or better. Neither divides nor takes logarithms: the only products formed
are those of decays that follow each other, which shrink where the decays are at most one.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.memory import empty
from rnnkernels.kernels.eager.variable_length import before, blocks, padding

IN_CACHE = 2**20
"""Elements of each tensor that are worked on at once, so that they are read from memory and written to it once."""

CHUNKED_BELOW = 8192
"""Elements in a step (batch * hidden_size) below which chunks of time run together: a step alone would then cost more
to launch than to compute. Measured on two threads, in float32; ``benchmarks/scan.py`` repeats the measurement."""

LONG = 32
"""Steps from which chunks pay."""


def forward(
    decay: Tensor, input: Tensor, h_0: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States at every step, zero in padding, and the final state."""
    output = empty(input.shape, input.dtype, input.device)
    dtype = _accumulator(input)
    past_end = None if lengths is None else padding(lengths, len(input))
    state = h_0.to(dtype)
    for steps in parts(input.shape, reverse):
        states = output[steps].to(dtype)
        scan(*_effective(decay, input, past_end, reset, steps, dtype), state, states, reverse)
        state = states[0 if reverse else -1]
        if past_end is not None:
            state = state.clone()
            states.masked_fill_(past_end[steps], 0)
        if dtype != output.dtype:
            output[steps] = states
    return output, state.to(input.dtype, copy=True)


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    decay: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the decays, of the input and of the initial state."""
    grad_decay, grad_input = (empty(output.shape, output.dtype, output.device) for _ in range(2))
    dtype = _accumulator(output)
    past_end = None if lengths is None else padding(lengths, len(output))
    carried = grad_h_n.to(dtype)
    for steps in parts(output.shape, not reverse):
        gradient = grad_input[steps].to(dtype)
        a, added = _effective(decay, grad_output, past_end, reset, steps, dtype)
        carried = scan_backward(a, added, carried, gradient, reverse)
        torch.mul(gradient, before(output, h_0, lengths, reverse, steps), out=grad_decay[steps])
        if past_end is not None:
            gradient.masked_fill_(past_end[steps], 0)
            grad_decay[steps].masked_fill_(past_end[steps], 0)
        if reset is not None:
            grad_decay[steps].masked_fill_(reset[steps].unsqueeze(-1), 0)
        if dtype != output.dtype:
            grad_input[steps] = gradient
    return grad_decay, grad_input, carried.to(output.dtype, copy=True)


def parts(shape: torch.Size, reverse: bool) -> list[slice]:
    """The steps of a sequence in parts that a cache holds, in the order in which they are taken."""
    sequence_length, batch, hidden_size = shape
    if batch * hidden_size == 0:
        return []
    return blocks([batch] * sequence_length, hidden_size, not reverse, IN_CACHE)


def scan_backward(decay: Tensor, added: Tensor, carried: Tensor, gradient: Tensor, reverse: bool) -> Tensor:
    """Fill ``gradient`` with those of the states, and return what reaches the state before the first step.

    ``added`` is what each state receives from its own output, ``carried`` what the last one receives from later steps.
    It is the same recurrence, from the last step to the first, each decay one step late.
    """
    last, first = (0, -1) if reverse else (-1, 0)
    torch.add(added[last], carried, out=gradient[last])
    followers, others = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    scan(decay[followers], added[others], gradient[last], gradient[others], not reverse)
    return decay[first] * gradient[first]


def scan(decay: Tensor, input: Tensor, initial: Tensor, output: Tensor, reverse: bool) -> None:
    """Fill ``output`` with the states of the plain recurrence, of full length and without resets."""
    steps = len(output)
    if steps < LONG or initial.numel() >= CHUNKED_BELOW:
        _loop(decay, input, initial, output, reverse)
        return
    # Three operations for each step of a chunk, one for each chunk: the fewest where they are about as many.
    length = max(2, round((steps / 3) ** 0.5))
    whole = steps // length * length
    if reverse:
        # What the chunks leave over stands at the end of the sequence, where a reversed one begins.
        _loop(decay[whole:], input[whole:], initial, output[whole:], reverse)
        initial = output[whole] if whole < steps else initial
    chunks = (tensor[:whole].unflatten(0, (-1, length)) for tensor in (decay, input, output))
    _chunked(*chunks, initial, reverse)
    if not reverse:
        _loop(decay[whole:], input[whole:], output[whole - 1], output[whole:], reverse)


def _loop(decay: Tensor, input: Tensor, initial: Tensor, output: Tensor, reverse: bool) -> None:
    state = initial
    steps = list(zip(decay.unbind(0), input.unbind(0), output.unbind(0), strict=True))
    for a, b, h in reversed(steps) if reverse else steps:
        state = torch.addcmul(b, a, state, out=h)


def _chunked(decay: Tensor, input: Tensor, output: Tensor, initial: Tensor, reverse: bool) -> None:
    """The recurrence over (chunk, step, …): what each chunk does to any state, the states between them, then all."""
    steps = list(zip(decay.unbind(1), input.unbind(1), output.unbind(1), strict=True))
    if reverse:
        steps.reverse()
    # From the state s at its beginning, a chunk makes product * s + local.
    product, local = steps[0][0].clone(), steps[0][1].clone()
    for a, b, _ in steps[1:]:
        torch.addcmul(b, a, local, out=local)
        product.mul_(a)
    starts = torch.empty_like(local)
    state = initial
    chunks = list(zip(product.unbind(0), local.unbind(0), starts.unbind(0), strict=True))
    for scale, end, start in reversed(chunks) if reverse else chunks:
        start.copy_(state)
        state = torch.addcmul(end, scale, state)
    state = starts
    for a, b, h in steps:
        state = torch.addcmul(b, a, state, out=h)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _effective(
    decay: Tensor,
    added: Tensor,
    past_end: Tensor | None,
    reset: Tensor | None,
    steps: slice,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Decays, zero where a new sequence begins, and what is added: one and zero where the state stands still."""
    decay, added = decay[steps].to(dtype), added[steps].to(dtype)
    if reset is not None:
        decay = decay.masked_fill(reset[steps].unsqueeze(-1), 0)
    if past_end is not None:
        decay, added = decay.masked_fill(past_end[steps], 1), added.masked_fill(past_end[steps], 0)
    return decay, added
