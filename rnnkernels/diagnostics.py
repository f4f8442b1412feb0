r"""Measure how gradients travel through a recurrent network.

Notation, as in the book: states :math:`h_0,\dots,h_T\in\mathbb R^{H}`, pre-activations :math:`a_t`,
:math:`h_t=f(a_t)`, :math:`a_t=W_{ih}x_t+b_{ih}+W_{hh}h_{t-1}+b_{hh}`. A *lag* :math:`k` counts steps back from the
last one: lag 0 is step :math:`T`, lag :math:`k` is step :math:`T-k`.
"""

import contextlib
import weakref
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from rnnkernels.ops._checks import check_choice, check_tensor

__all__ = [
    "ClipRecorder",
    "GateStatistics",
    "UpdateRecorder",
    "gate_activations",
    "gate_statistics",
    "gradient_norm_per_lag",
    "jacobian_per_lag",
    "jacobian_product",
    "measure_saved_tensors",
    "singular_values_per_lag",
    "spectral_radius",
    "state_jacobians",
]

# f'(a) written with the output h = f(a), so that the states alone are enough
_SLOPES_FROM_OUTPUT = {
    "tanh": lambda h: 1 - h * h,
    "relu": lambda h: (h > 0).to(h.dtype),
    "sigmoid": lambda h: h * (1 - h),
    "identity": torch.ones_like,
}


def _with_middle(value, first, last):
    """A shape for check_tensor that has as many dimensions between ``first`` and ``last`` as ``value`` has."""
    rank = value.dim() if isinstance(value, torch.Tensor) else 0
    return (*first, *["..."] * (rank - len(first) - len(last)), *last)


def _check_square(name, value, shape):
    check_tensor(name, value, shape)
    if value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
        raise ValueError(f"{name}: expected square matrices, at least 1 by 1, got shape {tuple(value.shape)}")


def spectral_radius(matrix):
    r"""Largest absolute eigenvalue of a square matrix, :math:`\rho(W)=\max_i|\lambda_i(W)|`.

    It decides what high powers of the matrix do: :math:`\lim_k\|W^k\|^{1/k}=\rho(W)` (Gelfand's formula). Single
    steps are bounded by the largest *singular* value instead, and :math:`\rho(W)\le\sigma_{\max}(W)`.

    Parameters
    ----------
    matrix : torch.Tensor
        Shape ``(..., H, H)``, float32 or float64.

    Returns
    -------
    torch.Tensor
        Shape ``(...)``, the dtype of `matrix`. Not differentiated through.

    Raises
    ------
    TypeError
        If `matrix` is not a float32 or float64 tensor.
    ValueError
        If its last two dimensions are not equal, or are empty.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    section 2.1.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.diagnostics import spectral_radius
    >>> round(spectral_radius(torch.tensor([[0.0, 2.0], [-2.0, 0.0]])).item(), 6)  # eigenvalues +-2i
    2.0
    """
    _check_square("matrix", matrix, _with_middle(matrix, (), ("H", "H")))
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix: expected float32 or float64, got {matrix.dtype}")
    return torch.linalg.eigvals(matrix.detach()).abs().amax(-1)


