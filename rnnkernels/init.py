r"""Initialize recurrent networks: weights gate by gate, biases of the gates that keep, and initial states.

The functions whose name ends in an underscore fill a tensor in place, as those of :mod:`torch.nn.init` do. A recurrent
layer stacks the matrices of its gates on top of each other: ``weight_hh_l0`` of an LSTM has the shape
``(4 * H, H)``. Called on the whole stack, ``torch.nn.init`` sees one wide matrix, with a fan-out four times too large
and rows that are orthogonal to none but a few others. The functions here take ``gates=`` and treat each matrix alone.

:func:`initialize` does all that in one call, for the modules and cells of ``rnnkernels`` and of ``torch.nn``.
"""

import re

import torch
from torch import Tensor

from rnnkernels.diagnostics import spectral_radius
from rnnkernels.ops._checks import check_choice

__all__ = [
    "RECIPES",
    "LearnedState",
    "chrono_",
    "forget_gate_bias_",
    "identity_",
    "initial_state",
    "initialize",
    "kaiming_normal_",
    "kaiming_uniform_",
    "orthogonal_",
    "spectral_radius_",
    "xavier_normal_",
    "xavier_uniform_",
]

# In which order a module stacks the rows of its gates
_GATES = {
    "RNN": ("hidden",),
    "GRU": ("reset", "update", "new"),
    "LSTM": ("input", "forget", "cell", "output"),
}

# The gate that keeps the old state when it is open, and the one that lets new values in, if it is another
_KEEPING = {"GRU": ("update", None), "LSTM": ("forget", "input")}


# ------------------------------------------------------------------------------------------------- weights, in place


def orthogonal_(tensor, gain=1.0, *, gates=1, generator=None):
    r"""Fill each gate's matrix with a random (semi-)orthogonal one, times `gain`.

    A square block :math:`W` gets :math:`W^\top W=\text{gain}^2 I`, uniformly distributed over such matrices: all its
    singular values are `gain`, so that a linear step changes no gradient's length but by that factor.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    gain : float, default 1.0
        The singular values.
    gates : int, default 1
        How many matrices are stacked: 4 for an LSTM, 3 for a GRU.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError
        If `tensor` is not a floating-point tensor.
    ValueError
        If it is not a matrix, or its rows can't be divided among the gates.

    References
    ----------
    A. M. Saxe, J. L. McClelland and S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks", ICLR 2014.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.orthogonal_(torch.empty(4 * 8, 8), gates=4)
    >>> bool((torch.linalg.svdvals(weight.view(4, 8, 8)) - 1).abs().max() < 1e-5)
    True
    """
    return _fill_gates(tensor, gates, lambda block: torch.nn.init.orthogonal_(block, gain, generator=generator))


