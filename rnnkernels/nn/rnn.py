"""Recurrent modules that stand where ``torch.nn``'s stood."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnkernels import ops
from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.kernels.eager import onednn
from rnnkernels.kernels.eager.products import by_onednn
from rnnkernels.ops._both_directions import both_directions, can_run_both
from rnnkernels.ops._checks import (
    check_choice,
    check_flag,
    check_grad_clip,
    check_lengths,
    check_probability,
    check_reset,
    differentiable,
)
from rnnkernels.ops._layers import layers, serves
from rnnkernels.ops._sequence import pieces_of_time, transformed
from rnnkernels.ops.lstm import FEW_STEPS, run_onednn

State = Tensor | tuple[Tensor, Tensor]


class SequenceModule(torch.nn.Module):
    """What every module over sequences does around its layers: batches in all forms. Not for direct use."""

    state_names: tuple[str, ...] = ("hx",)
    """Arguments of the operator that hold initial states, as error messages name them."""

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the network over a sequence.

        Parameters
        ----------
        input : Tensor or PackedSequence
            Shape (sequence_length, batch, input_size); (batch, sequence_length, input_size) with ``batch_first``;
            (sequence_length, input_size) unbatched; or a packed sequence, sorted or not.
        hx : Tensor, shape (num_directions * num_layers, batch, hidden_size), or a pair of them, optional
            Initial states; without the batch dimension where ``input`` has none. The LSTM takes (h_0, c_0), where h_0
            has ``proj_size`` features if there is a projection. Default: zeros.
        lengths : Tensor of int64, shape (batch,), optional
            Steps of each sequence of a padded batch, in any order: what ``pack_padded_sequence`` is for, without
            packing. The output is zero in the padding, and h_n holds each sequence's own last state. Default: all.
        reset : Tensor of bool, shape (sequence_length, batch), optional
            True at the first step of a new sequence within a row: no state crosses to it, in either direction. Laid out
            like ``input``: (batch, sequence_length) with ``batch_first``, (sequence_length,) unbatched.

        Returns
        -------
        output : Tensor or PackedSequence
            As ``input``, with num_directions * hidden_size features: the states of the last layer at each step.
        h_n : Tensor, or a pair of them
            As ``hx``: the final states of each layer and direction.

        Raises
        ------
        TypeError
            If ``input`` is neither a tensor nor a packed sequence.
        ValueError
            If ``input`` has the wrong number of dimensions or a type other than the weights', or if ``lengths`` or
            ``reset`` do not fit or can't be combined with this form of input.
        RuntimeError
            If another size does not fit, or the sequence is empty.
        """
        if isinstance(input, PackedSequence):
            for name, value in (("lengths", lengths), ("reset", reset)):
                if value is not None:
                    raise ValueError(f"{name}: expected None with a PackedSequence, got {type(value).__name__}")
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions, got shape {tuple(input.shape)}")
        states = self._states(hx, input.dim())
        batched = input.dim() == 3
        if not batched:
            if lengths is not None:
                raise ValueError("lengths: expected None with an input without batch, got a value")
            input = input.unsqueeze(1)
            states = None if states is None else tuple(state.unsqueeze(1) for state in states)
            reset = reset.unsqueeze(-1) if isinstance(reset, Tensor) else reset
        elif self.batch_first:
            input = input.transpose(0, 1)
            reset = reset.transpose(0, 1) if isinstance(reset, Tensor) and reset.dim() == 2 else reset
        output, final = self._run(input, states, lengths, reset)
        if not batched:
            output, final = output.squeeze(1), tuple(state.squeeze(1) for state in final)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, self._returned(final)

    def _states(self, hx: State | None, dimensions: int) -> tuple[Tensor, ...] | None:
        """The initial states as a tuple, each checked to be a tensor of so many dimensions."""
        if hx is None:
            return None
        names = self.state_names
        if len(names) == 1:
            states = (hx,)
        elif isinstance(hx, (tuple, list)) and len(hx) == len(names):
            states = tuple(hx)
        else:
            raise RuntimeError(f"hx: expected a pair of Tensors ({', '.join(names)}), got {type(hx).__name__}")
        for name, state in zip(names, states, strict=True):
            if not isinstance(state, Tensor) or state.dim() != dimensions:
                came = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
                raise RuntimeError(f"{name}: expected a Tensor of {dimensions} dimensions, as input has, got {came}")
        return states

    def _returned(self, final: tuple[Tensor, ...]) -> State:
        return final[0] if len(final) == 1 else final

    def _forward_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        states = self._states(hx, 3)
        if states is not None and sorted_indices is not None:
            states = tuple(state.index_select(1, sorted_indices) for state in states)
        output, final = self._run_packed(data, batch_sizes, states)
        if unsorted_indices is not None:
            final = tuple(state.index_select(1, unsorted_indices) for state in final)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), self._returned(final)

    def _run_packed(
        self, data: Tensor, batch_sizes: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers over the rows of a packed batch, sorted by length."""
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, final = self._run(padded, states, lengths, None)
        return pack_padded_sequence(output, lengths).data, final

    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each state."""
        return (self.hidden_size,)

    def _parameter(self, name: str) -> Tensor:
        """A parameter by name: parametrized ones are attributes, which take longer to find."""
        value = self._parameters.get(name)
        return getattr(self, name) if value is None else value

    def _check(self, input: Tensor, states: tuple[Tensor, ...] | None, reset: Tensor | None) -> None:
        weight = self._parameter("weight_ih_l0")
        sequence_length, batch, features = input.shape
        if features != self.input_size:
            raise RuntimeError(f"input: expected {self.input_size} features (input_size), got {features}")
        if sequence_length == 0:
            raise RuntimeError("input: expected at least 1 step, got an empty sequence")
        if input.dtype != weight.dtype and autocast_dtype(input.device) is None:
            raise ValueError(f"input: expected dtype {weight.dtype}, as the weights have, got {input.dtype}")
        if input.device != weight.device:
            raise RuntimeError(f"input: expected device {weight.device}, where the weights are, got {input.device}")
        if reset is not None:
            check_reset(reset, sequence_length, batch, input.device)
        if states is None:
            return
        layers = self.num_layers * len(self._suffixes())
        for name, state, size in zip(self.state_names, states, self._state_sizes(), strict=True):
            expected = (layers, batch, size)
            if state.shape != expected:
                raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(state.shape)}")
            if state.dtype != input.dtype and autocast_dtype(input.device) is None:
                raise RuntimeError(f"{name}: expected dtype {input.dtype}, as input has, got {state.dtype}")
            if state.device != input.device:
                raise RuntimeError(f"{name}: expected device {input.device}, where input is, got {state.device}")

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers over a batch laid out as (sequence, batch, feature)."""
        raise NotImplementedError


class Recurrent(SequenceModule, torch.nn.RNNBase):
    """What the recurrent modules share: layers, directions, options. Not for direct use."""

    def __init__(
        self,
        *args,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        grad_clip: float | None = None,
        recompute_gates: bool = False,
        **kwargs,
    ) -> None:
        if "proj_size" in kwargs:  # the LSTM has it by position
            came = kwargs["proj_size"]
            raise ValueError(f"proj_size: expected no such argument, as only the LSTM projects its state, got {came!r}")
        self.recurrent_dropout = check_probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = check_probability("zoneout", zoneout)
        self.weight_dropout = check_probability("weight_dropout", weight_dropout)
        check_grad_clip(grad_clip)
        self.grad_clip = grad_clip
        check_flag("recompute_gates", recompute_gates)
        self.recompute_gates = recompute_gates
        self.layer_norm = layer_norm
        super().__init__(*args, **kwargs)
        like = {"device": self.weight_ih_l0.device, "dtype": self.weight_ih_l0.dtype}
        rows = self.weight_ih_l0.shape[0]
        for layer in range(self.num_layers):
            for suffix in self._suffixes():
                for name, shape in self._added_parameters(rows).items():
                    parameter = torch.nn.Parameter(torch.empty(shape, **like))
                    self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
                    self._reset_added(name, parameter)

    def _added_parameters(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters of a layer that options add; the weights have so many ``rows``."""
        return {"norm_hh": (rows,)} if self.layer_norm else {}

    def _reset_added(self, name: str, parameter: torch.nn.Parameter) -> None:
        if name.startswith("norm"):
            torch.nn.init.zeros_(parameter) if name.endswith("bias") else torch.nn.init.ones_(parameter)
        else:
            bound = self.hidden_size**-0.5
            torch.nn.init.uniform_(parameter, -bound, bound)

    def reset_parameters(self) -> None:
        """Initialize all parameters anew: weights and biases as ``torch.nn`` does, gains to one."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("norm"):
                self._reset_added(name.rsplit("_l", 1)[0], parameter)

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the weights where they are. There for compatibility with ``torch.nn.RNN``."""

    def extra_repr(self) -> str:
        """What ``repr`` shows of the arguments."""
        given = [
            f"{name}={getattr(self, name)!r}"
            for name, default in self._options.items()
            if getattr(self, name) != default
        ]
        return ", ".join([super().extra_repr(), *given])

    _options: ClassVar[dict[str, object]] = {
        "recurrent_dropout": 0.0,
        "zoneout": 0.0,
        "layer_norm": False,
        "weight_dropout": 0.0,
        "grad_clip": None,
        "recompute_gates": False,
    }
    """Arguments that ``torch.nn`` does not have, and their defaults."""

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers over a batch laid out as (sequence, batch, feature)."""
        self._check(input, states, reset)
        if lengths is None and reset is None and self._native_may_serve(input):
            weights = [self._parameter(name) for name in self._flat_weights_names]
            if self._native_is_faster(input, states, weights):
                return self._run_native(input, states, weights)
        suffixes = self._suffixes()
        if states is None:
            states = self._zeros(input)
        seeds = _Seeds() if self.training and self._draws() else None
        if reset is None and self._in_one_operator(input):
            return self._run_layers(input, states, lengths, seeds)
        initial = zip(*(state.unbind(0) for state in states), strict=True)
        final = []
        output = input
        at_once = self._both_are_plain() and reset is None and self._all_steps_at_once(input) and can_run_both(input)
        for layer in range(self.num_layers):
            each = [
                (next(initial), self._weights(f"l{layer}{suffix}", seeds), None if seeds is None else seeds.next())
                for suffix in suffixes
            ]
            if at_once:
                own, weights, _ = zip(*each, strict=True)
                both = both_directions(self._operator, output, own, weights, lengths=lengths, **self._plain_options())
                results = list(zip(*(result.unbind(0) for result in both), strict=True))
            else:
                results = [
                    self._sequence(
                        output,
                        *own,
                        **weights,
                        **self._operator_options(),
                        reverse=suffix == "_reverse",
                        lengths=lengths,
                        reset=_seen_from_behind(reset) if suffix == "_reverse" and reset is not None else reset,
                        recurrent_dropout=self.recurrent_dropout,
                        zoneout=self.zoneout,
                        recompute_gates=self.recompute_gates,
                        grad_clip=self.grad_clip,
                        training=self.training,
                        seed=seed,
                    )
                    for suffix, (own, weights, seed) in zip(suffixes, each, strict=True)
                ]
            directions = [sequence for sequence, *_ in results]
            final += [last for _, *last in results]
            output = torch.cat(directions, dim=-1) if len(directions) > 1 else directions[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                output = ops.dropout(output, self.dropout, seed=seeds.next())
        return output, tuple(torch.stack(kind) for kind in zip(*final, strict=True))

    def _in_one_operator(self, input: Tensor) -> bool:
        """Whether one operator takes all layers."""
        if self.num_layers == 1 or self.bidirectional or self.proj_size or not self._plain() or transformed():
            return False
        return self._all_steps_at_once(input) and serves(self._operator, input, self.hidden_size, self.num_layers)

    def _all_steps_at_once(self, input: Tensor) -> bool:
        """Whether the gates of all steps may exist at once: a layer alone takes pieces of time where none are kept."""
        if torch.compiler.is_compiling():
            return True
        kept = torch.is_grad_enabled() and not self.recompute_gates
        return len(pieces_of_time(input, 4 * self.hidden_size, False, kept, "triton")) == 1

    def _run_layers(
        self, input: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, seeds: "_Seeds | None"
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        of_dropout = []
        if seeds is not None:
            for _ in range(self.num_layers - 1):
                seeds.next()  # an operator's for each layer, as if it had one of its own
                of_dropout.append(seeds.next())
        weights = [self._weights(f"l{layer}", seeds) for layer in range(self.num_layers)]
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        options = {"lengths": lengths, "dropout": self.dropout, "seeds": of_dropout, "nonlinearity": nonlinearity}
        return layers(self._operator, input, states, weights, **options)

    def _zeros(self, input: Tensor) -> tuple[Tensor, ...]:
        """The initial states where none are given."""
        layers = self.num_layers * len(self._suffixes())
        return tuple(input.new_zeros(layers, input.shape[1], size) for size in self._state_sizes())

    def _plain(self) -> bool:
        """Whether no argument asks for what ``torch.nn`` can't do."""
        values = self.__dict__
        return all(values[name] == default for name, default in self._options.items())

    def _both_are_plain(self) -> bool:
        """Whether there are two directions, and no argument asks for what only one direction at a time can do."""
        if not self.bidirectional or self.proj_size:
            return False
        served = ("nonlinearity", "recompute_gates", "weight_dropout")
        return all(getattr(self, name) == value for name, value in self._options.items() if name not in served)

    def _native_may_serve(self, input: Tensor) -> bool:
        """Whether PyTorch's own operators can do what is asked for, on a CPU."""
        if input.device.type != "cpu" or torch.compiler.is_compiling() or input.numel() == 0:
            return False
        if input.dtype not in (torch.float32, torch.float64):  # PyTorch sums 16-bit gradients in 16 bits
            return False
        if self.dropout and self.training and self.num_layers > 1:
            return False
        if not self._plain() or transformed() or torch.is_autocast_enabled("cpu"):
            return False
        return resolve(input.device, input.dtype) == "eager"

    def _native_is_faster(self, input: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]) -> bool:
        """Whether PyTorch's own operator serves best: for a few steps."""
        wanted = differentiable((input, *(states or ()), *weights))
        return len(input) <= (self._native_steps_training if wanted else self._native_steps)

    # Up to so many steps a call of our operator costs more than it saves (a CPU, 1 thread, float32, torch 2.13).
    _native_steps: ClassVar[float] = 32
    _native_steps_training: ClassVar[float] = 12

    def _run_native(
        self, input: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        states = self._zeros(input) if states is None else states
        options = (weights, self.bias, self.num_layers, 0.0, self.training, self.bidirectional, False)
        output, *final = self._native_operator()(input, states if len(states) > 1 else states[0], *options)
        return output, tuple(final)

    _native_packed: ClassVar[bool] = True
    """Whether PyTorch's own operator serves best for a packed batch where no gradient is wanted."""

    def _run_packed(
        self, data: Tensor, batch_sizes: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._native_packed and self._native_steps and self._native_may_serve(data):
            weights = [self._parameter(name) for name in self._flat_weights_names]
            if not differentiable((data, *(states or ()), *weights)):
                like_a_step = data[: int(batch_sizes[0])].unsqueeze(0)
                self._check(like_a_step, states, None)
                (hx,) = self._zeros(like_a_step) if states is None else states
                options = (weights, self.bias, self.num_layers, 0.0, self.training, self.bidirectional)
                output, h_n = self._native_operator()(data, batch_sizes, hx, *options)
                return output, (h_n,)
        return super()._run_packed(data, batch_sizes, states)

    def _native_operator(self):
        """PyTorch's operator for this cell."""
        raise NotImplementedError

    def _draws(self) -> bool:
        """Whether a pass in training draws random masks."""
        between = self.dropout if self.num_layers > 1 else 0
        return bool(between or self.recurrent_dropout or self.zoneout or self.weight_dropout)

    def _weights(self, which: str, seeds: "_Seeds | None") -> dict[str, Tensor]:
        """The parameters of a layer and direction, by the operator's names."""
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        names += ["weight_hr"] if self.proj_size else []
        names += self._added_parameters(1)
        weights = {name: getattr(self, f"{name}_{which}") for name in names}
        if self.weight_dropout and self.training:
            weights["weight_hh"] = ops.dropout(weights["weight_hh"], self.weight_dropout, seed=seeds.next())
        return weights

    _operator: ClassVar[str]
    """The operator that runs a layer."""

    def _operator_options(self) -> dict[str, object]:
        """What only this cell's operator takes."""
        return {}

    def _plain_options(self) -> dict[str, object]:
        """What the operator of a plain layer takes beside tensors."""
        return {"recompute_gates": self.recompute_gates}

    def _sequence(self, input: Tensor, *states: Tensor, **options) -> tuple[Tensor, ...]:
        """Run one layer in one direction."""
        raise NotImplementedError


class _Seeds:
    """One draw from PyTorch's generator, and as many seeds from it as masks are needed."""

    def __init__(self) -> None:
        self.last = torch.randint(2**62, ())

    def next(self) -> Tensor:
        self.last = self.last + 1
        return self.last


def _seen_from_behind(reset: Tensor) -> Tensor:
    """Where a reversed pass must forget: at the last step of a sequence, the one before the next one's first."""
    return torch.cat([reset[1:], torch.zeros_like(reset[:1])])


class RNN(Recurrent):
    r"""Plain (Elman) RNN of one or more layers, in one or both directions: a drop-in for :class:`torch.nn.RNN`.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Parameters, their names and default initialization, ``state_dict`` and results are those of ``torch.nn.RNN``:
    checkpoints move both ways. ``nonlinearity`` takes two more values, and the arguments after ``dtype`` are new. The
    layers run on :func:`rnnkernels.ops.rnn`: Triton kernels on a GPU, PyTorch on a CPU (see
    :func:`rnnkernels.use_backend`).

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
    recurrent_dropout : float
        Probability of a unit of $h_{t-1}$ to be missing from the recurrent products, the same units at every step of a
        sequence. In training only. Default: 0.
    zoneout : float
        Probability of a unit to keep its old state at a step; out of training, the expectation. Default: 0.
    layer_norm : bool
        Whether to normalize $f$'s argument before the biases, with learned gains ``norm_hh_l{k}``. Default: False.
    weight_dropout : float
        Probability of zeroing a weight of $W_{hh}$ (DropConnect), one mask for a whole forward pass. In training only.
        Default: 0.
    grad_clip : float, optional
        Bound on each element of the gradients of the activations' arguments, on their way back through time. Default:
        none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes again what lies between the states, as the operator
        says. Default: False.

    Raises
    ------
    TypeError, ValueError
        Where ``torch.nn.RNN`` raises them, and for an option that is out of range.

    Notes
    -----
    All random masks, dropout's between the layers too, come from one draw of PyTorch's CPU generator at each forward
    pass in training: ``torch.manual_seed`` fixes them, and they are the same on every device.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211. Bidirectional: Schuster and Paliwal, IEEE
    Transactions on Signal Processing 45 (1997), 2673-2681.

    Recurrent dropout: Gal and Ghahramani, NeurIPS 2016. Zoneout: Krueger et al., ICLR 2017. Layer normalization: Ba,
    Kiros and Hinton, arXiv:1607.06450 (2016). DropConnect: Wan et al., ICML 2013; on $W_{hh}$: Merity, Keskar and
    Socher, ICLR 2018. Clipping: Graves, arXiv:1308.0850 (2013), section 2.1.

    Examples
    --------
    >>> rnn = RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
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
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        grad_clip: float | None = None,
        recompute_gates: bool = False,
        **unknown,
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
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            grad_clip=grad_clip,
            recompute_gates=recompute_gates,
            **unknown,
        )

    _options: ClassVar[dict[str, object]] = {"nonlinearity": "tanh", **Recurrent._options}

    def _plain(self) -> bool:
        values = self.__dict__
        default = all(values[name] == value for name, value in Recurrent._options.items())
        return default and self.nonlinearity in ("tanh", "relu")

    def _native_operator(self):
        return torch.rnn_tanh if self.nonlinearity == "tanh" else torch.rnn_relu

    _operator = "rnn"

    def _operator_options(self) -> dict[str, object]:
        return {"nonlinearity": self.nonlinearity}

    def _plain_options(self) -> dict[str, object]:
        return self._operator_options()

    def _sequence(self, input: Tensor, *states: Tensor, **options) -> tuple[Tensor, ...]:
        return ops.rnn(input, *states, **options)


class GRU(Recurrent):
    r"""Gated recurrent unit of one or more layers, in one or both directions: a drop-in for :class:`torch.nn.GRU`.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Parameters, their names and default initialization, ``state_dict`` and results are those of ``torch.nn.GRU``:
    checkpoints move both ways. The arguments after ``dtype`` are new. The layers run on :func:`rnnkernels.ops.gru`.

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
    reset_after : bool
        Whether the reset gate acts after the product with $W_{hn}$, as in ``torch.nn.GRU``, or before it, as first
        published: $W_{hn} (r_t \odot h_{t-1}) + b_{hn}$. Default: True.
    recurrent_dropout : float
        Probability of a unit of $h_{t-1}$ to be missing from the recurrent products, the same units at every step of a
        sequence. In training only. Default: 0.
    zoneout : float
        Probability of a unit to keep its old state at a step; out of training, the expectation. Default: 0.
    layer_norm : bool
        Whether to normalize the products with $W_{ih}$ and $W_{hh}$, with learned gains
        ``norm_ih_l{k}`` and ``norm_hh_l{k}``. Default: False.
    weight_dropout : float
        Probability of zeroing a weight of $W_{hh}$ (DropConnect), one mask for a whole forward pass. In training only.
        Default: 0.
    grad_clip : float, optional
        Bound on each element of the gradients of the activations' arguments, on their way back through time. Default:
        none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes the gates again, of all steps at once, rather than keep
        sequence_length * batch * 4 * hidden_size values for each layer and direction. Default: False.

    Raises
    ------
    TypeError, ValueError
        Where ``torch.nn.GRU`` raises them, and for an option that is out of range.

    Notes
    -----
    All random masks, dropout's between the layers too, come from one draw of PyTorch's CPU generator at each forward
    pass in training: ``torch.manual_seed`` fixes them, and they are the same on every device.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3; with the reset gate after the product, as in ``torch.nn.GRU``.

    Recurrent dropout: Gal and Ghahramani, NeurIPS 2016. Zoneout: Krueger et al., ICLR 2017. Layer normalization: Ba,
    Kiros and Hinton, arXiv:1607.06450 (2016). DropConnect: Wan et al., ICML 2013; on $W_{hh}$: Merity, Keskar and
    Socher, ICLR 2018. Clipping: Graves, arXiv:1308.0850 (2013), section 2.1.

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
        *,
        reset_after: bool = True,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        grad_clip: float | None = None,
        recompute_gates: bool = False,
        **unknown,
    ) -> None:
        self.reset_after = reset_after
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
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            grad_clip=grad_clip,
            recompute_gates=recompute_gates,
            **unknown,
        )

    _options: ClassVar[dict[str, object]] = {"reset_after": True, **Recurrent._options}

    def _added_parameters(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {"norm_ih": (rows,), "norm_hh": (rows,)} if self.layer_norm else {}

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        deep = self.num_layers * len(self._suffixes()) > 1
        if deep and lengths is not None and reset is None and self._native_steps and self._native_may_serve(input):
            weights = [self._parameter(name) for name in self._flat_weights_names]
            if not differentiable((input, *(states or ()), *weights)):
                # PyTorch's operator takes all layers of a packed batch at once: the rows are packed but once.
                self._check(input, states, None)
                lengths = check_lengths(lengths, *input.shape[:2], input.device)
                packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
                output, h_n = self._forward_packed(packed, None if states is None else states[0])
                return pad_packed_sequence(output, total_length=len(input))[0], (h_n,)
        return super()._run(input, states, lengths, reset)

    def _native_is_faster(self, input: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]) -> bool:
        if super()._native_is_faster(input, states, weights):
            return True
        # What the operator would do for each layer and direction, without turning the sequence round.
        wanted = differentiable((input, *(states or ()), *weights))
        return bool(self._native_steps) and not wanted and not by_onednn(input[0], weights[1])

    def _native_operator(self):
        return torch.gru

    _operator = "gru"

    def _operator_options(self) -> dict[str, object]:
        return {"reset_after": self.reset_after}

    def _sequence(self, input: Tensor, *states: Tensor, **options) -> tuple[Tensor, ...]:
        return ops.gru(input, *states, **options)