def state_jacobians(weight_hh, states, nonlinearity="tanh"):
    r"""Jacobian of every state of a plain recurrent layer with respect to the state before it.

    .. math:: J_t=\frac{\partial h_t}{\partial h_{t-1}}=\operatorname{diag}\bigl(f'(a_t)\bigr)\,W_{hh}

    The slopes :math:`f'(a_t)` are computed from :math:`h_t=f(a_t)`, as :math:`1-h_t^2` for tanh,
    :math:`h_t(1-h_t)` for the sigmoid, :math:`[h_t>0]` for ReLU and 1 for the identity.

    Parameters
    ----------
    weight_hh : torch.Tensor
        Recurrent weight :math:`W_{hh}`, shape ``(H, H)``.
    states : torch.Tensor
        States :math:`h_1,\dots,h_T` in the order of time, shape ``(T, ..., H)``: the output of one layer and
        direction of :class:`rnnkernels.RNN`. The initial state is not among them.
    nonlinearity : {"tanh", "relu", "sigmoid", "identity"}, default "tanh"
        The activation :math:`f` that made the states.

    Returns
    -------
    torch.Tensor
        Shape ``(T, ..., H, H)``; entry ``[t - 1]`` is :math:`J_t`, with the output unit along the rows.

    Raises
    ------
    TypeError
        If `weight_hh` or `states` is not a floating-point tensor.
    ValueError
        If the sizes do not fit together, or `nonlinearity` is not one of the four.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    equation (5). (It has the state before the activation, and so the transposed order of the two factors.)

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.diagnostics import state_jacobians
    >>> weight_hh = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> states = torch.tensor([[0.5, 0.0]])  # one step, two units
    >>> state_jacobians(weight_hh, states)
    tensor([[[0.0000, 1.5000],
             [1.0000, 0.0000]]])
    """
    _check_square("weight_hh", weight_hh, ("H", "H"))
    check_tensor("states", states, _with_middle(states, ("T",), weight_hh.shape[:1]), like=weight_hh)
    check_choice("nonlinearity", nonlinearity, tuple(_SLOPES_FROM_OUTPUT))
    return _SLOPES_FROM_OUTPUT[nonlinearity](states).unsqueeze(-1) * weight_hh


def jacobian_product(jacobians):
    r"""Jacobian of the last state with respect to the state at every lag.

    .. math:: P_k=\frac{\partial h_T}{\partial h_{T-k}}=J_T\,J_{T-1}\cdots J_{T-k+1},\qquad P_0=I

    ``torch.linalg.svdvals(jacobian_product(jacobians))`` gives the singular values of each :math:`P_k`: the largest
    is the most that any gradient can grow, or the least that all must shrink, over :math:`k` steps. In floating
    point the values below ``eps`` times the largest are rounding.

    Parameters
    ----------
    jacobians : torch.Tensor
        :math:`J_1,\dots,J_T` in the order of time, shape ``(T, ..., H, H)``, as :func:`state_jacobians` returns them.

    Returns
    -------
    torch.Tensor
        Shape ``(T + 1, ..., H, H)``; entry ``[k]`` is :math:`P_k`, for the lags 0 to T. The last entry is the
        derivative with respect to the initial state.

    Raises
    ------
    TypeError
        If `jacobians` is not a floating-point tensor.
    ValueError
        If its shape is not ``(T, ..., H, H)``.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    equation (5).

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.diagnostics import jacobian_product
    >>> J = torch.stack([torch.diag(torch.tensor([2.0, 0.5]))] * 3)  # the same diagonal step three times
    >>> torch.linalg.svdvals(jacobian_product(J))
    tensor([[1.0000, 1.0000],
            [2.0000, 0.5000],
            [4.0000, 0.2500],
            [8.0000, 0.1250]])
    """
    _check_square("jacobians", jacobians, _with_middle(jacobians, ("T",), ("H", "H")))
    identity = torch.eye(jacobians.shape[-1], dtype=jacobians.dtype, device=jacobians.device)
    products = [identity.expand(jacobians.shape[1:])]
    for jacobian in jacobians.flip(0):
        products.append(products[-1] @ jacobian)
    return torch.stack(products)