def identity_(tensor, scale=1.0, *, gates=1):
    r"""Fill each gate's matrix with `scale` times the identity.

    With ReLU and without biases, a plain RNN that starts so (an *IRNN*) copies its state from step to step.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    scale : float, default 1.0
        The diagonal. Less than 1 makes it forget; the source tries 0.01 where only the near past matters.
    gates : int, default 1
        How many matrices are stacked.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError, ValueError
        As :func:`orthogonal_`.

    References
    ----------
    Q. V. Le, N. Jaitly and G. E. Hinton, "A simple way to initialize recurrent networks of rectified linear units",
    arXiv:1504.00941, 2015, section 3.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> rk.init.identity_(torch.empty(2, 2), scale=0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    return _fill_gates(tensor, gates, lambda block: torch.nn.init.eye_(block).mul_(scale))


def xavier_uniform_(tensor, gain=1.0, *, gates=1, generator=None):
    r"""Fill each gate's matrix from :math:`U(-a,a)`, :math:`a=\text{gain}\sqrt{6/(\text{rows}+\text{columns})}`.

    Rows are those of one gate: ``torch.nn.init.xavier_uniform_`` on an LSTM's stacked square matrices makes their
    entries smaller by :math:`\sqrt{2/5}`. The variance is that of :func:`xavier_normal_`.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    gain : float, default 1.0
        Factor of the bound; see :func:`torch.nn.init.calculate_gain`.
    gates : int, default 1
        How many matrices are stacked.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError, ValueError
        As :func:`orthogonal_`.

    References
    ----------
    X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
    equation (16).

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.xavier_uniform_(torch.empty(3 * 50, 50), gates=3)
    >>> bool(weight.abs().max() <= (6 / 100) ** 0.5)
    True
    """
    return _fill_gates(tensor, gates, lambda block: torch.nn.init.xavier_uniform_(block, gain, generator=generator))


def xavier_normal_(tensor, gain=1.0, *, gates=1, generator=None):
    r"""Fill each gate's matrix from :math:`N(0,\sigma^2)` with Glorot's :math:`\sigma`.

    .. math:: \sigma=\text{gain}\sqrt{\frac{2}{\text{rows}+\text{columns}}}

    For square matrices of size H that is :math:`\sigma^2=1/H`, and the spectral radius is close to `gain` for large H
    (the circular law).

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    gain : float, default 1.0
        Factor of the standard deviation.
    gates : int, default 1
        How many matrices are stacked.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError, ValueError
        As :func:`orthogonal_`.

    References
    ----------
    X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
    equation (12).

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.xavier_normal_(torch.empty(4 * 200, 200), gates=4)
    >>> bool((weight.std() * 200**0.5 - 1).abs() < 0.02)
    True
    """
    return _fill_gates(tensor, gates, lambda block: torch.nn.init.xavier_normal_(block, gain, generator=generator))


def kaiming_uniform_(tensor, a=0.0, mode="fan_in", nonlinearity="relu", *, gates=1, generator=None):
    r"""Fill each gate's matrix from :math:`U(-b,b)`, :math:`b=g\sqrt{3/\text{fan}}`.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    a : float, default 0.0
        Slope of a leaky ReLU for negative arguments; used with ``nonlinearity="leaky_relu"``.
    mode : {"fan_in", "fan_out"}, default "fan_in"
        The fan: columns, or rows of one gate.
    nonlinearity : str, default "relu"
        Decides the gain :math:`g`, by :func:`torch.nn.init.calculate_gain`: :math:`\sqrt2` for ReLU.
    gates : int, default 1
        How many matrices are stacked.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError, ValueError
        As :func:`orthogonal_`, or if `mode` or `nonlinearity` is unknown.

    References
    ----------
    K. He, X. Zhang, S. Ren and J. Sun, "Delving deep into rectifiers", ICCV 2015, equations (10) and (14). It speaks
    of feed-forward layers: each has a matrix of its own. In a recurrent layer the same matrix returns, so that the
    spectral radius :math:`\sqrt2` of a ReLU network is one too large for long sequences.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.kaiming_uniform_(torch.empty(100, 24))
    >>> bool(weight.abs().max() <= (6 / 24) ** 0.5)
    True
    """
    return _kaiming(torch.nn.init.kaiming_uniform_, tensor, a, mode, nonlinearity, gates, generator)


def kaiming_normal_(tensor, a=0.0, mode="fan_in", nonlinearity="relu", *, gates=1, generator=None):
    r"""Fill each gate's matrix from :math:`N(0,\sigma^2)`, :math:`\sigma=g/\sqrt{\text{fan}}`.

    Parameters, errors and source are those of :func:`kaiming_uniform_`.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, columns)``, floating point. Filled in place.
    a : float, default 0.0
        Slope of a leaky ReLU for negative arguments.
    mode : {"fan_in", "fan_out"}, default "fan_in"
        The fan: columns, or rows of one gate.
    nonlinearity : str, default "relu"
        Decides the gain :math:`g`.
    gates : int, default 1
        How many matrices are stacked.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.kaiming_normal_(torch.empty(4 * 200, 200), gates=4, mode="fan_out")
    >>> bool((weight.std() * 100**0.5 - 1).abs() < 0.02)
    True
    """
    return _kaiming(torch.nn.init.kaiming_normal_, tensor, a, mode, nonlinearity, gates, generator)


def _kaiming(fill, tensor, a, mode, nonlinearity, gates, generator):
    check_choice("mode", mode, ("fan_in", "fan_out"))
    torch.nn.init.calculate_gain(nonlinearity, a)  # its error names the nonlinearity
    return _fill_gates(tensor, gates, lambda block: fill(block, a, mode, nonlinearity, generator=generator))


def spectral_radius_(tensor, radius=1.0, *, gates=1):
    r"""Scale each gate's square matrix so that its spectral radius is `radius`.

    What the matrices hold is kept up to that factor, so fill them first: Gaussian, orthogonal or sparse.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape ``(gates * H, H)``, floating point. Scaled in place.
    radius : float, default 1.0
        The largest absolute eigenvalue that each matrix shall have. Not negative.
    gates : int, default 1
        How many matrices are stacked.

    Returns
    -------
    torch.Tensor
        `tensor`.

    Raises
    ------
    TypeError
        If `tensor` is not a floating-point tensor.
    ValueError
        If its blocks are not square, `radius` is negative, or a block has no eigenvalue but zero.

    References
    ----------
    H. Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks", GMD report 148, 2001.
    For networks that are trained: I. Sutskever, J. Martens, G. Dahl and G. Hinton, "On the importance of initialization
    and momentum in deep learning", ICML 2013, section 4.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = rk.init.spectral_radius_(torch.randn(8, 8), 0.9)
    >>> round(rk.diagnostics.spectral_radius(weight).item(), 5)
    0.9
    """
    blocks = _blocks(tensor, gates)
    if blocks.shape[1] != blocks.shape[2] or blocks.shape[1] == 0:
        raise ValueError(f"tensor: expected {gates} square matrices, got shape {tuple(tensor.shape)}")
    if not radius >= 0:
        raise ValueError(f"radius: expected a number of at least 0, got {radius!r}")
    wide = torch.promote_types(tensor.dtype, torch.float32)
    present = spectral_radius(blocks.to(wide))
    if not (present > 0).all():
        raise ValueError("tensor: expected matrices with an eigenvalue other than 0; fill it before it is scaled")
    with torch.no_grad():
        tensor.copy_((blocks.to(wide) * (radius / present)[:, None, None]).view(tensor.shape))
    return tensor


def _blocks(tensor, gates):
    """The stacked matrices of the gates, as (gates, H, columns), sharing memory with ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating-point dtype, got {tensor.dtype}")
    if not isinstance(gates, int) or gates < 1:
        raise ValueError(f"gates: expected an int of at least 1, got {gates!r}")
    if tensor.dim() != 2 or tensor.shape[0] % gates:
        raise ValueError(f"tensor: expected shape ({gates} * H, columns), got {tuple(tensor.shape)}")
    return tensor.detach().unflatten(0, (gates, -1)) if tensor.shape[0] else tensor.detach().view(gates, 0, -1)


