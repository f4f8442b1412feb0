"""Recurrent modules that stand where ``torch.nn``'s stood."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnkernels import ops, reference
from rnnkernels._backend import autocast_dtype
from rnnkernels.ops._checks import check_choice


class Recurrent(torch.nn.RNNBase):
    """What the recurrent modules share: layers, directions, batches in all their forms. Not for direct use."""

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the weights where they are. There for compatibility with ``torch.nn.RNN``."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network over a sequence.

        Parameters
        ----------
        input : Tensor or PackedSequence
            Shape (sequence_length, batch, input_size); (batch, sequence_length, input_size) with ``batch_first``;
            (sequence_length, input_size) unbatched; or a packed sequence, sorted or not.
        hx : Tensor, shape (num_directions * num_layers, batch, hidden_size), optional
            Initial states; without the batch dimension where ``input`` has none. Default: zeros.

        Returns
        -------
        output : Tensor or PackedSequence
            As ``input``, with num_directions * hidden_size features: the states of the last layer at each step.
        h_n : Tensor
            As ``hx``: the final state of each layer and direction.

        Raises
        ------
        TypeError
            If ``input`` is neither a tensor nor a packed sequence.
        ValueError
            If ``input`` has the wrong number of dimensions or a type other than the weights'.
        RuntimeError
            If another size does not fit, or the sequence is empty.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions, got shape {tuple(input.shape)}")
        if hx is not None and (not isinstance(hx, Tensor) or hx.dim() != input.dim()):
            came = f"shape {tuple(hx.shape)}" if isinstance(hx, Tensor) else type(hx).__name__
            raise RuntimeError(f"hx: expected a Tensor of {input.dim()} dimensions, as input has, got {came}")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(1)
            hx = hx if hx is None else hx.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        output, h_n = self._run(input, hx)
        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, h_n

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        output, h_n = self._run(padded, hx, lengths)
        output = pack_padded_sequence(output, lengths).data
        return (
            PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(h_n, unsorted_indices),
        )

    def _check(self, input: Tensor, hx: Tensor | None) -> None:
        weight = self.weight_ih_l0
        autocast = autocast_dtype(input.device) is not None
        if input.shape[2] != self.input_size:
            raise RuntimeError(f"input: expected {self.input_size} features (input_size), got {input.shape[2]}")
        if input.shape[0] == 0:
            raise RuntimeError("input: expected at least 1 step, got an empty sequence")
        if input.dtype != weight.dtype and not autocast:
            raise ValueError(f"input: expected dtype {weight.dtype}, as the weights have, got {input.dtype}")
        if input.device != weight.device:
            raise RuntimeError(f"input: expected device {weight.device}, where the weights are, got {input.device}")
        if hx is None:
            return
        expected = (self.num_layers * (2 if self.bidirectional else 1), input.shape[1], self.hidden_size)
        if tuple(hx.shape) != expected:
            raise RuntimeError(f"hx: expected shape {expected}, got {tuple(hx.shape)}")
        if hx.dtype != input.dtype and not autocast:
            raise RuntimeError(f"hx: expected dtype {input.dtype}, as input has, got {hx.dtype}")
        if hx.device != input.device:
            raise RuntimeError(f"hx: expected device {input.device}, where input is, got {hx.device}")

    def _run(self, input: Tensor, hx: Tensor | None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(input, hx)
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        if hx is None:
            hx = input.new_zeros(self.num_layers * len(suffixes), input.shape[1], self.hidden_size)
        initial = iter(hx.unbind(0))
        final = []
        output = input
        for layer in range(self.num_layers):
            directions = []
            for suffix in suffixes:
                names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
                weights = [getattr(self, f"{name}_l{layer}{suffix}") for name in names]
                states, last = self._sequence(
                    output, next(initial), *weights, reverse=suffix == "_reverse", lengths=lengths
                )
                directions.append(states)
                final.append(last)
            output = torch.cat(directions, dim=-1) if self.bidirectional else directions[0]
            if self.dropout and layer < self.num_layers - 1:
                output = functional.dropout(output, self.dropout, self.training)
        return output, torch.stack(final)

    def _sequence(self, input: Tensor, state: Tensor, *weights: Tensor, **options) -> tuple[Tensor, Tensor]:
        """Run one layer in one direction."""
        raise NotImplementedError


class RNN(Recurrent):
    r"""Plain (Elman) RNN of one or more layers, in one or both directions: a drop-in for :class:`torch.nn.RNN`.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Parameters, their names and default initialization, ``state_dict`` and results are those of ``torch.nn.RNN``:
    checkpoints move both ways. ``nonlinearity`` takes two more values. The layers run on
    :func:`rnnkernels.ops.rnn`: Triton kernels on a GPU, PyTorch on a CPU (see :func:`rnnkernels.use_backend`).

    Parameters
    ----------
    input_size : int
        Features of $x_t$.
    hidden_size : int
        Features of $h_t$.
    num_layers : int
        Layers, each reading the outputs of the one below. Default: 1.
    nonlinearity : {"tanh", "relu", "sigmoid", "identity"}
        $f$. Default: ``"tanh"``.
    bias : bool
        Whether there are $b_{ih}$ and $b_{hh}$. Default: True.
    batch_first : bool
        Input and output as (batch, sequence, feature) rather than (sequence, batch, feature). States are not concerned.
        Default: False.
    dropout : float
        Probability of zeroing an output of each layer but the last, in training. Default: 0.
    bidirectional : bool
        Whether each layer also runs from the last step to the first. Default: False.
    device, dtype
        Where and in which type to make the parameters.

    Raises
    ------
    TypeError, ValueError
        Where ``torch.nn.RNN`` raises them.

    Notes
    -----
    With ``dropout``, the law of the masks is torch's, but not the random stream for packed sequences.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211. Bidirectional: Schuster and Paliwal, IEEE
    Transactions on Signal Processing 45 (1997), 2673-2681.

    Examples
    --------
    >>> rnn = RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    >>> rnn.load_state_dict(torch.nn.RNN(10, 20, num_layers=2).state_dict())
    <All keys matched successfully>
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_choice("nonlinearity", nonlinearity, ops.NONLINEARITIES)
        self.nonlinearity = nonlinearity
        # torch's base class knows two modes; ours differ in the activation alone.
        mode = "RNN_RELU" if nonlinearity == "relu" else "RNN_TANH"
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows of the arguments."""
        shown = super().extra_repr()
        return shown if self.nonlinearity == "tanh" else f"{shown}, nonlinearity={self.nonlinearity!r}"

    def _sequence(self, input: Tensor, state: Tensor, *weights: Tensor, **options) -> tuple[Tensor, Tensor]:
        return ops.rnn(input, state, *weights, nonlinearity=self.nonlinearity, **options)


class GRU(Recurrent):
    r"""Gated recurrent unit of one or more layers, in one or both directions: a drop-in for :class:`torch.nn.GRU`.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Parameters, their names and default initialization, ``state_dict`` and results are those of ``torch.nn.GRU``:
    checkpoints move both ways. The layers run on :func:`rnnkernels.ops.gru`.

    Parameters
    ----------
    input_size : int
        Features of $x_t$.
    hidden_size : int
        Features of $h_t$.
    num_layers : int
        Layers, each reading the outputs of the one below. Default: 1.
    bias : bool
        Whether there are biases. Default: True.
    batch_first : bool
        Input and output as (batch, sequence, feature) rather than (sequence, batch, feature). States are not concerned.
        Default: False.
    dropout : float
        Probability of zeroing an output of each layer but the last, in training. Default: 0.
    bidirectional : bool
        Whether each layer also runs from the last step to the first. Default: False.
    device, dtype
        Where and in which type to make the parameters.

    Raises
    ------
    TypeError, ValueError
        Where ``torch.nn.GRU`` raises them.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3; with the reset gate after the product, as in ``torch.nn.GRU``.

    Examples
    --------
    >>> gru = GRU(10, 20, num_layers=2)
    >>> output, h_n = gru(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    >>> gru.load_state_dict(torch.nn.GRU(10, 20, num_layers=2).state_dict())
    <All keys matched successfully>
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    def _sequence(self, input: Tensor, state: Tensor, *weights: Tensor, **options) -> tuple[Tensor, Tensor]:
        return ops.gru(input, state, *weights, **options)


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
        if self.nonlinearity in ("tanh", "relu"):
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

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3; with the reset gate after the product, as in ``torch.nn.GRUCell``.

    Examples
    --------
    >>> GRUCell(10, 20)(torch.randn(3, 10), torch.zeros(3, 20)).shape
    torch.Size([3, 20])
    """

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
        return super().forward(input, hx)