def gradient_norm_per_lag(module, input, hx=None, *, cotangent=None, wrt="state", generator=None):
    r"""Norm of the gradient that the last output sends back to every earlier step, for each sequence.

    With the output :math:`y_T` of the last step, a vector :math:`v`, and :math:`s_t` the complete state that the
    module hands from step :math:`t` to the next (all layers; for an LSTM the hidden and the cell state together),
    it returns

    .. math:: g_k=\Bigl\|\frac{\partial\,\langle v,y_T\rangle}{\partial s_{T-k}}\Bigr\|_2,\qquad k=0,\dots,T,

    or, with ``wrt="input"``,

    .. math:: g_k=\Bigl\|\frac{\partial\,\langle v,y_T\rangle}{\partial x_{T-k}}\Bigr\|_2,\qquad k=0,\dots,T-1.

    The derivatives are total ones: through every path over the later steps. :math:`y_T` is itself a part of
    :math:`s_T`, and so :math:`g_0=\|v\|` for the state. For a one-layer RNN :math:`g_k=\|P_k^\top v\|` with
    :math:`P_k` of :func:`jacobian_product`.

    Parameters
    ----------
    module : torch.nn.Module
        A recurrent layer of ``rnnkernels`` or ``torch.nn``: called as ``output, state = module(input, state)``, of one
        direction. It is run one step a call, for the states in between are not to be had otherwise. Its parameters'
        ``.grad`` is left alone.
    input : torch.Tensor
        Shape ``(T, B, I)``, or ``(B, T, I)`` if ``module.batch_first``.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes; zeros by default.
    cotangent : torch.Tensor, optional
        The vectors :math:`v`, shape ``(B, features of the output)``. By default random directions of unit length,
        independent for each sequence.
    wrt : {"state", "input"}, default "state"
        What to differentiate with respect to.
    generator : torch.Generator, optional
        Source of the default `cotangent`.

    Returns
    -------
    torch.Tensor
        Shape ``(T + 1, B)`` for the state, ``(T, B)`` for the input; row ``k`` is lag :math:`k`.

    Raises
    ------
    TypeError
        If `input` is not a floating-point tensor.
    ValueError
        If a shape does not fit, the sequence is empty, `wrt` is unknown, or the module is bidirectional: its last
        output has seen the future, and no lag is defined.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    equations (3) to (5).

    Examples
    --------
    An orthogonal recurrent weight without an activation keeps the length of every gradient:

    >>> import torch, rnnkernels as rk
    >>> rnn = rk.RNN(3, 8, nonlinearity="identity")
    >>> _ = torch.nn.init.orthogonal_(rnn.weight_hh_l0)
    >>> norms = rk.diagnostics.gradient_norm_per_lag(rnn, torch.randn(5, 2, 3))
    >>> norms.shape
    torch.Size([6, 2])
    >>> bool((norms - 1).abs().max() < 1e-5)
    True
    """
    time = _check_module_and_input(module, input)
    check_choice("wrt", wrt, ("state", "input"))
    with _differentiating(module):
        steps, states, output, _ = _run_by_steps(module, input, hx, time)
        output = output.squeeze(time)
        if cotangent is None:
            cotangent = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
            cotangent = cotangent / cotangent.norm(dim=-1, keepdim=True)
        check_tensor("cotangent", cotangent, output.shape, like=output)
        # one row of parts a lag: an LSTM's state has two parts of shape (layers, B, H)
        rows = [_parts(state) for state in states] if wrt == "state" else [(step,) for step in steps]
        gradients = iter(torch.autograd.grad(output, [part for row in rows for part in row], cotangent))
    batch = 1 if wrt == "state" else 1 - time
    gradients = [torch.cat([next(gradients).movedim(batch, 0).flatten(1) for _ in row], dim=1) for row in rows]
    if wrt == "state":
        gradients.append(cotangent)
    return torch.stack([_norm(gradient) for gradient in reversed(gradients)])


def _norm(vectors):
    """Norms of the rows, exact where the squares would underflow: a vanished gradient is not yet zero."""
    limits = torch.finfo(vectors.dtype)
    scale = vectors.abs().amax(-1, keepdim=True).clamp(limits.tiny, limits.max)
    return scale.squeeze(-1) * (vectors / scale).norm(dim=-1)