def _fill_gates(tensor, gates, fill):
    for block in _blocks(tensor, gates):
        if block.numel() == 0:
            continue
        if block.dtype in (torch.float16, torch.bfloat16):  # no decomposition works in these, few random numbers do
            block.copy_(fill(torch.empty_like(block, dtype=torch.float32)))
        else:
            fill(block)
    return tensor


# ------------------------------------------------------------------------------------------------- biases of the gates


def forget_gate_bias_(module, value=1.0):
    r"""Set the bias of the gate that keeps the state: the LSTM's forget gate, the GRU's update gate.

    PyTorch gives every gate *two* biases, :math:`b_{ih}` and :math:`b_{hh}`, and only their sum acts. Here
    :math:`b_{ih}` gets the whole `value` and :math:`b_{hh}` zero, so that the sum is `value`. (Setting both to 1, as is
    often seen, makes it 2.) At :math:`\sigma(1)\approx0.73` a state has a half-life of about two steps; at
    :math:`\sigma(5)` about a hundred. All other biases are left alone.

    Parameters
    ----------
    module : torch.nn.Module
        LSTM or GRU, or their cells, of ``rnnkernels`` or ``torch.nn``; with biases. All layers and directions are set.
    value : float, default 1.0
        The sum of the two biases.

    Returns
    -------
    torch.nn.Module
        `module`.

    Raises
    ------
    TypeError
        If `module` is not recurrent.
    ValueError
        If it has no such gate, or no biases.

    References
    ----------
    F. A. Gers, J. Schmidhuber and F. Cummins, "Learning to forget: continual prediction with LSTM", Neural Computation
    12(10), 2000. R. Jozefowicz, W. Zaremba and I. Sutskever, "An empirical exploration of recurrent network
    architectures", ICML 2015.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> lstm = rk.init.forget_gate_bias_(torch.nn.LSTM(3, 2), 1.0)
    >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[2:4].tolist()  # rows: input, forget, cell, output
    [1.0, 1.0]
    """
    kind = _kind(module)
    _set_bias(module, _keeping(kind)[0], lambda rows: rows.fill_(value))
    return module


