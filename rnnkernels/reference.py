"""The textbook equations, one step at a time: the specification that every kernel is held to.

Plain differentiable PyTorch in any floating-point type, on any device, with no concern for speed. The operators fall
back on these functions for double backward, and the tests compare every kernel with them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rnnkernels.kernels.eager import random


def identity(input: Tensor) -> Tensor:
    """Return ``input`` as it is: the activation of a linear recurrence."""
    return input


ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": identity}
"""The activations $f$ of the plain RNN, by the name that ``nonlinearity=`` takes."""


class _ClippedGradient(torch.autograd.Function):
    """The identity, whose gradient is clipped element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, bound: float) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _) -> Tensor:
        return tangent.view_as(tangent)


def clip_gradient(input: Tensor, bound: float | None) -> Tensor:
    r"""Return ``input``, and clip each element of its gradient to $[-\text{bound}, \text{bound}]$ on the way back.

    References
    ----------
    Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850 (2013), section 2.1: the gradient of
    the pre-activations is clipped.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> (clip_gradient(x, 0.5) * torch.tensor([0.1, 3.0])).sum().backward()
    >>> x.grad
    tensor([0.1000, 0.5000])
    """
    return input if bound is None else _ClippedGradient.apply(input, bound)


def layer_norm(input: Tensor, gain: Tensor | None, epsilon: float = 1e-5) -> Tensor:
    r"""Layer normalization over the last dimension; ``input`` itself where ``gain`` is None.

    .. math:: \text{gain} \odot \frac{v - \operatorname{mean}(v)}{\sqrt{\operatorname{var}(v) + \epsilon}}

    References
    ----------
    Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), section 3.

    Examples
    --------
    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), epsilon=0.0)
    tensor([[-1.,  1.]])
    """
    return input if gain is None else functional.layer_norm(input, gain.shape, gain, None, epsilon)


def _from_input(input: Tensor, weight_ih: Tensor | None) -> Tensor:
    """The product with the input; ``input`` is that product already where there are no weights."""
    return input if weight_ih is None else functional.linear(input, weight_ih)


def rnn_cell(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    *,
    norm_hh: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    grad_clip: float | None = None,
) -> Tensor:
    r"""One step of the plain (Elman) RNN.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    With ``norm_hh``,

    .. math:: h_t = f(\operatorname{LN}(W_{ih} x_t + W_{hh} h_{t-1}) + b_{ih} + b_{hh})

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
    norm_hh : Tensor, shape (hidden_size,), optional
        Gain of :func:`layer_norm`.
    recurrent_mask : Tensor, shape (batch, hidden_size), optional
        Multiplies $h_{t-1}$ in the product with $W_{hh}$.
    grad_clip : float, optional
        Bound on the gradient of the argument of $f$; see :func:`clip_gradient`.

    Returns
    -------
    Tensor, shape (batch, hidden_size)
        $h_t$.

    References
    ----------
    Elman, "Finding structure in time", Cognitive Science 14 (1990), 179-211; written as in ``torch.nn.RNN``. With layer
    normalization: Ba, Kiros and Hinton, arXiv:1607.06450 (2016), equation 4.

    Examples
    --------
    >>> h = rnn_cell(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([[-3.0]]))
    >>> float(h) == float(torch.tanh(torch.tensor(-1.0)))
    True
    """
    recurrent = hidden if recurrent_mask is None else hidden * recurrent_mask
    a = layer_norm(_from_input(input, weight_ih) + functional.linear(recurrent, weight_hh), norm_hh)
    a = sum((bias for bias in (bias_ih, bias_hh) if bias is not None), a)
    return ACTIVATIONS[nonlinearity](clip_gradient(a, grad_clip))