def _map_state(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _check_module_and_input(module, input):
    """Return the dimension of the input that is time."""
    time = 1 if getattr(module, "batch_first", False) else 0
    check_tensor("input", input, ("B", "T", "I") if time else ("T", "B", "I"))
    if getattr(module, "bidirectional", False):
        raise ValueError("module: expected one direction, got a bidirectional module, where no lag is defined")
    if input.shape[time] == 0:
        raise ValueError(f"input: expected at least one time step, got shape {tuple(input.shape)}")
    return time


@contextlib.contextmanager
def _differentiating(module):
    # cuDNN differentiates only in training mode; outside it torch's own kernels can
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=module.training):
        yield


def _run_by_steps(module, input, hx, time):
    """Call the module one step a time. Returns the inputs, the states before them, the last output, the final state."""
    steps = [step.detach().requires_grad_() for step in input.split(1, dim=time)]
    if hx is None:
        hx = _map_state(torch.zeros_like, module(steps[0])[1])
    state = _map_state(lambda s: s.detach().requires_grad_(), hx)
    states = []
    for step in steps:
        states.append(state)
        output, state = module(step, state)
    return steps, states, output, state


def jacobian_per_lag(module, input, hx=None, *, lags=None):
    r"""Jacobian of a module's final state with respect to its state at every lag, by automatic differentiation.

    .. math:: P_k=\frac{\partial s_T}{\partial s_{T-k}}

    The state :math:`s_t` is everything that the module hands from one step to the next: of all layers, and for an LSTM
    the hidden and the cell state, one after the other. For a plain one-layer RNN this is :func:`jacobian_product` of
    :func:`state_jacobians`.

    Parameters
    ----------
    module : torch.nn.Module
        A recurrent layer of ``rnnkernels`` or ``torch.nn``, of one direction; called as
        ``output, state = module(input, state)``, one step a call.
    input : torch.Tensor
        Shape ``(T, B, I)``, or ``(B, T, I)`` if ``module.batch_first``.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes; zeros by default.
    lags : sequence of int, optional
        Which lags, from 0 to T. All by default.

    Returns
    -------
    torch.Tensor
        Shape ``(lags, B, S, S)`` with S the size of the state, final state along the rows.

    Raises
    ------
    TypeError
        If `input` is not a floating-point tensor.
    ValueError
        If a shape does not fit, the sequence is empty, a lag is out of range, or the module is bidirectional.

    Notes
    -----
    One pass over the sequence with a batch of ``B * S`` copies, and one backward pass, which sends the S unit vectors
    back at once. Meant for small states: the memory is about that of ``T * B * S * S`` numbers a layer.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> gru = rk.GRU(3, 4, num_layers=2)
    >>> P = rk.diagnostics.jacobian_per_lag(gru, torch.randn(5, 2, 3))
    >>> P.shape  # lags 0 to 5, two sequences, 2 layers of 4 units
    torch.Size([6, 2, 8, 8])
    """
    time = _check_module_and_input(module, input)
    length, batch = input.shape[time], input.shape[1 - time]
    lags = range(length + 1) if lags is None else lags
    for lag in lags:
        if not 0 <= lag <= length:
            raise ValueError(f"lags: expected 0 to {length}, the length of the input, got {lag!r}")
    with torch.no_grad():
        state = _parts(module(input.narrow(time, 0, 1), hx)[1] if hx is None else hx)
    size = sum(part.shape[0] * part.shape[-1] for part in state)
    with _differentiating(module):
        repeated = input.repeat_interleave(size, dim=1 - time)
        if hx is not None:
            hx = _map_state(lambda part: part.repeat_interleave(size, dim=1), hx)
        _, states, _, final = _run_by_steps(module, repeated, hx, time)
        states.append(final)
        # the copy number i of a sequence sends the unit vector e_i back
        unit = torch.eye(size, dtype=input.dtype, device=input.device).repeat(batch, 1)
        chosen = [_parts(states[length - lag]) for lag in lags]
        gradients = torch.autograd.grad(_flat_state(final), [part for row in chosen for part in row], unit)
    width = len(state)
    rows = [_flat_state(gradients[i : i + width]) for i in range(0, len(gradients), width)]
    return torch.stack([row.unflatten(0, (batch, size)) for row in rows])