def chrono_(module, max_time, *, min_time=2.0, generator=None):
    r"""Spread the time scales of the units over what the task may need (chrono initialization).

    A gate that keeps the share :math:`\sigma(b)` of a state at every step forgets over about
    :math:`1/(1-\sigma(b))=1+e^{b}` steps. With

    .. math:: b_f=\log(u-1),\quad u\sim U(T_{\min},T_{\max}),\qquad b_i=-b_f

    these *characteristic times* are spread evenly between the two bounds; in an LSTM the input gate takes in as much
    as the forget gate lets go. A GRU's update gate, which keeps the state in PyTorch's equations, gets
    :math:`b_z=b_f`. As in :func:`forget_gate_bias_`, these are the sums of the two biases, in :math:`b_{ih}`. All other
    biases are left alone.

    Parameters
    ----------
    module : torch.nn.Module
        LSTM or GRU, or their cells, of ``rnnkernels`` or ``torch.nn``; with biases. All layers and directions are set.
    max_time : float
        :math:`T_{\max}`: the longest dependence expected, in steps. More than `min_time`.
    min_time : float, default 2.0
        :math:`T_{\min}`: more than 1. At 2 it is the source's choice, :math:`b_f\sim\log U(1,T_{\max}-1)`.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.nn.Module
        `module`.

    Raises
    ------
    TypeError
        If `module` is not recurrent.
    ValueError
        If it has no such gate or no biases, or a bound does not fit.

    References
    ----------
    C. Tallec and Y. Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> lstm = rk.init.chrono_(torch.nn.LSTM(3, 100), max_time=500)
    >>> forget = (lstm.bias_ih_l0 + lstm.bias_hh_l0)[100:200]
    >>> times = 1 + forget.exp()
    >>> bool(times.min() >= 2), bool(times.max() <= 500)
    (True, True)
    """
    if not min_time > 1:
        raise ValueError(f"min_time: expected a number of steps above 1, got {min_time!r}")
    if not max_time > min_time:
        raise ValueError(f"max_time: expected a number of steps above min_time, {min_time!r}, got {max_time!r}")
    kind = _kind(module)
    keeps, lets_in = _keeping(kind)
    drawn = []

    def draw(rows):
        wide = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        drawn.append(wide.uniform_(min_time - 1, max_time - 1, generator=generator).log_())
        rows.copy_(drawn[-1])

    _set_bias(module, keeps, draw)
    if lets_in is not None:
        _set_bias(module, lets_in, lambda rows: rows.copy_(-drawn.pop(0)))
    return module


def _set_bias(module, gate, fill):
    """Let ``fill`` write a gate's rows of b_ih and clear those of b_hh, in every layer and direction."""
    gates = _GATES[_kind(module)]
    names = [name for name, _ in module.named_parameters(recurse=False) if re.match(r"bias_ih(_l|$)", name)]
    if not names:
        raise ValueError(f"module: expected biases, got {type(module).__name__}(bias=False)")
    for name in names:
        for which in (name, name.replace("bias_ih", "bias_hh")):
            rows = getattr(module, which).detach().unflatten(0, (len(gates), -1))[gates.index(gate)]
            fill(rows) if which == name else rows.zero_()