def gru_cell(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    reset_after: bool = True,
    *,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    grad_clip: float | None = None,
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
    norm_ih, norm_hh : Tensor, shape (3 * hidden_size,), optional
        Gains of :func:`layer_norm` of the products with ``weight_ih`` and ``weight_hh``: over those of r and z
        together, and over that of n, before biases are added.
    recurrent_mask : Tensor, shape (batch, hidden_size), optional
        Multiplies $h_{t-1}$ in the products with ``weight_hh``.
    grad_clip : float, optional
        Bound on the gradients of the arguments of $\sigma$ and $\tanh$; see :func:`clip_gradient`.

    Returns
    -------
    Tensor, shape (batch, hidden_size)
        $h_t$.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", EMNLP
    2014, section 2.3, where $z$ stands for $1 - z$; reset after the product: as in ``torch.nn.GRU``. With layer
    normalization: Ba, Kiros and Hinton, arXiv:1607.06450 (2016), supplementary material.

    Examples
    --------
    >>> gru_cell(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(3, 1), torch.zeros(3, 1))  # half of n = 0, half of h
    tensor([[0.5000]])
    """
    size = hidden.shape[-1]
    recurrent = hidden if recurrent_mask is None else hidden * recurrent_mask

    def normalized(product: Tensor, gain: Tensor | None, rows: slice) -> Tensor:
        return layer_norm(product, None if gain is None else gain[rows])

    def part(value: Tensor | None, rows: slice) -> Tensor | float:
        return 0.0 if value is None else value[rows]

    rz, candidate = slice(0, 2 * size), slice(2 * size, 3 * size)
    projected = _from_input(input, weight_ih)
    from_input = [normalized(projected[:, rows], norm_ih, rows) + part(bias_ih, rows) for rows in (rz, candidate)]
    from_state = normalized(functional.linear(recurrent, weight_hh[rz]), norm_hh, rz) + part(bias_hh, rz)
    r, z = torch.sigmoid(clip_gradient(from_input[0] + from_state, grad_clip)).chunk(2, dim=-1)
    carried = functional.linear(recurrent if reset_after else r * recurrent, weight_hh[candidate])
    carried = normalized(carried, norm_hh, candidate) + part(bias_hh, candidate)
    n = torch.tanh(clip_gradient(from_input[1] + (r * carried if reset_after else carried), grad_clip))
    return (1 - z) * n + z * hidden


def lstm_cell(
    input: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    weight_peephole: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of the long short-term memory.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    With ``weight_hr``, $h_t = W_{hr} (o_t \odot \tanh(c_t))$. With ``weight_peephole``, $p_i \odot c_{t-1}$,
    $p_f \odot c_{t-1}$ and $p_o \odot c_t$ join the arguments of the gates i, f and o.

    Parameters
    ----------
    input : Tensor, shape (batch, input_size)
        $x_t$.
    hidden : Tensor, shape (batch, state_size)
        $h_{t-1}$; ``state_size`` is that of the projection, or ``hidden_size`` without one.
    cell : Tensor, shape (batch, hidden_size)
        $c_{t-1}$.
    weight_ih : Tensor, shape (4 * hidden_size, input_size)
        $W_{ii}$, $W_{if}$, $W_{ig}$ and $W_{io}$, one below the other.
    weight_hh : Tensor, shape (4 * hidden_size, state_size)
    bias_ih, bias_hh : Tensor, shape (4 * hidden_size,), optional
        Left out where None.
    weight_hr : Tensor, shape (state_size, hidden_size), optional
        The projection.
    weight_peephole : Tensor, shape (3, hidden_size), optional
        $p_i$, $p_f$ and $p_o$.
    norm_ih, norm_hh : Tensor, shape (4 * hidden_size,), optional
        Gains of :func:`layer_norm` of the products with ``weight_ih`` and ``weight_hh``, over all gates together,
        before biases are added.
    norm_cell_weight, norm_cell_bias : Tensor, shape (hidden_size,), optional
        Gain and bias of :func:`layer_norm` of $c_t$ where it enters $h_t$. Both or none.
    recurrent_mask : Tensor, shape (batch, state_size), optional
        Multiplies $h_{t-1}$ in the product with ``weight_hh``.
    grad_clip : float, optional
        Bound on the gradients of the gates' arguments; see :func:`clip_gradient`.

    Returns
    -------
    hidden : Tensor, shape (batch, state_size)
        $h_t$.
    cell : Tensor, shape (batch, hidden_size)
        $c_t$.

    References
    ----------
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), 1735-1780; forget gate: Gers,
    Schmidhuber and Cummins, Neural Computation 12 (2000), 2451-2471; peepholes: Gers, Schraudolph and Schmidhuber,
    JMLR 3 (2002), 115-143; projection: Sak, Senior and Beaufays, arXiv:1402.1128 (2014); layer normalization: Ba,
    Kiros and Hinton, arXiv:1607.06450 (2016), supplementary material.

    Examples
    --------
    >>> zeros = torch.zeros(1, 1)
    >>> h, c = lstm_cell(zeros, zeros, torch.ones(1, 1), torch.zeros(4, 1), torch.zeros(4, 1))
    >>> float(c), float(h) == float(torch.tanh(c) / 2)  # every gate is half open
    (0.5, True)
    """
    recurrent = hidden if recurrent_mask is None else hidden * recurrent_mask
    a = layer_norm(_from_input(input, weight_ih), norm_ih)
    a = a + layer_norm(functional.linear(recurrent, weight_hh), norm_hh)
    a = sum((bias for bias in (bias_ih, bias_hh) if bias is not None), a)
    a_i, a_f, a_g, a_o = a.chunk(4, dim=-1)
    if weight_peephole is not None:
        a_i, a_f = a_i + weight_peephole[0] * cell, a_f + weight_peephole[1] * cell
    i, f = (torch.sigmoid(clip_gradient(argument, grad_clip)) for argument in (a_i, a_f))
    cell = f * cell + i * torch.tanh(clip_gradient(a_g, grad_clip))
    if weight_peephole is not None:
        a_o = a_o + weight_peephole[2] * cell
    o = torch.sigmoid(clip_gradient(a_o, grad_clip))
    shown = cell if norm_cell_weight is None else layer_norm(cell, norm_cell_weight) + norm_cell_bias
    hidden = o * torch.tanh(shown)
    return hidden if weight_hr is None else functional.linear(hidden, weight_hr), cell


def zone_out(old: Tensor, new: Tensor, stays: Tensor | float) -> Tensor:
    r"""Zoneout: the old state where it stays, else the new one; a mixture where ``stays`` is a probability.

    .. math:: d_t \odot h_{t-1} + (1 - d_t) \odot \tilde h_t

    References
    ----------
    Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017, section 3.2.

    Examples
    --------
    >>> zone_out(torch.zeros(2), torch.ones(2), torch.tensor([True, False]))
    tensor([0., 1.])
    >>> zone_out(torch.zeros(2), torch.ones(2), 0.25)
    tensor([0.7500, 0.7500])
    """
    return torch.where(stays, old, new) if isinstance(stays, Tensor) else stays * old + (1 - stays) * new


def _over_time(
    step: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    states: tuple[Tensor, ...],
    *,
    reverse: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrent_dropout: float,
    zoneout: tuple[float, ...],
    training: bool,
    seed: int | None,
) -> tuple[Tensor, ...]:
    """Take ``step`` at every time, with every option that is the same for all cells. Returns outputs and final states.

    Where a sequence has ended, the state stands still and the output is zero.
    """
    sequence_length = input.shape[0]
    if seed is None and training and (recurrent_dropout or any(zoneout)):
        raise ValueError("seed: expected an integer for the masks of recurrent_dropout and zoneout, got None")
    key = 1 if seed is None else random.key_of(seed)
    mask = None
    if training and recurrent_dropout:
        mask = random.kept(key, random.RECURRENT, recurrent_dropout, states[0].shape, states[0])
    stays: list = []
    for stream, probability, state in zip((random.ZONEOUT, random.ZONEOUT_CELL), zoneout, states, strict=False):
        drawn = training and probability
        shape = (sequence_length, *state.shape)
        stays.append(random.dropped(key, stream, probability, shape, state.device) if drawn else probability)
    outputs = [states[0]] * sequence_length
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        before = states
        if reset is not None:
            before = tuple(torch.where(reset[t].unsqueeze(-1), 0, state) for state in states)
        after = step(input[t], *before, recurrent_mask=mask)
        if any(zoneout):
            now = [stay[t] if isinstance(stay, Tensor) else stay for stay in stays]
            after = tuple(zone_out(*each) for each in zip(before, after, now, strict=True))
        outputs[t] = after[0]
        if lengths is not None:
            active = (t < lengths).unsqueeze(-1)
            after = tuple(torch.where(active, new, old) for new, old in zip(after, states, strict=True))
            outputs[t] = torch.where(active, outputs[t], 0)
        states = after
    return torch.stack(outputs), *states


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
    reset: Tensor | None = None,
    norm_hh: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = True,
    seed: int | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The plain RNN over a whole sequence: :func:`rnn_cell` for $t = 1 \dots T$, or $T \dots 1$ where ``reverse``.

    Parameters
    ----------
    input : Tensor, shape (sequence_length, batch, input_size)
    h_0 : Tensor, shape (batch, hidden_size)
        The state before the first step taken.
    weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity, norm_hh, grad_clip
        As in :func:`rnn_cell`.
    reverse : bool
        Run from the last step to the first. ``output[t]`` stays the state at time ``t``. Default: False.
    lengths : Tensor of int64, shape (batch,), optional
        Steps of each sequence, 1 to ``sequence_length``. At ``t >= lengths[b]`` the state is carried over unchanged
        and the output is zero, so a reversed sequence starts at its own last step.
    reset : Tensor of bool, shape (sequence_length, batch), optional
        Where True, the state that the step starts from is zero.
    recurrent_dropout : float
        Probability of a unit of $h_{t-1}$ to be missing from the product with $W_{hh}$, the same units at every step of
        a sequence; the others are scaled by its complement's reciprocal. In training only. Default: 0.
    zoneout : float
        Probability of a unit to keep its old state at a step, in training; else the weight of the old state in a
        mixture (see :func:`zone_out`). Default: 0.
    training : bool
        Whether masks are drawn. Default: True.
    seed : int, optional
        Of the masks. Needed where masks are drawn.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    References
    ----------
    Recurrent dropout: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016, section 4.

    Examples
    --------
    >>> x, h_0 = torch.randn(5, 2, 3), torch.zeros(2, 4)
    >>> output, h_n = rnn(x, h_0, torch.randn(4, 3), torch.randn(4, 4))
    >>> output.shape, torch.equal(output[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """

    def step(input_t, hidden, **options):
        weights = weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity
        return (rnn_cell(input_t, hidden, *weights, norm_hh=norm_hh, grad_clip=grad_clip, **options),)

    return _over_time(
        step,
        input,
        (h_0,),
        reverse=reverse,
        lengths=lengths,
        reset=reset,
        recurrent_dropout=recurrent_dropout,
        zoneout=(zoneout,),
        training=training,
        seed=seed,
    )


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
    reset: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = True,
    seed: int | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The gated recurrent unit over a whole sequence: :func:`gru_cell` at every step.

    Parameters
    ----------
    input, h_0, reverse, lengths, reset, recurrent_dropout, zoneout, training, seed
        As in :func:`rnn`.
    weight_ih, weight_hh, bias_ih, bias_hh, reset_after, norm_ih, norm_hh, grad_clip
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

    def step(input_t, hidden, **options):
        weights = weight_ih, weight_hh, bias_ih, bias_hh, reset_after
        return (gru_cell(input_t, hidden, *weights, norm_ih=norm_ih, norm_hh=norm_hh, grad_clip=grad_clip, **options),)

    return _over_time(
        step,
        input,
        (h_0,),
        reverse=reverse,
        lengths=lengths,
        reset=reset,
        recurrent_dropout=recurrent_dropout,
        zoneout=(zoneout,),
        training=training,
        seed=seed,
    )


def lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    weight_peephole: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    training: bool = True,
    seed: int | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The long short-term memory over a whole sequence: :func:`lstm_cell` at every step.

    Parameters
    ----------
    input, reverse, lengths, reset, recurrent_dropout, zoneout, training, seed
        As in :func:`rnn`.
    h_0 : Tensor, shape (batch, state_size)
    c_0 : Tensor, shape (batch, hidden_size)
        The states before the first step taken.
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, norm_ih, norm_hh, grad_clip
        As in :func:`lstm_cell`.
    norm_cell_weight, norm_cell_bias
        As in :func:`lstm_cell`.
    zoneout_cell : float
        The same as ``zoneout``, for the cell state. $h_t$ is made from the new cell state, before its zoneout.
        Default: 0.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, state_size)
    h_n : Tensor, shape (batch, state_size)
    c_n : Tensor, shape (batch, hidden_size)
        The states after the last step taken.

    Examples
    --------
    >>> zeros = torch.zeros(2, 4)
    >>> output, h_n, c_n = lstm(torch.randn(5, 2, 3), zeros, zeros, torch.randn(16, 3), torch.randn(16, 4))
    >>> output.shape, torch.equal(output[-1], h_n), c_n.shape
    (torch.Size([5, 2, 4]), True, torch.Size([2, 4]))
    """

    def step(input_t, hidden, cell, **options):
        return lstm_cell(
            input_t,
            hidden,
            cell,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            weight_hr,
            weight_peephole=weight_peephole,
            norm_ih=norm_ih,
            norm_hh=norm_hh,
            norm_cell_weight=norm_cell_weight,
            norm_cell_bias=norm_cell_bias,
            grad_clip=grad_clip,
            **options,
        )

    return _over_time(
        step,
        input,
        (h_0, c_0),
        reverse=reverse,
        lengths=lengths,
        reset=reset,
        recurrent_dropout=recurrent_dropout,
        zoneout=(zoneout, zoneout_cell),
        training=training,
        seed=seed,
    )


def linear_scan(
    decay: Tensor,
    input: Tensor,
    h_0: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The linear recurrence over a whole sequence, element by element.

    .. math:: h_t = a_t \odot h_{t-1} + b_t

    Parameters
    ----------
    decay, input : Tensor, shape (sequence_length, batch, hidden_size)
        $a_t$ and $b_t$.
    h_0 : Tensor, shape (batch, hidden_size), optional
        The state before the first step taken. Default: zeros.
    reverse, lengths, reset
        As in :func:`rnn`.

    Returns
    -------
    output : Tensor, shape (sequence_length, batch, hidden_size)
    h_n : Tensor, shape (batch, hidden_size)
        The state after the last step taken.

    Examples
    --------
    >>> output, h_n = linear_scan(torch.full((3, 1, 1), 0.5), torch.ones(3, 1, 1), torch.full((1, 1), 4.0))
    >>> output.flatten().tolist(), h_n.item()
    ([3.0, 2.5, 2.25], 2.25)
    """

    def step(arguments, state, **_):
        a, b = arguments
        return (a * state + b,)

    return _over_time(
        step,
        torch.stack([decay, input], dim=1),
        (torch.zeros_like(decay[0]) if h_0 is None else h_0,),
        reverse=reverse,
        lengths=lengths,
        reset=reset,
        recurrent_dropout=0.0,
        zoneout=(0.0,),
        training=False,
        seed=None,
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    r"""Scaled dot-product attention, with its whole matrix of weights.

    .. math:: Y = \operatorname{softmax}(Q K^\top / \sqrt d) \, V

    Parameters
    ----------
    query : Tensor, shape (batch, heads, query_length, head_dim)
    key, value : Tensor, shape (batch, heads, key_length, head_dim)
    is_causal : bool
        Whether a query sees only the keys up to its own; the last query stands at the last key. Default: True.
    scale : float, optional
        Default: $1 / \sqrt d$.

    Returns
    -------
    Tensor, shape of ``query``

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.1.

    Examples
    --------
    >>> value = torch.tensor([[[[1.0], [3.0]]]])
    >>> attention(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), value).flatten().tolist()
    [1.0, 2.0]
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(~visible.tril(scores.shape[-1] - scores.shape[-2]), float("-inf"))
    return torch.softmax(scores, -1) @ value