def _flat_state(state):
    """The state of every sequence as one row: parts of shape (layers, B, H) become (B, S)."""
    return torch.cat([part.movedim(1, 0).flatten(1) for part in _parts(state)], dim=1)


def singular_values_per_lag(module, input, hx=None, *, lags=None):
    r"""Singular values of the Jacobian of a module's final state with respect to its state at every lag.

    The largest, :math:`\sigma_{\max}(P_k)`, is the most that a gradient can grow over :math:`k` steps; where it is far
    below 1, every gradient vanishes; where the values spread over orders of magnitude, some directions explode while
    others vanish. See :func:`jacobian_per_lag`, which has the same parameters and errors. In floating point the values
    below ``eps`` times the largest are rounding.

    Parameters
    ----------
    module : torch.nn.Module
        A recurrent layer of ``rnnkernels`` or ``torch.nn``, of one direction.
    input : torch.Tensor
        Shape ``(T, B, I)``, or ``(B, T, I)`` if ``module.batch_first``.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes; zeros by default.
    lags : sequence of int, optional
        Which lags, from 0 to T. All by default.

    Returns
    -------
    torch.Tensor
        Shape ``(lags, B, S)``, in descending order.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    section 2.1.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> rnn = rk.init.initialize(rk.RNN(3, 8, nonlinearity="identity"), "orthogonal", gain=0.5)
    >>> values = rk.diagnostics.singular_values_per_lag(rnn, torch.randn(4, 2, 3), lags=[0, 2])
    >>> values.shape, bool((values[1] - 0.5**2).abs().max() < 1e-6)
    (torch.Size([2, 2, 8]), True)
    """
    return torch.linalg.svdvals(jacobian_per_lag(module, input, hx, lags=lags))


# The gates of each cell in the order of their rows, with what makes them
_GATES = {
    "RNN": {"hidden": None},
    "GRU": {"reset": "sigmoid", "update": "sigmoid", "new": "tanh"},
    "LSTM": {"input": "sigmoid", "forget": "sigmoid", "cell": "tanh", "output": "sigmoid"},
}


class GateStatistics(NamedTuple):
    """What :func:`gate_statistics` says of one gate.

    Attributes
    ----------
    mean : float
        Mean over units, steps and sequences.
    std : float
        Standard deviation over the same.
    low : float
        Share of the values in the lowest tenth of the gate's range: closed.
    high : float
        Share of the values in the highest tenth: open.
    """

    mean: float
    std: float
    low: float
    high: float


