"""Output layers for a recurrent network: from the hidden state to what the loss sees.

A recurrent layer ends at its hidden state :math:`h_t`. What is predicted from it is a separate equation, and
the literature writes several. The plain one, :math:`y_t = g(W_{hy} h_t + b_y)`, is :class:`torch.nn.Linear`
followed by an activation; the three that need more than the hidden state are here. All of them act on the last
axis alone, so one module serves a whole sequence ``(T, B, hidden_size)``, the same with ``batch_first``
``(B, T, hidden_size)``, and a single step ``(B, hidden_size)``.
"""

import torch
from torch import Tensor, nn

from rnnkernels.reference import ACTIVATIONS

__all__ = ["ConditionedOutput", "ContextOutput", "SkipOutput"]


def _check_size(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_activation(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def _check_tensor(name, tensor, features):
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dim() < 1 or tensor.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {tuple(tensor.shape)}")


def _check_leading(name, tensor, hidden):
    """Raise unless the axes of `tensor` before the last are those of `hidden`, or 1.

    Plain broadcasting would align ``(B, features)`` with the last axes of ``(T, B, hidden_size)``, but with the
    wrong ones of ``(B, T, hidden_size)``, silently so whenever B = T: the number of axes must agree.
    """
    expected = hidden.shape[:-1]
    actual = tensor.shape[:-1]
    if len(actual) != len(expected) or any(a not in (1, e) for a, e in zip(actual, expected, strict=True)):
        raise ValueError(
            f"{name} must have the leading axes {tuple(expected)} of hidden (or 1 in their place, to be repeated), "
            f"got shape {tuple(tensor.shape)}"
        )


class ConditionedOutput(nn.Module):
    r"""Output of a recurrent network that is told something besides its hidden state.

    .. math:: y_t = g(W_{hy} h_t + c_t + b_y)

    The condition :math:`c_t` is added before the activation, so it acts as a bias that may differ from step to
    step and from sequence to sequence: a speaker, a calendar effect, the encoder's summary in a
    sequence-to-sequence model.

    Parameters
    ----------
    hidden_size : int
        Size of the hidden state :math:`h_t`.
    output_size : int
        Size of the output :math:`y_t`, and of the condition :math:`c_t`.
    activation : {"identity", "tanh", "relu", "sigmoid"}, default "identity"
        The function :math:`g`, by its name in :data:`rnnkernels.reference.ACTIVATIONS`. ``"identity"`` gives
        regression values or logits; ``"tanh"`` and ``"sigmoid"`` confine the output to (-1, 1) and (0, 1).
    bias : bool, default True
        Whether there is a bias :math:`b_y`.
    device : torch.device or str, optional
        Where the parameters live; torch's default if None.
    dtype : torch.dtype, optional
        Their type; torch's default if None.

    Attributes
    ----------
    hidden_to_output : torch.nn.Linear
        :math:`W_{hy}`, of shape (output_size, hidden_size), and :math:`b_y`, of shape (output_size,), initialized as
        :class:`torch.nn.Linear` does, uniformly in :math:`\pm 1/\sqrt{\text{hidden\_size}}`.

    Raises
    ------
    TypeError
        If a size is not an int.
    ValueError
        If a size is less than 1, or `activation` is unknown.

    See Also
    --------
    SkipOutput : learns the contribution of the input instead of receiving one.

    Notes
    -----
    An additive condition is the simplest way in which a decoder hears its encoder; [1]_ adds a
    learned multiple of the encoder's summary to the output's pre-activation at every step (appendix A.1.2).
    Where the condition has another size, project it first: ``condition = torch.nn.Linear(condition_size,
    output_size, bias=False)(features)``.

    References
    ----------
    .. [1] K. Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
       translation", EMNLP 2014.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.nn.outputs import ConditionedOutput
    >>> output = ConditionedOutput(hidden_size=8, output_size=3)
    >>> hidden = torch.randn(5, 2, 8)                 # T = 5 steps, B = 2 sequences
    >>> condition = torch.randn(1, 2, 3)              # one condition a sequence, repeated over the steps
    >>> output(hidden, condition).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, hidden_size, output_size, activation="identity", bias=True, device=None, dtype=None):
        super().__init__()
        _check_size("hidden_size", hidden_size)
        _check_size("output_size", output_size)
        _check_activation(activation)
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.activation = activation
        self.hidden_to_output = nn.Linear(hidden_size, output_size, bias, device=device, dtype=dtype)

    def forward(self, hidden, condition):
        """Return :math:`y_t` for every step in `hidden`.

        Parameters
        ----------
        hidden : torch.Tensor, shape (..., hidden_size)
            Hidden states, such as the output of :class:`rnnkernels.RNN`.
        condition : torch.Tensor, shape (..., output_size)
            :math:`c_t`, with the leading axes of `hidden`; an axis of length 1 is repeated, so (1, B,
            output_size) gives every step of ``(T, B, hidden_size)`` the same condition.

        Returns
        -------
        torch.Tensor, shape (..., output_size)

        Raises
        ------
        TypeError
            If an argument is not a floating-point tensor.
        ValueError
            If a shape does not fit.
        """
        _check_tensor("hidden", hidden, self.hidden_size)
        _check_tensor("condition", condition, self.output_size)
        _check_leading("condition", condition, hidden)
        return ACTIVATIONS[self.activation](self.hidden_to_output(hidden) + condition)

    def extra_repr(self):
        return f"{self.hidden_size}, {self.output_size}, activation={self.activation!r}"


class SkipOutput(nn.Module):
    r"""Output of a recurrent network that sees the present input directly as well as the hidden state.

    .. math:: y_t = g(W_{hy} h_t + W_{xy} x_t + b_y)

    The second term goes around the recurrent layer: what only the present input says about the present output
    need not pass through the hidden state, which is then free for the past. The same equation is the output of
    a linear state-space model, where :math:`W_{xy}` is called the feedthrough matrix.

    Parameters
    ----------
    input_size : int
        Size of the input :math:`x_t`.
    hidden_size : int
        Size of the hidden state :math:`h_t`.
    output_size : int
        Size of the output :math:`y_t`.
    activation : {"identity", "tanh", "relu", "sigmoid"}, default "identity"
        The function :math:`g`, by its name in :data:`rnnkernels.reference.ACTIVATIONS`.
    bias : bool, default True
        Whether there is a bias :math:`b_y`.
    device : torch.device or str, optional
        Where the parameters live; torch's default if None.
    dtype : torch.dtype, optional
        Their type; torch's default if None.

    Attributes
    ----------
    hidden_to_output : torch.nn.Linear
        :math:`W_{hy}`, of shape (output_size, hidden_size), and :math:`b_y`, of shape (output_size,).
    input_to_output : torch.nn.Linear
        :math:`W_{xy}`, of shape (output_size, input_size), without a bias of its own. Both are initialized as
        :class:`torch.nn.Linear` does, uniformly in plus or minus one over the root of their number of columns.

    Raises
    ------
    TypeError
        If a size is not an int.
    ValueError
        If a size is less than 1, or `activation` is unknown.

    Notes
    -----
    Language models know :math:`W_{xy}` as direct connections: [1]_ makes them an option of its
    feed-forward model (section 2), and [2]_ adds them, hashed, to a recurrent one.

    References
    ----------
    .. [1] Y. Bengio, R. Ducharme, P. Vincent and C. Jauvin, "A neural probabilistic language model", JMLR 3, 2003.
    .. [2] T. Mikolov, A. Deoras, D. Povey, L. Burget and J. Cernocky, "Strategies for training large scale
       neural network language models", ASRU 2011.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.nn.outputs import SkipOutput
    >>> output = SkipOutput(input_size=4, hidden_size=8, output_size=3, activation="tanh")
    >>> hidden, input = torch.randn(5, 2, 8), torch.randn(5, 2, 4)
    >>> y = output(hidden, input)
    >>> y.shape, bool((y.abs() < 1).all())
    (torch.Size([5, 2, 3]), True)
    """

    def __init__(self, input_size, hidden_size, output_size, activation="identity", bias=True, device=None, dtype=None):
        super().__init__()
        _check_size("input_size", input_size)
        _check_size("hidden_size", hidden_size)
        _check_size("output_size", output_size)
        _check_activation(activation)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.activation = activation
        self.hidden_to_output = nn.Linear(hidden_size, output_size, bias, device=device, dtype=dtype)
        self.input_to_output = nn.Linear(input_size, output_size, bias=False, device=device, dtype=dtype)

    def forward(self, hidden, input):
        """Return :math:`y_t` for every step in `hidden`.

        Parameters
        ----------
        hidden : torch.Tensor, shape (..., hidden_size)
            Hidden states, such as the output of :class:`rnnkernels.RNN`.
        input : torch.Tensor, shape (..., input_size)
            The input of the same steps, with the leading axes of `hidden`; an axis of length 1 is repeated.

        Returns
        -------
        torch.Tensor, shape (..., output_size)

        Raises
        ------
        TypeError
            If an argument is not a floating-point tensor.
        ValueError
            If a shape does not fit.
        """
        _check_tensor("hidden", hidden, self.hidden_size)
        _check_tensor("input", input, self.input_size)
        _check_leading("input", input, hidden)
        return ACTIVATIONS[self.activation](self.hidden_to_output(hidden) + self.input_to_output(input))

    def extra_repr(self):
        return f"{self.input_size}, {self.hidden_size}, {self.output_size}, activation={self.activation!r}"


class ContextOutput(nn.Module):
    r"""Output of a recurrent network through a context layer and the present input.

    .. math::

        C_t &= \tanh(W_{hc} h_t) \\
        o_t &= \tanh(W_{co} C_t + W_{io} x_t + b_o) \\
        y_t &= g(W_{oy} o_t + b_y)

    A small feed-forward network with two hidden layers stands between the hidden state and the output, and the
    input joins at the second of them. It makes the transition from state to output deep while the recurrence
    itself stays shallow.

    Parameters
    ----------
    input_size : int
        Size of the input :math:`x_t`.
    hidden_size : int
        Size of the hidden state :math:`h_t`.
    context_size : int
        Size of both inner layers, :math:`C_t` and :math:`o_t`.
    output_size : int
        Size of the output :math:`y_t`.
    activation : {"identity", "tanh", "relu", "sigmoid"}, default "identity"
        The function :math:`g` of the last line, by its name in :data:`rnnkernels.reference.ACTIVATIONS`. With
        ``"tanh"`` no target outside (-1, 1) can be reached.
    bias : bool, default True
        Whether there are the biases :math:`b_o` and :math:`b_y`.
    device : torch.device or str, optional
        Where the parameters live; torch's default if None.
    dtype : torch.dtype, optional
        Their type; torch's default if None.

    Attributes
    ----------
    hidden_to_context : torch.nn.Linear
        :math:`W_{hc}`, of shape (context_size, hidden_size), without a bias.
    context_to_inner : torch.nn.Linear
        :math:`W_{co}`, of shape (context_size, context_size), and :math:`b_o`.
    input_to_inner : torch.nn.Linear
        :math:`W_{io}`, of shape (context_size, input_size), without a bias.
    inner_to_output : torch.nn.Linear
        :math:`W_{oy}`, of shape (output_size, context_size), and :math:`b_y`. All are initialized as
        :class:`torch.nn.Linear` does, uniformly in plus or minus one over the root of their number of columns.

    Raises
    ------
    TypeError
        If a size is not an int.
    ValueError
        If a size is less than 1, or `activation` is unknown.

    Notes
    -----
    The equations circulate in a form where :math:`o_t = \tanh(W_{ho} h_t + W_{xc} x_t + b_o)`:
    there :math:`C_t` is computed and nothing reads it, so :math:`W_{hc}` has no gradient and never learns. Here
    :math:`o_t` reads :math:`C_t`, and the last line has a bias and a free choice of activation. Networks with
    layers between the hidden state and the output are the deep output RNNs of [1]_.

    References
    ----------
    .. [1] R. Pascanu, C. Gulcehre, K. Cho and Y. Bengio, "How to construct deep recurrent neural networks", ICLR 2014.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.nn.outputs import ContextOutput
    >>> output = ContextOutput(input_size=4, hidden_size=8, context_size=6, output_size=3)
    >>> hidden, input = torch.randn(5, 2, 8), torch.randn(5, 2, 4)
    >>> output(hidden, input).sum().backward()
    >>> bool(output.hidden_to_context.weight.grad.abs().max() > 0)     # the context layer learns
    True
    """

    def __init__(
        self,
        input_size,
        hidden_size,
        context_size,
        output_size,
        activation="identity",
        bias=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_size("input_size", input_size)
        _check_size("hidden_size", hidden_size)
        _check_size("context_size", context_size)
        _check_size("output_size", output_size)
        _check_activation(activation)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.context_size = context_size
        self.output_size = output_size
        self.activation = activation
        self.hidden_to_context = nn.Linear(hidden_size, context_size, bias=False, device=device, dtype=dtype)
        self.context_to_inner = nn.Linear(context_size, context_size, bias, device=device, dtype=dtype)
        self.input_to_inner = nn.Linear(input_size, context_size, bias=False, device=device, dtype=dtype)
        self.inner_to_output = nn.Linear(context_size, output_size, bias, device=device, dtype=dtype)

    def forward(self, hidden, input):
        """Return :math:`y_t` for every step in `hidden`.

        Parameters
        ----------
        hidden : torch.Tensor, shape (..., hidden_size)
            Hidden states, such as the output of :class:`rnnkernels.RNN`.
        input : torch.Tensor, shape (..., input_size)
            The input of the same steps, with the leading axes of `hidden`; an axis of length 1 is repeated.

        Returns
        -------
        torch.Tensor, shape (..., output_size)

        Raises
        ------
        TypeError
            If an argument is not a floating-point tensor.
        ValueError
            If a shape does not fit.
        """
        _check_tensor("hidden", hidden, self.hidden_size)
        _check_tensor("input", input, self.input_size)
        _check_leading("input", input, hidden)
        context = torch.tanh(self.hidden_to_context(hidden))
        inner = torch.tanh(self.context_to_inner(context) + self.input_to_inner(input))
        return ACTIVATIONS[self.activation](self.inner_to_output(inner))

    def extra_repr(self):
        sizes = f"{self.input_size}, {self.hidden_size}, {self.context_size}, {self.output_size}"
        return f"{sizes}, activation={self.activation!r}"
