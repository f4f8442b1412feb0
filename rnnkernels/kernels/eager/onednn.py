"""The LSTM on oneDNN, PyTorch's own operator for a layer on a CPU: no loop of ours is as fast there.

The operator knows no lengths. Sequences of different lengths get one more feature, which is 1 in the padding and whose
weights shut the input gate and hold the forget gate open: the cell state then stands still to the last step.
"""

import torch
from torch import Tensor

from rnnkernels.kernels.eager.variable_length import padding

_SHUT = 1e4
"""An argument of the sigmoid beyond which float32 knows but 0 and 1."""

_MODE = 2  # PyTorch's number for an LSTM

_PRESENT = torch.backends.mkldnn.is_available()  # asked once, since torch.compile does not trace the question


def available(input: Tensor, h_0: Tensor) -> bool:
    """Whether the operator can run on these tensors."""
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.numel() > 0
        and h_0.numel() > 0
        and _PRESENT
        and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    )


def forward(
    input: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor], reverse: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All states, the final states, and what the backward pass wants to find again."""
    tensors = [tensor.detach() for tensor in (input, *weights, h_0.unsqueeze(0), c_0.unsqueeze(0))]
    options = (reverse, [], _MODE, h_0.shape[1], 1, True, False, False, train)
    with torch.set_grad_enabled(train):  # the operator keeps nothing where it sees gradients disabled
        output, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(*tensors, *options)
    return output, h_n.squeeze(0), c_n.squeeze(0), workspace


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the input, both states, and the four weights."""
    output, h_n, c_n, workspace = results
    h_0, c_0, h_n, c_n, grad_h_n, grad_c_n = (
        state.unsqueeze(0).contiguous() for state in (h_0, c_0, h_n, c_n, grad_h_n, grad_c_n)
    )
    grad_input, *grad_weights, grad_h_0, grad_c_0 = torch.ops.aten.mkldnn_rnn_layer_backward(
        input,
        *weights,
        h_0,
        c_0,
        output,
        h_n,
        c_n,
        grad_output.contiguous(),
        grad_h_n,
        grad_c_n,
        reverse,
        _MODE,
        h_0.shape[2],
        1,
        True,
        True,
        False,
        [],
        False,
        workspace,
    )
    return grad_input, grad_h_0.squeeze(0), grad_c_0.squeeze(0), *grad_weights


def hold_in_padding(input: Tensor, weight_ih: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The input and its weights with the feature that holds the cell state in the padding."""
    ended = padding(lengths, input.shape[0])
    hidden_size = weight_ih.shape[0] // 4
    column = torch.zeros_like(weight_ih[:, :1])
    column[:hidden_size] = -_SHUT
    column[hidden_size : 2 * hidden_size] = _SHUT
    input = torch.cat([input.masked_fill(ended, 0), ended.to(input.dtype)], -1)
    return input, torch.cat([weight_ih, column], -1)


def reversed_within(lengths: Tensor, sequence_length: int) -> Tensor:
    """For each step, the step that takes its place when every sequence is read backwards: (sequence_length, batch)."""
    steps = torch.arange(sequence_length, device=lengths.device).unsqueeze(1)
    return torch.where(steps < lengths, lengths - 1 - steps, steps)