def _keeping(kind):
    if kind not in _KEEPING:
        raise ValueError(f"module: expected an LSTM or a GRU, which have a gate that keeps the state, got {kind}")
    return _KEEPING[kind]


def _kind(module):
    """Which cell a module runs: ``"RNN"``, ``"GRU"`` or ``"LSTM"``."""
    if isinstance(module, torch.nn.RNNBase):
        return module.mode.split("_")[0]
    for kind, cell in (("RNN", torch.nn.RNNCell), ("GRU", torch.nn.GRUCell), ("LSTM", torch.nn.LSTMCell)):
        if isinstance(module, cell):
            return kind
    raise TypeError(f"module: expected an RNN, GRU or LSTM, or one of their cells, got {type(module).__name__}")


# ------------------------------------------------------------------------------------------------- whole modules


def _orthogonal(module, weight_ih, weight_hh, gates, gain, generator):
    xavier_uniform_(weight_ih, gates=gates, generator=generator)
    orthogonal_(weight_hh, gain, gates=gates, generator=generator)


def _xavier(module, weight_ih, weight_hh, gates, gain, generator):
    xavier_uniform_(weight_ih, gates=gates, generator=generator)
    xavier_uniform_(weight_hh, gain, gates=gates, generator=generator)


def _kaiming_both(module, weight_ih, weight_hh, gates, gain, generator):
    kaiming_normal_(weight_ih, gates=gates, generator=generator)
    kaiming_normal_(weight_hh, gates=gates, generator=generator).mul_(gain)


def _identity(module, weight_ih, weight_hh, gates, gain, generator):
    if gates > 1:
        raise ValueError(f"recipe: expected a plain RNN for 'identity', got {type(module).__name__}")
    xavier_uniform_(weight_ih, gates=gates, generator=generator)
    identity_(weight_hh, gain)


def _radius(module, weight_ih, weight_hh, gates, gain, generator):
    xavier_uniform_(weight_ih, gates=gates, generator=generator)
    xavier_normal_(weight_hh, gates=gates, generator=generator)
    spectral_radius_(weight_hh, gain, gates=gates)


#: Names that :func:`initialize` knows.
RECIPES = ("default", "xavier", "kaiming", "orthogonal", "identity", "spectral_radius")

_FILL = {
    "xavier": _xavier,
    "kaiming": _kaiming_both,
    "orthogonal": _orthogonal,
    "identity": _identity,
    "spectral_radius": _radius,
}


