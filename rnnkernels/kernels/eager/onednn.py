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


def available(input: Tensor) -> bool:
    """Whether the operator can run on this input, with a state that is not empty."""
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.numel() > 0
        and _PRESENT
        and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    )


def forward(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All states, the final states, and a workspace for the backward pass where gradients are enabled.

    PyTorch differentiates it as often as one likes, as long as states have two dimensions.
    """
    tensors = [tensor.contiguous() for tensor in (input, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0)]
    options = (reverse, [], _MODE, h_0.shape[1], 1, True, False, False, torch.is_grad_enabled())
    return torch.mkldnn_rnn_layer(*tensors, *options)


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the input, both states, and the four weights, where autograd can't be used. Runs forward again."""
    tensors = input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh
    input, h_0, c_0, *weights = (tensor.detach().contiguous() for tensor in tensors)
    with torch.enable_grad():  # the operator keeps nothing where it sees gradients disabled
        output, h_n, c_n, workspace = forward(input, h_0, c_0, *weights, reverse)
    results = output, h_n, c_n, grad_output.contiguous(), grad_h_n.contiguous(), grad_c_n.contiguous()
    options = (reverse, _MODE, h_0.shape[1], 1, True, True, False, [], False)
    grad_input, *grad_weights, grad_h_0, grad_c_0 = torch.ops.aten.mkldnn_rnn_layer_backward(
        input, *weights, h_0, c_0, *results, *options, workspace
    )
    return grad_input, grad_h_0, grad_c_0, *grad_weights


def hold_in_padding(input: Tensor, lengths: Tensor) -> Tensor:
    """The input, zero in the padding, with the feature that holds the cell state there."""
    ended = padding(lengths, input.shape[0])
    return torch.cat([input.masked_fill(ended, 0), ended.to(input.dtype)], -1)


def weight_that_holds(weight_ih: Tensor) -> Tensor:
    """The input's weights, with those of the feature that :func:`hold_in_padding` adds."""
    hidden_size = weight_ih.shape[0] // 4
    column = torch.zeros_like(weight_ih[:, :1])
    column[:hidden_size] = -_SHUT
    column[hidden_size : 2 * hidden_size] = _SHUT
    return torch.cat([weight_ih, column], -1)
