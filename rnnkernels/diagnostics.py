r"""Measure how gradients travel through a recurrent network.

Notation, as in the book: states :math:`h_0,\dots,h_T\in\mathbb R^{H}`, pre-activations :math:`a_t`,
:math:`h_t=f(a_t)`, :math:`a_t=W_{ih}x_t+b_{ih}+W_{hh}h_{t-1}+b_{hh}`. A *lag* :math:`k` counts steps back from the
last one: lag 0 is step :math:`T`, lag :math:`k` is step :math:`T-k`.
"""

import contextlib
import weakref

import torch

from rnnkernels.ops._checks import check_choice, check_tensor

__all__ = [
    "gradient_norm_per_lag",
    "jacobian_product",
    "measure_saved_tensors",
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
    time = 1 if getattr(module, "batch_first", False) else 0
    check_tensor("input", input, ("B", "T", "I") if time else ("T", "B", "I"))
    check_choice("wrt", wrt, ("state", "input"))
    if getattr(module, "bidirectional", False):
        raise ValueError("module: expected one direction, got a bidirectional module, where no lag is defined")
    if input.shape[time] == 0:
        raise ValueError(f"input: expected at least one time step, got shape {tuple(input.shape)}")

    # cuDNN differentiates only in training mode; outside it torch's own kernels can
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=module.training):
        steps = [step.detach().requires_grad_() for step in input.split(1, dim=time)]
        if hx is None:
            hx = _map_state(torch.zeros_like, module(steps[0])[1])
        state = _map_state(lambda s: s.detach().requires_grad_(), hx)
        states = []
        for step in steps:
            states.append(state)
            output, state = module(step, state)
        output = output.squeeze(time)
        if cotangent is None:
            cotangent = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
            cotangent = cotangent / cotangent.norm(dim=-1, keepdim=True)
        check_tensor("cotangent", cotangent, output.shape, like=output)
        # one row of parts a lag: an LSTM's state has two parts of shape (layers, B, H)
        rows = [s if isinstance(s, tuple) else (s,) for s in states] if wrt == "state" else [(s,) for s in steps]
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
