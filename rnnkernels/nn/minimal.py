"""Recurrent layers without a recurrent matrix, which train in parallel over time."""

from typing import ClassVar

import torch
from torch import Tensor

from rnnkernels import ops
from rnnkernels._backend import autocast_dtype
from rnnkernels.nn.rnn import SequenceModule, _Seeds, _seen_from_behind
from rnnkernels.ops._checks import check_choice, check_probability
from rnnkernels.ops.minimal import NONLINEARITIES, PARTS, minimal


class Minimal(SequenceModule):
    """What the minimal recurrent layers share. Not for direct use."""

    kind: ClassVar[str]
    """Which of them it is."""

    parts: ClassVar[int]
    """How many rows of the weights a hidden unit has."""

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
        *,
        nonlinearity: str = "positive",
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_choice("nonlinearity", nonlinearity, tuple(NONLINEARITIES))
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = check_probability("dropout", dropout)
        self.bidirectional = bidirectional
        self.nonlinearity = nonlinearity
        rows = self.parts * hidden_size
        for layer in range(num_layers):
            size = input_size if layer == 0 else hidden_size * len(self._suffixes())
            for suffix in self._suffixes():
                shapes = {"weight_ih": (rows, size), **({"bias_ih": (rows,)} if bias else {})}
                for name, shape in shapes.items():
                    parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Initialize all parameters anew as ``torch.nn.Linear`` does, uniformly in $\pm 1/\sqrt{n}$ for $n$ inputs."""
        for name, parameter in self.named_parameters():
            bound = getattr(self, name.replace("bias", "weight")).shape[1] ** -0.5
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """What ``repr`` shows of the arguments."""
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "nonlinearity": "positive",
        }
        given = [f"{name}={getattr(self, name)!r}" for name in defaults if getattr(self, name) != defaults[name]]
        return ", ".join([str(self.input_size), str(self.hidden_size), *given])

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._check(input, states, reset)
        dtype = autocast_dtype(input.device) or input.dtype
        # The state is accumulated in float32: bfloat16 has no number between 0.996 and 1.
        wide = torch.promote_types(dtype, torch.float32)
        initial = [None] * (self.num_layers * len(self._suffixes())) if states is None else states[0].to(wide).unbind(0)
        seeds = _Seeds() if self.training and self.dropout and self.num_layers > 1 else None
        final: list[Tensor] = []
        output = input
        for layer in range(self.num_layers):
            directions = []
            for suffix in self._suffixes():
                weight = getattr(self, f"weight_ih_l{layer}{suffix}")
                bias = getattr(self, f"bias_ih_l{layer}{suffix}") if self.bias else None
                reverse = suffix == "_reverse"
                sequence, last = minimal(
                    output,
                    weight,
                    bias,
                    initial[len(final)],
                    kind=self.kind,
                    nonlinearity=self.nonlinearity,
                    reverse=reverse,
                    lengths=lengths,
                    reset=_seen_from_behind(reset) if reverse and reset is not None else reset,
                )
                directions.append(sequence.to(dtype))
                final.append(last.to(dtype))
            output = torch.cat(directions, dim=-1) if len(directions) > 1 else directions[0]
            if seeds is not None and layer < self.num_layers - 1:
                output = ops.dropout(output, self.dropout, seed=seeds.next())
        return output, (torch.stack(final),)


class MinGRU(Minimal):
    r"""Minimal gated recurrent unit: a GRU whose gate and candidate do not see the state.

    .. math::
        z_t &= \sigma(W_z x_t + b_z) \\
        \tilde h_t &= g(W_h x_t + b_h) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t

    The recurrence is linear in the state, so that a whole sequence is computed in parallel by
    :func:`rnnkernels.ops.linear_scan`. A sequence of a single step is that step: give the final state back to generate
    step by step, with the same numbers.

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
    nonlinearity : {"positive", "identity", "tanh"}
        $g$. ``"positive"``, the default: $g(x) = x + 1/2$ where $x \ge 0$, else $\sigma(x)$, as in the paper's
        log-space form [1]_; states are positive then, but for what is left of an initial state. ``"identity"``: the
        paper's plain form. ``"tanh"``: bounded, as in a GRU.

    Attributes
    ----------
    weight_ih_l{k} : Tensor
        $W_z$ and $W_h$, one below the other: shape (2 * hidden_size, features of the layer's input). The
        direction from the last step has ``weight_ih_l{k}_reverse``.
    bias_ih_l{k} : Tensor
        $b_z$ and $b_h$: shape (2 * hidden_size,). The direction from the last step has ``bias_ih_l{k}_reverse``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    The paper's scan divides by products of decays, which underflow: hence its logarithms, and the positive states that
    have them. :func:`rnnkernels.ops.linear_scan` never divides, and computes the same function without. ``hx`` is
    $h_0$ itself, zeros by default as in ``torch.nn.GRU``, where the paper's log-space listing starts at $g(h_0)$.

    Gates, and the state while it is accumulated, are float32 or better: decays near one do not exist in 16 bits.

    References
    ----------
    .. [1] Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, "Were RNNs all we needed?", arXiv:2410.01201 (2024), section
       3.1; the log-space form: appendix B.

    Examples
    --------
    >>> gru = MinGRU(10, 20, num_layers=2, batch_first=True)
    >>> x = torch.randn(3, 50, 10)
    >>> output, h_n = gru(x)
    >>> output.shape, h_n.shape
    (torch.Size([3, 50, 20]), torch.Size([2, 3, 20]))
    >>> state, steps = None, []
    >>> for t in range(50):
    ...     step, state = gru(x[:, t : t + 1], state)
    ...     steps.append(step)
    >>> torch.allclose(torch.cat(steps, 1), output, atol=1e-6)
    True
    """

    kind, parts = "MinGRU", PARTS["MinGRU"]


class MinLSTM(Minimal):
    r"""Minimal long short-term memory: an LSTM whose gates do not see the state, and add up to one.

    .. math::
        f_t &= \sigma(W_f x_t + b_f) \\
        i_t &= \sigma(W_i x_t + b_i) \\
        \tilde h_t &= g(W_h x_t + b_h) \\
        h_t &= \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot \tilde h_t

    There is one state, no cell state beside it. As for :class:`MinGRU`, a whole sequence is computed in parallel by
    :func:`rnnkernels.ops.linear_scan`, and a sequence of a single step is that step.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, nonlinearity
        As in :class:`MinGRU`.

    Attributes
    ----------
    weight_ih_l{k} : Tensor
        $W_f$, $W_i$ and $W_h$, one below the other: shape (3 * hidden_size, features of the layer's input). The
        direction from the last step has ``weight_ih_l{k}_reverse``.
    bias_ih_l{k} : Tensor
        $b_f$, $b_i$ and $b_h$: shape (3 * hidden_size,). The direction from the last step has ``bias_ih_l{k}_reverse``.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    The share $f / (f + i)$ is computed as $\sigma(\log f - \log i)$, which stays exact where both gates close.

    References
    ----------
    Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, "Were RNNs all we needed?", arXiv:2410.01201 (2024), section 3.2; the
    log-space form: appendix B.

    Examples
    --------
    >>> lstm = MinLSTM(10, 20)
    >>> output, h_n = lstm(torch.randn(50, 3, 10), lengths=torch.tensor([50, 20, 1]))
    >>> output.shape, h_n.shape, bool((output[20:, 1] == 0).all())
    (torch.Size([50, 3, 20]), torch.Size([1, 3, 20]), True)
    """

    kind, parts = "MinLSTM", PARTS["MinLSTM"]