def initialize(module, recipe="orthogonal", *, gain=1.0, forget_bias=None, max_time=None, generator=None):
    r"""Initialize every recurrent layer and cell in a model, gate by gate.

    =====================  ======================================  =============================================
    recipe                 recurrent weights                       input weights
    =====================  ======================================  =============================================
    ``"default"``          ``reset_parameters()``: all weights and biases from :math:`U(\pm1/\sqrt H)`, as torch does
    ---------------------  -------------------------------------------------------------------------------------
    ``"xavier"``           :func:`xavier_uniform_` with `gain`     :func:`xavier_uniform_`
    ``"kaiming"``          :func:`kaiming_normal_` times `gain`    :func:`kaiming_normal_`
    ``"orthogonal"``       :func:`orthogonal_` with `gain`         :func:`xavier_uniform_`
    ``"identity"``         :func:`identity_` times `gain`          :func:`xavier_uniform_`
    ``"spectral_radius"``  Gaussian, scaled so that its spectral   :func:`xavier_uniform_`
                           radius is `gain`
    =====================  ======================================  =============================================

    All but the default set the biases to zero first; then `forget_bias` or `max_time` sets those of the gates that
    keep. ``initialize(lstm, "orthogonal", forget_bias=1.0)`` is what Keras starts an LSTM with. A projection
    (``proj_size``) is filled like an input weight. Whatever else a module has (an output layer, peepholes, a layer
    norm) is left alone.

    For the identity, Le, Jaitly and Hinton (2015) draw the input weights from :math:`N(0,0.001^2)`. That makes a much
    slower beginning; ``torch.nn.init.normal_(rnn.weight_ih_l0, std=0.001)`` afterwards gives it.

    Parameters
    ----------
    module : torch.nn.Module
        A model with at least one RNN, GRU or LSTM, or one of their cells, of ``rnnkernels`` or ``torch.nn``.
    recipe : str, default "orthogonal"
        One of :data:`RECIPES`. ``"identity"`` is for the plain RNN with ReLU.
    gain : float, default 1.0
        Factor of the recurrent weights; not for ``"default"``.
    forget_bias : float, optional
        Passed to :func:`forget_gate_bias_`, for every module that has such a gate.
    max_time : float, optional
        Passed to :func:`chrono_`, for every module that has such a gate.
    generator : torch.Generator, optional
        Source of the random numbers; not for ``"default"``, whose numbers come from torch's global one.

    Returns
    -------
    torch.nn.Module
        `module`.

    Raises
    ------
    TypeError
        If nothing in `module` is recurrent.
    ValueError
        If the recipe is unknown or does not fit, an option does not belong to it, no module has a gate that an option
        sets, or both options are given.

    References
    ----------
    As the functions in the table.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> model = torch.nn.ModuleDict({"encoder": rk.GRU(3, 8), "head": torch.nn.Linear(8, 1)})
    >>> _ = rk.init.initialize(model, "orthogonal", forget_bias=1.0)
    >>> W = model["encoder"].weight_hh_l0.detach()[:8]
    >>> bool((W @ W.T - torch.eye(8)).abs().max() < 1e-5)
    True
    """
    check_choice("recipe", recipe, RECIPES)
    if recipe == "default" and (gain != 1.0 or generator is not None):
        raise ValueError("recipe: 'default' takes neither gain nor generator")
    if forget_bias is not None and max_time is not None:
        raise ValueError("forget_bias, max_time: expected at most one of them, since both set the same biases")
    found = [part for part in module.modules() if isinstance(part, (torch.nn.RNNBase, torch.nn.RNNCellBase))]
    if not found:
        raise TypeError(f"module: expected an RNN, GRU or LSTM, or one of their cells, got {type(module).__name__}")
    keeping = [part for part in found if _kind(part) in _KEEPING]
    if not keeping and (forget_bias is not None or max_time is not None):
        raise ValueError("forget_bias, max_time: expected an LSTM or a GRU, which have a gate that keeps the state")
    for part in found:
        if recipe == "default":
            part.reset_parameters()
        else:
            _initialize(part, recipe, gain, generator)
    for part in keeping:
        if forget_bias is not None:
            forget_gate_bias_(part, forget_bias)
        if max_time is not None:
            chrono_(part, max_time, generator=generator)
    return module


def _initialize(module, recipe, gain, generator):
    gates = len(_GATES[_kind(module)])
    for name, parameter in module.named_parameters(recurse=False):
        if re.match(r"weight_ih(_l|$)", name):
            weight_hh = getattr(module, name.replace("weight_ih", "weight_hh"))
            _FILL[recipe](module, parameter.detach(), weight_hh.detach(), gates, gain, generator)
        elif re.match(r"weight_hr(_l|$)", name):
            xavier_uniform_(parameter, generator=generator)
        elif re.match(r"bias_(ih|hh)(_l|$)", name):
            parameter.detach().zero_()


# ------------------------------------------------------------------------------------------------- initial states


def _state_shapes(module, batch_size):
    """Shapes of the parts of a module's state: h, and for an LSTM c."""
    kind = _kind(module)
    if not isinstance(batch_size, int) or batch_size < 0:
        raise ValueError(f"batch_size: expected an int of at least 0, got {batch_size!r}")
    leading, sizes = (), [module.hidden_size]
    if isinstance(module, torch.nn.RNNBase):
        leading = (module.num_layers * (2 if module.bidirectional else 1),)
        sizes = [module.proj_size or module.hidden_size]
    if kind == "LSTM":
        sizes.append(module.hidden_size)
    return [(*leading, batch_size, size) for size in sizes]


