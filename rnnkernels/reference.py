"""The textbook equations, one step at a time: the specification that every kernel is held to.

Plain differentiable PyTorch in any floating-point type, on any device, with no concern for speed. The operators fall
back on these functions for double backward, and the tests compare every kernel with them.
"""

from collections.abc import Callable

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


def gru_cell(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    reset_after: bool = True,
) -> Tensor:
    r"""One step of the gated recurrent unit.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    or, with ``reset_after=False``,

    .. math:: n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

    Parameters
    ----------
    input : Tensor, shape (batch, input_size)
        $x_t$.
    hidden : Tensor, shape (batch, hidden_size)
        $h_{t-1}$.
    weight_ih : Tensor, shape (3 * hidden_size, input_size)
        $W_{ir}$, $W_{iz}$ and $W_{in}$, one below the other.
    weight_hh : Tensor, shape (3 * hidden_size, hidden_size)
        $W_{hr}$, $W_{hz}$ and $W_{hn}$.
    bias_ih, bias_hh : Tensor, shape (3 * hidden_size,), optional
        Left out where None.
    reset_after : bool
        Whether the reset gate acts after the product with $W_{hn}$, as in cuDNN and ``torch.nn.GRU``, or before it, as
        first published. Default: True.

    Returns
    -------
    Tensor, shape (batch, hidden_size)
        $h_t$.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3, where $z$ stands for $1 - z$; reset after the product: as in ``torch.nn.GRU``.

    Examples
    --------
    >>> gru_cell(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(3, 1), torch.zeros(3, 1))  # half of n = 0, half of h
    tensor([[0.5000]])
    """
    from_input = functional.linear(input, weight_ih, bias_ih).chunk(3, dim=-1)
    bias_hn = None if bias_hh is None else bias_hh.chunk(3)[2]
    r, z, n = functional.linear(hidden, weight_hh, bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(from_input[0] + r)
    z = torch.sigmoid(from_input[1] + z)
    n = r * n if reset_after else functional.linear(r * hidden, weight_hh.chunk(3)[2], bias_hn)
    n = torch.tanh(from_input[2] + n)
    return (1 - z) * n + z * hidden


def _over_time(
    step: Callable[[Tensor, Tensor], Tensor], input: Tensor, h_0: Tensor, reverse: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Take ``step`` at every time. Where a sequence has ended, the state stands still and the output is zero."""
    sequence_length = input.shape[0]
    hidden = h_0
    outputs = [h_0] * sequence_length
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        new = step(input[t], hidden)
        if lengths is None:
            hidden = outputs[t] = new
        else:
            active = (t < lengths).unsqueeze(-1)
            hidden = torch.where(active, new, hidden)
            outputs[t] = torch.where(active, new, 0)
    return torch.stack(outputs), hidden


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

    def step(input_t, hidden):
        return rnn_cell(input_t, hidden, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)

    return _over_time(step, input, h_0, reverse, lengths)


def gru(
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The gated recurrent unit over a whole sequence: :func:`gru_cell` at every step.

    Parameters
    ----------
    input, h_0, reverse, lengths
        As in :func:`rnn`.
    weight_ih, weight_hh, bias_ih, bias_hh, reset_after
        As in :func:`gru_cell`.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Examples
    --------
    >>> output, h_n = gru(torch.randn(5, 2, 3), torch.zeros(2, 4), torch.randn(12, 3), torch.randn(12, 4))
    >>> output.shape, torch.equal(output[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """

    def step(input_t, hidden):
        return gru_cell(input_t, hidden, weight_ih, weight_hh, bias_ih, bias_hh, reset_after)

    return _over_time(step, input, h_0, reverse, lengths)