def gate_activations(module, input, hx=None):
    r"""Values of every gate of a recurrent module at every step.

    They are computed by the textbook's equations from the module's weights, in evaluation mode, and the states that
    they lead to are compared with the module's output.

    Parameters
    ----------
    module : torch.nn.Module
        RNN, GRU or LSTM of ``rnnkernels`` or ``torch.nn``, with any number of layers and directions.
    input : torch.Tensor
        Shape ``(T, B, I)``, or ``(B, T, I)`` if ``module.batch_first``.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes; zeros by default.

    Returns
    -------
    list of dict of str to torch.Tensor
        One entry for each layer and direction, in the order of the module's state. By name, of shape ``(T, B, H)``:
        ``input``, ``forget``, ``cell`` and ``output`` of an LSTM, ``reset``, ``update`` and ``new`` of a GRU,
        ``hidden`` of a plain RNN.

    Raises
    ------
    TypeError
        If `module` is not an RNN, GRU or LSTM, or `input` not a floating-point tensor.
    ValueError
        If a shape does not fit, or the module does not follow the textbook's equations (because of an option such as
        peepholes, say).

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> (gates,) = rk.diagnostics.gate_activations(torch.nn.LSTM(3, 8), torch.randn(5, 2, 3))
    >>> gates["forget"].shape
    torch.Size([5, 2, 8])
    """
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"module: expected an RNN, GRU or LSTM, got {type(module).__name__}")
    time = 1 if module.batch_first else 0
    check_tensor("input", input, ("B", "T", module.input_size) if time else ("T", "B", module.input_size))
    kind, training = module.mode.split("_")[0], module.training
    with torch.no_grad():
        try:
            output, final = module.eval()(input, hx)
        finally:
            module.train(training)
        states = _map_state(torch.zeros_like, final) if hx is None else hx
        initial = zip(*(part.unbind(0) for part in _parts(states)), strict=True)
        layer_input, found = input.transpose(0, 1) if time else input, []
        for layer in range(module.num_layers):
            outputs = []
            for suffix in ("", "_reverse") if module.bidirectional else ("",):
                states, gates = _run_gates(module, kind, layer_input, next(initial), f"_l{layer}{suffix}")
                outputs.append(states)
                found.append(gates)
            layer_input = torch.cat(outputs, dim=-1)
        mine = layer_input.transpose(0, 1) if time else layer_input
        scale = output.abs().amax().clamp(min=1e-30)
        if not (mine - output).abs().amax() <= 100 * torch.finfo(output.dtype).eps ** 0.75 * scale:
            raise ValueError("module: expected the textbook's equations of its cell, got other states from them")
    return found


def _run_gates(module, kind, input, state, suffix):
    """One layer in one direction: its outputs, and its gates by name."""
    weight_ih, weight_hh = getattr(module, f"weight_ih{suffix}"), getattr(module, f"weight_hh{suffix}")
    bias_ih, bias_hh = (getattr(module, f"{name}{suffix}") if module.bias else None for name in ("bias_ih", "bias_hh"))
    names, reverse = _GATES[kind], suffix.endswith("_reverse")
    outputs, gates = [None] * len(input), [None] * len(input)
    for t in reversed(range(len(input))) if reverse else range(len(input)):
        from_input = linear(input[t], weight_ih, bias_ih).chunk(len(names), dim=-1)
        from_state = linear(state[0], weight_hh, bias_hh).chunk(len(names), dim=-1)
        if kind == "RNN":
            hidden = _activation(module)(from_input[0] + from_state[0])
            gates[t], state = (hidden,), (hidden,)
        elif kind == "GRU":
            reset, update = (torch.sigmoid(from_input[i] + from_state[i]) for i in (0, 1))
            new = torch.tanh(from_input[2] + reset * from_state[2])
            gates[t], state = (reset, update, new), ((1 - update) * new + update * state[0],)
        else:
            a = [i + h for i, h in zip(from_input, from_state, strict=True)]
            i, f, g, o = torch.sigmoid(a[0]), torch.sigmoid(a[1]), torch.tanh(a[2]), torch.sigmoid(a[3])
            cell = f * state[1] + i * g
            hidden = o * torch.tanh(cell)
            if module.proj_size:
                hidden = linear(hidden, getattr(module, f"weight_hr{suffix}"))
            gates[t], state = (i, f, g, o), (hidden, cell)
        outputs[t] = state[0]
    columns = zip(*gates, strict=True)
    return torch.stack(outputs), {name: torch.stack(values) for name, values in zip(names, columns, strict=True)}


def _activation(module):
    name = getattr(module, "nonlinearity", "tanh")
    return {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}[name]


