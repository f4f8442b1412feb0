"""One step of each recurrence, where ``torch.nn``'s cells stood."""

import torch
from torch import Tensor

from rnnkernels import ops, reference
from rnnkernels.ops._checks import check_choice
from rnnkernels.ops._sequence import transformed


def check_cell(input: Tensor, hx: Tensor | None) -> None:
    """Check what every cell takes, as far as ``torch.nn``'s own checks do not name the argument."""
    for name, value in (("input", input), ("hx", hx)):
        if value is None and name == "hx":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.dim() not in (1, 2):
            raise ValueError(f"{name}: expected 1 or 2 dimensions, got shape {tuple(value.shape)}")


class RNNCell(torch.nn.RNNCell):
    r"""One step of the plain (Elman) RNN: a drop-in for :class:`torch.nn.RNNCell`.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Parameters
    ----------
    input_size : int
        Features of $x$.
    hidden_size : int
        Features of $h$.
    bias : bool
        Whether there are $b_{ih}$ and $b_{hh}$. Default: True.
    nonlinearity : {"tanh", "relu", "sigmoid", "identity"}
        $f$. Default: ``"tanh"``.
    device, dtype
        Where and in which type to make the parameters.

    Raises
    ------
    ValueError
        If ``nonlinearity`` is none of the four.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211.

    Examples
    --------
    >>> cell = RNNCell(10, 20, nonlinearity="sigmoid")
    >>> cell(torch.randn(3, 10), torch.zeros(3, 20)).shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
    ) -> None:
        check_choice("nonlinearity", nonlinearity, ops.NONLINEARITIES)
        super().__init__(input_size, hidden_size, bias, nonlinearity, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Parameters
        ----------
        input : Tensor, shape (batch, input_size) or (input_size,)
        hx : Tensor, shape (batch, hidden_size) or (hidden_size,), optional
            Default: zeros.

        Returns
        -------
        Tensor, shape (batch, hidden_size) or (hidden_size,)

        Raises
        ------
        TypeError
            If an argument is not a tensor.
        ValueError
            If an argument has the wrong number of dimensions.
        RuntimeError
            If a size does not fit, as in ``torch.nn.RNNCell``.
        """
        check_cell(input, hx)
        if self.nonlinearity in ("tanh", "relu") and not transformed():  # which PyTorch's operator can't be
            return super().forward(input, hx)
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
        return reference.rnn_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.nonlinearity
        )


class GRUCell(torch.nn.GRUCell):
    r"""One step of the gated recurrent unit: a drop-in for :class:`torch.nn.GRUCell`.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Parameters
    ----------
    input_size : int
        Features of $x$.
    hidden_size : int
        Features of $h$.
    bias : bool
        Whether there are biases. Default: True.
    device, dtype
        Where and in which type to make the parameters.
    reset_after : bool
        Whether the reset gate acts after the product with $W_{hn}$, as in ``torch.nn.GRUCell``, or before it, as first
        published: $W_{hn} (r \odot h) + b_{hn}$. Default: True.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3; with the reset gate after the product, as in ``torch.nn.GRUCell``.

    Examples
    --------
    >>> GRUCell(10, 20)(torch.randn(3, 10), torch.zeros(3, 20)).shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.reset_after = reset_after

    def extra_repr(self) -> str:
        """What ``repr`` shows of the arguments."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Parameters
        ----------
        input : Tensor, shape (batch, input_size) or (input_size,)
        hx : Tensor, shape (batch, hidden_size) or (hidden_size,), optional
            Default: zeros.

        Returns
        -------
        Tensor, shape (batch, hidden_size) or (hidden_size,)

        Raises
        ------
        TypeError
            If an argument is not a tensor.
        ValueError
            If an argument has the wrong number of dimensions.
        RuntimeError
            If a size does not fit, as in ``torch.nn.GRUCell``.
        """
        check_cell(input, hx)
        if self.reset_after and not transformed():
            return super().forward(input, hx)
        batched = input.dim() == 2
        input, hx = (value if value is None or batched else value.unsqueeze(0) for value in (input, hx))
        hx = input.new_zeros(input.shape[0], self.hidden_size) if hx is None else hx
        new = reference.gru_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.reset_after
        )
        return new if batched else new.squeeze(0)


class LSTMCell(torch.nn.LSTMCell):
    r"""One step of the long short-term memory: a drop-in for :class:`torch.nn.LSTMCell`.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Parameters
    ----------
    input_size : int
        Features of $x$.
    hidden_size : int
        Features of $h$ and $c$.
    bias : bool
        Whether there are biases. Default: True.
    device, dtype
        Where and in which type to make the parameters.

    References
    ----------
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), 1735-1780; forget gate: Gers,
    Schmidhuber and Cummins, Neural Computation 12 (2000), 2451-2471.

    Examples
    --------
    >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
    >>> h.shape, c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step.

        Parameters
        ----------
        input : Tensor, shape (batch, input_size) or (input_size,)
        hx : tuple of two Tensors, shape (batch, hidden_size) or (hidden_size,), optional
            $h$ and $c$. Default: zeros.

        Returns
        -------
        tuple of two Tensors, shape (batch, hidden_size) or (hidden_size,)
            $h'$ and $c'$.

        Raises
        ------
        TypeError
            If an argument is not a tensor, or ``hx`` not a pair of them.
        ValueError
            If an argument has the wrong number of dimensions.
        RuntimeError
            If a size does not fit, as in ``torch.nn.LSTMCell``.
        """
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            raise TypeError(f"hx: expected a pair of Tensors, (h, c), got {type(hx).__name__}")
        for state in hx or (None,):
            check_cell(input, state)
        if not transformed():
            return super().forward(input, hx if hx is None else tuple(hx))
        batched = input.dim() == 2
        hx = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * 2 if hx is None else hx
        input, *hx = (value if batched else value.unsqueeze(0) for value in (input, *hx))
        new = reference.lstm_cell(input, *hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return new if batched else tuple(state.squeeze(0) for state in new)
