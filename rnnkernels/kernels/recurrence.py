"""What the general recurrence takes and keeps: the contract between its operators and both back ends.

The plain RNN, GRU and LSTM have kernels of their own. A cell with any of the options below runs on
``kernels.eager.general`` or ``kernels.triton.general``, which share these types.
"""

from typing import NamedTuple

from torch import Tensor


class Recurrence(NamedTuple):
    """A cell and its options."""

    cell: str
    """``"rnn"``, ``"gru"`` or ``"lstm"``."""
    nonlinearity: str = "tanh"
    """$f$ of the plain RNN."""
    reset_after: bool = True
    """Whether the GRU's reset gate acts after the product with $W_{hn}$."""
    reverse: bool = False
    """Whether the steps run from the last to the first."""
    recurrent_dropout: float = 0.0
    """Probability of a unit to be missing from every recurrent product of a sequence (one mask for all its steps)."""
    zoneout: float = 0.0
    """Probability of a unit's state to stand still for a step."""
    zoneout_cell: float = 0.0
    """The same for the cell state of the LSTM."""
    training: bool = True
    """Whether masks are drawn. Else there is no recurrent dropout, and zoneout takes its expectation."""
    grad_clip: float = float("inf")
    """Bound on each element of the gradient of a pre-activation, on its way back through time."""
    epsilon: float = 1e-5
    """Added to the variance in layer normalization."""
    key: int = 1
    """Key of the random masks (see ``kernels.eager.random``)."""


class Weights(NamedTuple):
    """Parameters of the recurrence. H is the hidden size, S that of the state: the projection's, or H without one."""

    weight_hh: Tensor
    """(gates * H, S), the gates in PyTorch's order: r, z, n of the GRU and i, f, g, o of the LSTM."""
    bias: Tensor | None = None
    """(H,): added to the GRU's product with $W_{hn}$ inside the reset gate (``reset_after``), or, where the plain RNN
    has layer normalization, to the normalized sum."""
    weight_hr: Tensor | None = None
    """(S, H): the LSTM's projection, $h_t = W_{hr} m_t$ with $m_t = o_t \\odot \\tanh(c_t)$."""
    weight_peephole: Tensor | None = None
    """(3, H): peepholes from the cell state to the gates i, f and o, the last from the new one."""
    norm_hh: Tensor | None = None
    """(gates * H,): gain of the layer normalization of the recurrent product."""
    norm_cell_weight: Tensor | None = None
    """(H,): gain of the layer normalization of the LSTM's cell state; given together with ``norm_cell_bias``."""
    norm_cell_bias: Tensor | None = None
    """(H,)."""


class Trace(NamedTuple):
    """What a forward pass returns, and its backward pass reads. T steps, batch B."""

    output: Tensor
    """(T, B, S): $h_t$; zero in padding."""
    h_n: Tensor
    """(B, S)."""
    c_n: Tensor | None
    """(B, H); None but for the LSTM."""
    gates: Tensor
    """(T, B, parts * H), activated: the RNN's candidate state $f(a_t)$; $W_{hn} h + b_{hn}$ (zeros where the reset gate
    acts before the product), r, z, n of the GRU; i, f, g, o of the LSTM. Finite in padding."""
    cells: Tensor | None
    """(T, B, H), float32 or better: the LSTM's $c_t$, after zoneout."""
    new_cells: Tensor | None
    """(T, B, H), float32 or better: the LSTM's $f_t \\odot c_{t-1} + i_t \\odot g_t$; None without zoneout of the cell,
    where it is ``cells``."""
    products: Tensor | None
    """(T, B, gates * H), with layer normalization: what is normalized. For the RNN the sum of input and recurrent
    product, for the others the recurrent product."""


class Gradients(NamedTuple):
    """What a backward pass returns. Zero in padding."""

    gates: Tensor
    """(T, B, parts * H): gradients of the parts of ``Trace.gates`` before their activations; that of the GRU's first
    part is the gradient of $W_{hn} h + b_{hn}$ (zeros where the reset gate acts before the product)."""
    products: Tensor | None
    """(T, B, gates * H), with layer normalization: gradients of ``Trace.products``."""
    states: Tensor | None
    """(T, B, S), with a projection or a normalized cell state: gradients of $h_t$ before zoneout."""
    h_0: Tensor
    """(B, S)."""
    c_0: Tensor | None
    """(B, H)."""