class LSTM(Recurrent):
    r"""Long short-term memory of one or more layers, in one or both directions: a drop-in for :class:`torch.nn.LSTM`.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Parameters, their names and default initialization, ``state_dict`` and results are those of ``torch.nn.LSTM``:
    checkpoints move both ways. The arguments after ``dtype`` are new. The layers run on :func:`rnnkernels.ops.lstm`.

    Parameters
    ----------
    input_size : int
        Features of $x_t$.
    hidden_size : int
        Features of $c_t$, and of $h_t$ where there is no projection.
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
    proj_size : int
        Features of $h_t = W_{hr} (o_t \odot \tanh(c_t))$; 0: no projection. Default: 0.
    device, dtype
        Where and in which type to make the parameters.
    peephole : bool
        Whether the gates see the cell state: $p_i \odot c_{t-1}$, $p_f \odot c_{t-1}$ and $p_o \odot c_t$ join their
        arguments, with learned ``weight_peephole_l{k}`` of shape (3, hidden_size). Default: False.
    recurrent_dropout : float
        Probability of a unit of $h_{t-1}$ to be missing from the recurrent products, the same units at every step of a
        sequence. In training only. Default: 0.
    zoneout : float
        Probability of a unit to keep its old state at a step; out of training, the expectation. Default: 0.
    zoneout_cell : float
        The same for the cell state. Default: 0.
    layer_norm : bool
        Whether to normalize the products with $W_{ih}$ and $W_{hh}$, and $c_t$ where it enters $h_t$, with learned
        gains ``norm_ih_l{k}``, ``norm_hh_l{k}`` and ``norm_cell_weight_l{k}``, and a bias ``norm_cell_bias_l{k}``.
        Default: False.
    weight_dropout : float
        Probability of zeroing a weight of $W_{hh}$ (DropConnect), one mask for a whole forward pass. In training only.
        Default: 0.
    grad_clip : float, optional
        Bound on each element of the gradients of the activations' arguments, on their way back through time. Default:
        none.
    recompute_gates : bool
        Memory against time: whether the backward pass computes the gates again, of all steps at once, rather than keep
        sequence_length * batch * 4 * hidden_size values for each layer and direction. Default: False.

    Raises
    ------
    TypeError, ValueError
        Where ``torch.nn.LSTM`` raises them, and for an option that is out of range.

    Notes
    -----
    All random masks, dropout's between the layers too, come from one draw of PyTorch's CPU generator at each forward
    pass in training: ``torch.manual_seed`` fixes them, and they are the same on every device.

    References
    ----------
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), 1735-1780; forget gate: Gers,
    Schmidhuber and Cummins, Neural Computation 12 (2000), 2451-2471; peepholes: Gers, Schraudolph and Schmidhuber,
    JMLR 3 (2002), 115-143; projection: Sak, Senior and Beaufays, arXiv:1402.1128 (2014).

    Recurrent dropout: Gal and Ghahramani, NeurIPS 2016. Zoneout: Krueger et al., ICLR 2017. Layer normalization: Ba,
    Kiros and Hinton, arXiv:1607.06450 (2016). DropConnect: Wan et al., ICML 2013; on $W_{hh}$: Merity, Keskar and
    Socher, ICLR 2018. Clipping: Graves, arXiv:1308.0850 (2013), section 2.1.

    Examples
    --------
    >>> lstm = LSTM(10, 20, num_layers=2, batch_first=True)
    >>> output, (h_n, c_n) = lstm(torch.randn(3, 5, 10))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    >>> lstm.load_state_dict(torch.nn.LSTM(10, 20, num_layers=2).state_dict())
    <All keys matched successfully>
    """

    state_names = ("h_0", "c_0")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        peephole: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        grad_clip: float | None = None,
        recompute_gates: bool = False,
    ) -> None:
        self.peephole = peephole
        self.zoneout_cell = check_probability("zoneout_cell", zoneout_cell)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            grad_clip=grad_clip,
            recompute_gates=recompute_gates,
        )

    _options: ClassVar[dict[str, object]] = {"peephole": False, "zoneout_cell": 0.0, **Recurrent._options}

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _added_parameters(self, rows: int) -> dict[str, tuple[int, ...]]:
        added: dict[str, tuple[int, ...]] = {"weight_peephole": (3, self.hidden_size)} if self.peephole else {}
        if self.layer_norm:
            cell = (self.hidden_size,)
            added |= {"norm_ih": (rows,), "norm_hh": (rows,), "norm_cell_weight": cell, "norm_cell_bias": cell}
        return added

    def _draws(self) -> bool:
        return super()._draws() or bool(self.zoneout_cell)

    _native_steps: ClassVar[float] = float("inf")
    _native_steps_training: ClassVar[float] = 0
    _native_packed: ClassVar[bool] = False

    def _native_is_faster(self, input: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]) -> bool:
        # What the operator would do for a plain layer, without its checks.
        by_layer = len(input) > FEW_STEPS and self._native_steps and self._on_onednn(input)
        return by_layer or super()._native_is_faster(input, states, weights)

    def _on_onednn(self, input: Tensor) -> bool:
        return not self.proj_size and onednn.available(input)

    def _run_native(
        self, input: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self._on_onednn(input):
            return super()._run_native(input, states, weights)
        directions = len(self._suffixes())
        layers = self.num_layers * directions
        if states is None:
            zeros = input.new_zeros(input.shape[1], self.hidden_size)
            initial = [(zeros, zeros)] * layers
        else:
            initial = list(zip(*(state.unbind(0) for state in states), strict=True))
        each = len(weights) // layers
        output, final = input, []
        for first in range(0, layers, directions):
            outputs = []
            for index in range(first, first + directions):
                own = weights[each * index : each * (index + 1)]
                sequence, *last = run_onednn(output, *initial[index], own, reverse=index > first)
                outputs.append(sequence)
                final.append(last)
            output = sequence if directions == 1 else torch.cat(outputs, dim=-1)
        if layers == 1:
            return output, tuple(state.unsqueeze(0) for state in last)
        return output, tuple(torch.stack(kind) for kind in zip(*final, strict=True))

    def _native_operator(self):
        return torch.lstm

    _operator = "lstm"

    def _operator_options(self) -> dict[str, object]:
        return {"zoneout_cell": self.zoneout_cell}

    def _sequence(self, input: Tensor, *states: Tensor, **options) -> tuple[Tensor, ...]:
        return ops.lstm(input, *states, **options)
