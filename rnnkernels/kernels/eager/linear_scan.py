"""The linear recurrence in PyTorch: a loop over steps, or over the steps of many chunks of time at once.

Both are in place and accumulate in float32 or better. Neither divides nor takes logarithms: the only products formed
are those of decays that follow each other, which shrink where the decays are at most one.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.variable_length import padding

CHUNKED_BELOW = 4096
"""Elements in a step (batch * hidden_size) below which chunks of time run together: a step alone would then cost more
to launch than to compute. Measured on one thread, in float32; ``benchmarks/scan.py`` repeats the measurement."""

LONG = 32
"""Steps from which chunks pay."""


def forward(
    decay: Tensor, input: Tensor, h_0: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States at every step, zero in padding, and the final state."""
    output = torch.empty(input.shape, dtype=_accumulator(input), device=input.device)
    if output.numel() == 0:
        return output.to(input.dtype), h_0.clone()
    decay = _effective(decay, lengths, reset).to(output.dtype)
    past_end = None if lengths is None else padding(lengths, len(input))
    added = input.to(output.dtype) if past_end is None else input.to(output.dtype).masked_fill(past_end, 0)
    scan(decay, added, h_0.to(output.dtype), output, reverse)
    h_n = output[0 if reverse else -1].clone()
    if past_end is not None:
        output.masked_fill_(past_end, 0)
    return output.to(input.dtype), h_n.to(input.dtype)


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
    dtype = output.dtype
    if output.numel() == 0:
        return torch.empty_like(decay), torch.empty_like(output), grad_h_n.clone()
    effective = _effective(decay, lengths, reset).to(_accumulator(output))
    past_end = None if lengths is None else padding(lengths, len(output))
    added = grad_output.to(effective.dtype)
    added = added if past_end is None else added.masked_fill(past_end, 0)
    # The gradient of a state is the same recurrence, from the last step to the first, each decay one step earlier.
    gradient = torch.empty_like(effective, memory_format=torch.contiguous_format)
    last, first = (0, -1) if reverse else (-1, 0)
    torch.add(added[last], grad_h_n, out=gradient[last])
    followers, others = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    scan(effective[followers], added[others], gradient[last], gradient[others], not reverse)
    grad_h_0 = effective[first] * gradient[first]
    if lengths is None:
        grad_decay = torch.empty_like(gradient)
        torch.mul(gradient[followers], output[others], out=grad_decay[followers])
        torch.mul(gradient[first], h_0, out=grad_decay[first])
    else:
        grad_decay = gradient * states_before(output, h_0, lengths, reverse)
        gradient.masked_fill_(past_end, 0)
        grad_decay.masked_fill_(past_end, 0)
    if reset is not None:
        grad_decay.masked_fill_(reset.unsqueeze(-1), 0)
    return grad_decay.to(dtype), gradient.to(dtype), grad_h_0.to(dtype)


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


def states_before(states: Tensor, h_0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step, from the states after it."""
    if not reverse:
        return torch.cat([h_0.unsqueeze(0), states[:-1]])
    earlier = torch.cat([states[1:], h_0.unsqueeze(0)])
    if lengths is not None:
        # Where a shorter sequence begins, the state of the step after holds padding.
        first = torch.arange(1, len(states) + 1, device=lengths.device).unsqueeze(1) == lengths
        earlier = torch.where(first.unsqueeze(-1), h_0, earlier)
    return earlier


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _effective(decay: Tensor, lengths: Tensor | None, reset: Tensor | None) -> Tensor:
    """The decays with zero where a new sequence begins, and one where the state stands still."""
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0)
    return decay if lengths is None else decay.masked_fill(padding(lengths, len(decay)), 1)