def _as_state(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


def initial_state(module, batch_size, kind="zeros", *, scale=1.0, generator=None):
    r"""Make an initial state in the form that a module takes.

    Parameters
    ----------
    module : torch.nn.Module
        An RNN, GRU or LSTM, or one of their cells, of ``rnnkernels`` or ``torch.nn``. Its weights give device and
        dtype.
    batch_size : int
        Sequences in a batch.
    kind : {"zeros", "uniform", "normal"}, default "zeros"
        All zeros, :math:`U(-\text{scale},\text{scale})`, or :math:`N(0,\text{scale}^2)`.
    scale : float, default 1.0
        Bound or standard deviation.
    generator : torch.Generator, optional
        Source of the random numbers.

    Returns
    -------
    torch.Tensor or tuple of torch.Tensor
        ``h_0``, or for an LSTM ``(h_0, c_0)``: shape ``(layers * directions, B, H)``, for a cell ``(B, H)``.

    Raises
    ------
    TypeError
        If `module` is not recurrent.
    ValueError
        If `kind` is unknown, or `batch_size` is not a size.

    See Also
    --------
    LearnedState : an initial state that is trained.

    Notes
    -----
    An initial state starts the *forward* pass. It is no cure for a vanishing gradient: the product of Jacobians that a
    gradient goes through depends on it only by way of the slopes at the visited states, and the influence of
    :math:`h_0` itself fades like any other lag's.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> h, c = rk.init.initial_state(torch.nn.LSTM(3, 8, num_layers=2), batch_size=5, kind="normal")
    >>> h.shape, c.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """
    check_choice("kind", kind, ("zeros", "uniform", "normal"))
    shapes, weight, parts = _state_shapes(module, batch_size), next(module.parameters()), []
    for shape in shapes:
        part = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        if kind == "uniform":
            part.uniform_(-scale, scale, generator=generator)
        elif kind == "normal":
            part.normal_(0, scale, generator=generator)
        parts.append(part)
    return _as_state(parts)


class LearnedState(torch.nn.Module):
    r"""An initial state that is trained: one vector for each layer and direction, the same for every sequence.

    Backpropagation gives :math:`\partial L/\partial h_0` like any other gradient; summed over the batch it trains the
    parameters. Use it where sequences have a common beginning, and reset to it.

    Parameters
    ----------
    module : torch.nn.Module
        The RNN, GRU or LSTM, or cell, whose state it is. Only its sizes, device and dtype are used.

    Attributes
    ----------
    h_0 : torch.nn.Parameter
        Shape ``(layers * directions, 1, H)``, for a cell ``(1, H)``; zero at first.
    c_0 : torch.nn.Parameter
        For an LSTM: the cell state, likewise.

    Raises
    ------
    TypeError
        If `module` is not recurrent.

    References
    ----------
    M. L. Forcada and R. C. Carrasco, "Learning the initial state of a second-order recurrent neural network during
    regular-language inference", Neural Computation 7(5), 1995.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> gru = rk.GRU(3, 8)
    >>> start = rk.init.LearnedState(gru)
    >>> output, h_n = gru(torch.randn(7, 5, 3), start(batch_size=5))
    >>> output.sum().backward()
    >>> start.h_0.grad.shape
    torch.Size([1, 1, 8])
    """

    def __init__(self, module):
        super().__init__()
        parts = [torch.nn.Parameter(part) for part in _parts(initial_state(module, 1))]
        self.h_0 = parts[0]
        self.register_parameter("c_0", parts[1] if len(parts) > 1 else None)

    def forward(self, batch_size):
        """Return the state for a batch.

        Parameters
        ----------
        batch_size : int
            Sequences in the batch.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            In the form that the module takes, differentiable with respect to the parameters.
        """
        parts = [part for part in (self.h_0, self.c_0) if part is not None]
        shapes = [(*part.shape[:-2], batch_size, part.shape[-1]) for part in parts]
        return _as_state([part.expand(shape).contiguous() for part, shape in zip(parts, shapes, strict=True)])

    def extra_repr(self):
        """What ``repr`` shows."""
        return ", ".join(f"{name}={tuple(part.shape)}" for name, part in self.named_parameters())


def _parts(state):
    return state if isinstance(state, tuple) else (state,)
