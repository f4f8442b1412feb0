"""The textbook equations, one step at a time: the specification that every kernel is held to.

Plain differentiable PyTorch in any floating-point type, on any device, with no concern for speed. The operators fall
back on these functions for double backward, and the tests compare every kernel with them.
"""

import torch
from torch import Tensor
from torch.nn import functional


def identity(input: Tensor) -> Tensor:
    """Return ``input`` as it is: the activation of a linear recurrence."""
    return input


ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": identity}
"""The activations $f$ of the plain RNN, by the name that ``nonlinearity=`` takes."""


def rnn_cell(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    r"""One step of the plain (Elman) RNN.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Parameters
    ----------
    input : Tensor, shape (batch, input_size)
        $x_t$.
    hidden : Tensor, shape (batch, hidden_size)
        $h_{t-1}$.
    weight_ih : Tensor, shape (hidden_size, input_size)
    weight_hh : Tensor, shape (hidden_size, hidden_size)
    bias_ih, bias_hh : Tensor, shape (hidden_size,), optional
        Left out where None.
    nonlinearity : {"tanh", "relu", "sigmoid", "identity"}
        $f$. Default: ``"tanh"``.

    Returns
    -------
    Tensor, shape (batch, hidden_size)
        $h_t$.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211; written as in ``torch.nn.RNN``.

    Examples
    --------
    >>> h = rnn_cell(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([[-3.0]]))
    >>> float(h) == float(torch.tanh(torch.tensor(-1.0)))
    True
    """
    return ACTIVATIONS[nonlinearity](
        functional.linear(input, weight_ih, bias_ih) + functional.linear(hidden, weight_hh, bias_hh)
    )


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
) -> tuple[Tensor, Tensor]:
    r"""The plain RNN over a whole sequence: :func:`rnn_cell` for $t = 1 \dots T$, or $T \dots 1$ where ``reverse``.

    Parameters
    ----------
    input : Tensor, shape (sequence_length, batch, input_size)
    h_0 : Tensor, shape (batch, hidden_size)
        The state before the first step taken.
    weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity
        As in :func:`rnn_cell`.
    reverse : bool
        Run from the last step to the first. ``output[t]`` stays the state at time ``t``. Default: False.
    lengths : Tensor of int64, shape (batch,), optional
        Steps of each sequence, 1 to ``sequence_length``. At ``t >= lengths[b]`` the state is carried over unchanged
        and the output is zero, so a reversed sequence starts at its own last step.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Examples
    --------
    >>> x, h_0 = torch.randn(5, 2, 3), torch.zeros(2, 4)
    >>> output, h_n = rnn(x, h_0, torch.randn(4, 3), torch.randn(4, 4))
    >>> output.shape, torch.equal(output[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    sequence_length = input.shape[0]
    hidden = h_0
    outputs = [h_0] * sequence_length
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        new = rnn_cell(input[t], hidden, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
        if lengths is None:
            hidden = outputs[t] = new
        else:
            active = (t < lengths).unsqueeze(-1)
            hidden = torch.where(active, new, hidden)
            outputs[t] = torch.where(active, new, 0)
    return torch.stack(outputs), hidden