def gate_statistics(module, input, hx=None):
    r"""How open the gates of a recurrent module are.

    A gate that is nearly always closed or open has a slope of nearly zero and hardly learns; a forget gate (a GRU's
    update gate) that is never open keeps nothing for long.

    Parameters
    ----------
    module : torch.nn.Module
        RNN, GRU or LSTM of ``rnnkernels`` or ``torch.nn``.
    input : torch.Tensor
        Shape ``(T, B, I)``, or ``(B, T, I)`` if ``module.batch_first``.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes; zeros by default.

    Returns
    -------
    list of dict of str to GateStatistics
        One entry for each layer and direction, as :func:`gate_activations` has them. ``low`` and ``high`` count
        sigmoids below 0.1 and above 0.9, and values of tanh below -0.8 and above 0.8. Of a ReLU network ``low`` counts
        units at zero and ``high`` is 0; of one without an activation both are 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`gate_activations`.

    References
    ----------
    A. Karpathy, J. Johnson and L. Fei-Fei, "Visualizing and understanding recurrent networks", arXiv:1506.02078, 2015,
    section 4.2: the shares of left- and right-saturated gates.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> lstm = rk.init.initialize(torch.nn.LSTM(3, 8), forget_bias=5.0)
    >>> (statistics,) = rk.diagnostics.gate_statistics(lstm, torch.randn(5, 2, 3))
    >>> statistics["forget"].high, statistics["input"].high < 1
    (1.0, True)
    """
    laws = _GATES[module.mode.split("_")[0]] if isinstance(module, torch.nn.RNNBase) else None
    found = []
    for gates in gate_activations(module, input, hx):
        statistics = {}
        for name, values in gates.items():
            law = laws[name] or getattr(module, "nonlinearity", "tanh")
            if law in ("sigmoid", "tanh"):
                opened = values if law == "sigmoid" else (values + 1) / 2
                low, high = (opened < 0.1).double().mean(), (opened > 0.9).double().mean()
            else:
                low, high = (values == 0).double().mean() if law == "relu" else torch.zeros(()), torch.zeros(())
            wide = values.double()
            statistics[name] = GateStatistics(*map(float, (wide.mean(), wide.std(correction=0), low, high)))
        found.append(statistics)
    return found


class UpdateRecorder:
    r"""Record how far each step of an optimizer moves each parameter, relative to the parameter's length.

    .. math:: r=\frac{\lVert\theta_{\text{after}}-\theta_{\text{before}}\rVert}{\lVert\theta_{\text{before}}\rVert}

    About :math:`10^{-3}` is a common rule of thumb; far below it a parameter hardly learns, far above it jumps. It sees
    what gradients alone do not: the learning rate, clipping, momentum and weight decay. What is recorded stays on the
    parameters' device, and nothing waits for it until `ratios` is read.

    Parameters
    ----------
    named_parameters : iterable of (str, torch.Tensor)
        Usually ``model.named_parameters()``.

    Attributes
    ----------
    ratios : dict
        For each name the ratios of all steps recorded, shape ``(steps,)``, on the CPU. A parameter that was zero has
        ``inf``, or ``nan`` if it stayed zero.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> recorder = rk.diagnostics.UpdateRecorder([("weight", weight)])
    >>> weight.sum().backward()
    >>> with recorder:
    ...     optimizer.step()
    >>> recorder.ratios["weight"]  # 0.5 * sqrt(2) / 5
    tensor([0.1414])
    """

    def __init__(self, named_parameters):
        self._parameters = dict(named_parameters)
        self._steps = []
        self._before = None

    def __enter__(self):
        self._before = [parameter.detach().clone() for parameter in self._parameters.values()]
        return self

    def __exit__(self, error, *_):
        if error is None:
            after = [parameter.detach() for parameter in self._parameters.values()]
            moved = torch._foreach_norm(torch._foreach_sub(after, self._before))
            self._steps.append(torch._foreach_div(moved, torch._foreach_norm(self._before)))
        self._before = None

    @property
    def ratios(self):
        return {
            name: torch.stack([step[i] for step in self._steps]).cpu() if self._steps else torch.empty(0)
            for i, name in enumerate(self._parameters)
        }


class ClipRecorder:
    """Record the gradient norms that clipping returns, and how often they were above the threshold.

    Nothing waits for the device until an attribute is read.

    Parameters
    ----------
    max_norm : float
        The threshold that clipping was called with.

    Attributes
    ----------
    norms : torch.Tensor
        Norms before clipping, in the order recorded, shape ``(steps,)``, on the CPU.
    share : float
        Share of the steps whose norm was above `max_norm`, or not finite; ``nan`` before the first.

    Raises
    ------
    ValueError
        If `max_norm` is not positive.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.ones(4, requires_grad=True)
    >>> recorder = rk.diagnostics.ClipRecorder(max_norm=1.0)
    >>> for scale in (0.1, 1.0, 3.0, 0.2):
    ...     weight.grad = torch.full((4,), scale)
    ...     recorder.record(torch.nn.utils.clip_grad_norm_([weight], recorder.max_norm))
    >>> recorder.norms, recorder.share
    (tensor([0.2000, 2.0000, 6.0000, 0.4000]), 0.5)
    """

    def __init__(self, max_norm):
        if not max_norm > 0:
            raise ValueError(f"max_norm: expected a positive number, got {max_norm!r}")
        self.max_norm = max_norm
        self._norms = []

    def record(self, total_norm):
        """Take what ``clip_grad_norm_`` returned.

        Parameters
        ----------
        total_norm : torch.Tensor or float
            The norm of all gradients together, before clipping.
        """
        self._norms.append(torch.as_tensor(total_norm).detach().clone())

    @property
    def norms(self):
        return torch.stack(self._norms).cpu() if self._norms else torch.empty(0)

    @property
    def share(self):
        return (~(self.norms <= self.max_norm)).double().mean().item()


class SavedTensors:
    """What :func:`measure_saved_tensors` counts.

    Attributes
    ----------
    current : int
        Bytes held for a backward pass at this moment.
    peak : int
        The largest value that `current` has had.
    """

    def __init__(self):
        self.current = 0
        self.peak = 0
        self._holders = {}

    def _hold(self, storage):
        key = (storage.device, storage.data_ptr())
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
        return key, storage.nbytes()

    def _release(self, key, size):
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.current -= size


class _Holder:
    """Stands in the graph for a saved tensor, and dies with the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


@contextlib.contextmanager
def measure_saved_tensors(exclude=()):
    """Count the bytes that autograd keeps alive for backward passes, exactly and on any device.

    Within the block, every tensor that an operator saves is counted once, however many operators save it or views of
    it, until the graph that needs it is freed. This is the part of a training step's memory that grows with the
    length of the sequence. Temporary tensors, and tensors that only your own variables hold, are not counted; on a
    GPU ``torch.cuda.max_memory_allocated`` sees those too.

    Parameters
    ----------
    exclude : iterable of torch.Tensor, default ()
        Tensors not to be counted, usually ``module.parameters()``: they exist anyway.

    Yields
    ------
    SavedTensors
        With the attributes ``current`` and ``peak``, in bytes.

    Notes
    -----
    It uses :class:`torch.autograd.graph.saved_tensors_hooks`, and so does :func:`torch.utils.checkpoint.checkpoint`:
    what is saved while that recomputes a segment is not seen here.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> x = torch.ones(1000, requires_grad=True)
    >>> with rk.diagnostics.measure_saved_tensors() as saved:
    ...     y = x.exp().sum()  # exp keeps its result: 1000 floats of 4 bytes
    >>> saved.current, saved.peak
    (4000, 4000)
    >>> y.backward()
    >>> saved.current, saved.peak
    (0, 4000)
    """
    saved = SavedTensors()
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}

    def pack(tensor):
        tensor = tensor.detach()  # the tensor itself would tie its graph into a reference cycle
        holder = _Holder(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded and storage.nbytes():
            weakref.finalize(holder, saved._release, *saved._hold(storage)).atexit = False
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        yield saved
