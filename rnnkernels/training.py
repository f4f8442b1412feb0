r"""Train on sequences longer than a backward pass can be, and on batches larger than memory.

Truncated and checkpointed backpropagation through time, gradient accumulation, and an auxiliary loss. Everything here
works with any module that is called as ``output, state = model(input, state)``: the layers of ``rnnkernels`` and of
``torch.nn``, and your own models built on them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rnnkernels.ops._checks import check_tensor

__all__ = ["TruncatedBPTT", "accumulate_gradients", "checkpointed_bptt", "target_replication"]


def _map_state(function, state):
    return tuple(_map_state(function, part) for part in state) if isinstance(state, tuple) else function(state)


def _check_count(name, value, at_least):
    if not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}: expected an int of at least {at_least}, got {value!r}")


def _check_sequence(name, value, dims=2):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dim() < dims:
        raise ValueError(f"{name}: expected at least {dims} dimensions, time and batch, got shape {tuple(value.shape)}")


class TruncatedBPTT:
    r"""Truncated backpropagation through time: carry the state on, cut the gradient.

    Every ``k1`` steps it gives the loss of those steps, to be differentiated through the last ``k2`` steps and no
    further: BPTT(h; h') of the source with h = k2 and h' = k1. The state is carried from window to window, and from
    call to call, so that the *forward* pass remembers without a limit.

    With :math:`S_n` the states up to step :math:`nk_1-k_2` taken as constants, window :math:`n` gives

    .. math:: L_n=\sum_{t=(n-1)k_1+1}^{nk_1}\ell_t,\qquad
              g_n=\left.\frac{\partial L_n}{\partial\theta}\right|_{S_n}

    (or the mean, as `loss` has it). With k2 = k1 the windows follow each other, and the gradient of a loss right after
    a cut reaches back one step only. With k2 > k1 they overlap: every loss looks back over at least k2 - k1 + 1 steps.
    The overlap is run again with the weights as they are, from the state before it. That costs k2/k1 as much, and it is
    the only way to a gradient of the present weights: the old graph belongs to weights that the optimizer has changed.

    Parameters
    ----------
    model : callable
        Called as ``output, state = model(input, state)``, with None for the state where `initial_state` is not given.
        The parts of the state have the batch in dimension 1, as torch's have.
    loss : callable
        Called as ``loss(output, target)`` for the steps of one window; returns a scalar tensor.
    k1 : int
        Steps from one window to the next.
    k2 : int, optional
        Steps that the gradient goes back over, at least `k1`. Default: `k1`.
    initial_state : callable, optional
        Called as ``initial_state(batch_size)``, such as :class:`rnnkernels.init.LearnedState`. Gradients reach it from
        every window that contains the beginning. Zeros by default.
    batch_first : bool, optional
        Whether input, target and output are (batch, time, ...) rather than (time, batch, ...). Default:
        ``model.batch_first`` if there is such an attribute, else False.

    Attributes
    ----------
    state : torch.Tensor or tuple of torch.Tensor or None
        The state after the last step, detached; None at the beginning.

    Raises
    ------
    ValueError
        If `k1` or `k2` is not such a number.

    References
    ----------
    R. J. Williams and J. Peng, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", Neural Computation 2(4), 1990.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> rnn = rk.RNN(3, 8)
    >>> optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    >>> windows = rk.training.TruncatedBPTT(rnn, torch.nn.functional.mse_loss, k1=10, k2=25)
    >>> for _ in range(2):  # a stream that comes in two parts
    ...     input, target = torch.randn(30, 4, 3), torch.randn(30, 4, 8)
    ...     for loss in windows(input, target):
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    >>> windows.state.shape
    torch.Size([1, 4, 8])
    >>> windows.reset()  # before a stream that has nothing to do with this one
    """

    def __init__(
        self,
        model: Callable,
        loss: Callable[[Tensor, Tensor], Tensor],
        k1: int,
        k2: int | None = None,
        *,
        initial_state: Callable | None = None,
        batch_first: bool | None = None,
    ) -> None:
        _check_count("k1", k1, 1)
        _check_count("k2", k1 if k2 is None else k2, k1)
        self.model, self.loss = model, loss
        self.k1, self.k2 = k1, k1 if k2 is None else k2
        self.initial_state = initial_state
        self._time = int(getattr(model, "batch_first", False) if batch_first is None else batch_first)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next step begins from the initial state."""
        self.state = None
        self._batch = None
        # the steps that the next window looks back over, where sequences start among them, and the state before them
        self._past, self._past_starts, self._before = None, [], None

    def __call__(self, input: Tensor, target: Tensor, starts: Tensor | None = None) -> Iterator[Tensor]:
        """Go through the next steps of the stream.

        Parameters
        ----------
        input : torch.Tensor
            The next T steps, shape ``(T, B, ...)``; ``(B, T, ...)`` with `batch_first`. Row b continues row b of the
            call before.
        target : torch.Tensor
            Their targets, of the same two leading dimensions.
        starts : torch.Tensor of bool, optional
            Of the same two dimensions: True where a new sequence begins in a row. The state is the initial one there,
            and no gradient passes.

        Yields
        ------
        torch.Tensor
            For every `k1` steps, and for what is left at the end, the loss, with a graph of at most `k2` steps. Call
            ``backward`` and change the weights before you ask for the next one.

        Raises
        ------
        TypeError
            If an argument is not a tensor, or `starts` not one of bool.
        ValueError
            If the sizes do not fit together, or to the call before.
        """
        _check_sequence("input", input)
        _check_sequence("target", target)
        time, sizes = self._time, input.shape[:2]
        batch = sizes[1 - time]
        if target.shape[:2] != sizes:
            raise ValueError(f"target: expected leading dimensions {tuple(sizes)}, got shape {tuple(target.shape)}")
        if self._batch not in (None, batch):
            raise ValueError(f"input: expected {self._batch} sequences, as before, got {batch}; reset() starts anew")
        if starts is not None and (not isinstance(starts, Tensor) or starts.dtype != torch.bool):
            raise TypeError(f"starts: expected a Tensor of torch.bool, got {getattr(starts, 'dtype', type(starts))}")
        if starts is not None and starts.shape != sizes:
            raise ValueError(f"starts: expected shape {tuple(sizes)}, got {tuple(starts.shape)}")
        self._batch = batch
        return self._windows(input, target, self._rows(starts, sizes[time]))

    def _rows(self, starts, length):
        """A mask over the batch for each step where a sequence starts, and None for each other step."""
        if starts is None:
            return [None] * length
        rows = starts.movedim(self._time, 0)
        return [row if some else None for row, some in zip(rows, rows.any(1).tolist(), strict=True)]

    def _windows(self, input, target, starts):
        for begin in range(0, len(starts), self.k1):
            new = min(self.k1, len(starts) - begin)
            window, window_starts = input.narrow(self._time, begin, new), starts[begin : begin + new]
            if self._past is not None:
                window = torch.cat([self._past, window], dim=self._time)
                window_starts = self._past_starts + window_starts
            length = len(window_starts)
            kept = min(length, self.k2 - self.k1)  # what the next window looks back over
            cut = length - kept
            state = self._initial() if self._before is None else self._before
            first, between = self._run(window.narrow(self._time, 0, cut), window_starts[:cut], state)
            second, last = self._run(window.narrow(self._time, cut, kept), window_starts[cut:], between)
            output = torch.cat([*first, *second], dim=self._time).narrow(self._time, length - new, new)
            loss = self.loss(output, target.narrow(self._time, begin, new))
            self._past, self._past_starts = window.narrow(self._time, cut, kept).detach(), window_starts[cut:]
            if cut:
                self._before = _map_state(Tensor.detach, between)
            self.state = _map_state(Tensor.detach, last)
            yield loss

    def _initial(self):
        return None if self.initial_state is None else self.initial_state(self._batch)

    def _run(self, input, starts, state):
        """The outputs, piece by piece between the steps where sequences start, and the state after them."""
        outputs, begins = [], [t for t, mask in enumerate(starts) if mask is not None or t == 0]
        for begin, end in pairwise([*begins, len(starts)]):
            if starts[begin] is not None and state is not None:
                state = self._restart(state, starts[begin])
            output, state = self.model(input.narrow(self._time, begin, end - begin), state)
            outputs.append(output)
        return outputs, state

    def _restart(self, state, mask):
        """The initial state for the sequences that start, the carried one for the others."""
        initial = self._initial()
        if initial is None:
            initial = _map_state(torch.zeros_like, state)
        if isinstance(state, tuple):
            return tuple(self._blend(one, other, mask) for one, other in zip(initial, state, strict=True))
        return self._blend(initial, state, mask)

    def _blend(self, initial, state, mask):
        if isinstance(state, tuple):
            return tuple(self._blend(one, other, mask) for one, other in zip(initial, state, strict=True))
        return torch.where(mask.view(1, -1, *[1] * (state.dim() - 2)), initial, state)


def accumulate_gradients(parameters: Iterable[Tensor], sums: Iterable[tuple[Tensor, float | Tensor]]) -> Tensor:
    r"""Gradient of a mean over a large batch, from small batches, one at a time in memory.

    The loss of the large batch is a mean over its N elements (sequences, or steps that no mask leaves out). Small
    batches with :math:`N_i` elements give its gradient exactly only as

    .. math:: \frac{\partial L}{\partial\theta}
              =\frac{1}{\sum_iN_i}\sum_i\frac{\partial}{\partial\theta}\sum_{j=1}^{N_i}\ell_{ij};

    the mean of their *means* weighs the elements of a small part more. So this takes sums and counts, and divides once.

    Parameters
    ----------
    parameters : iterable of torch.Tensor
        The model's parameters. Their ``.grad`` gets the gradient added to what is there, as ``backward`` does.
    sums : iterable of (torch.Tensor, number)
        For each small batch the *sum* of its losses, and how many there were. Best a generator, so that a graph is made
        when the one before has been freed.

    Returns
    -------
    torch.Tensor
        The mean loss, detached.

    Raises
    ------
    ValueError
        If `sums` is empty. The gradients are then, and after any error, as they were.

    Notes
    -----
    Equal up to the order of floating-point sums. What looks at the whole batch at once, such as batch normalization,
    still sees the small ones. If no element counts at all, the mean is NaN, as torch's is.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> model, input = torch.nn.Linear(2, 1), torch.randn(5, 2)
    >>> model(input).square().mean().backward()
    >>> whole = model.weight.grad.clone()
    >>> model.zero_grad()
    >>> parts = ((model(part).square().sum(), len(part)) for part in input.split([4, 1]))
    >>> loss = rk.training.accumulate_gradients(model.parameters(), parts)
    >>> bool((model.weight.grad - whole).abs().max() < 1e-6)
    True
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    total, count, done = 0, 0, False
    try:
        for loss_sum, elements in sums:
            loss_sum.backward()
            total, count, done = total + loss_sum.detach(), count + elements, True
        if not done:
            raise ValueError("sums: expected at least one sum and count, got none")
    except BaseException:
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        raise
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if parameter.grad is not None:
            parameter.grad.div_(count)
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
    return total / count


def checkpointed_bptt(
    module: Callable,
    input: Tensor,
    hx: Tensor | tuple | None = None,
    *,
    segment_length: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    target: Tensor | None = None,
    batch_first: bool | None = None,
) -> tuple[Tensor, Tensor | tuple]:
    r"""Run a recurrent module so that the backward pass recomputes it segment by segment: memory for time.

    Only the states at the segments' borders are kept, and one segment's intermediates at a time: with segments of
    :math:`s` steps about :math:`T/s+s` steps instead of :math:`T`, least at :math:`s=\sqrt T`. The price is one more
    forward pass. Outputs and gradients are those of a plain call; nothing is truncated.

    Parameters
    ----------
    module : callable
        Called as ``output, state = module(input, state)``.
    input : torch.Tensor
        Shape ``(T, B, ...)``, or ``(B, T, ...)`` if `batch_first`.
    hx : torch.Tensor or tuple of torch.Tensor, optional
        Initial state in the form that the module takes.
    segment_length : int, optional
        Steps of a segment. Default: :math:`\lceil\sqrt T\rceil`.
    loss : callable, optional
        Called as ``loss(output, target)`` for every segment, *within* what is recomputed. It must be a sum over steps,
        such as ``partial(mse_loss, reduction="sum")``. Without it the outputs of all steps are returned, and are in
        memory.
    target : torch.Tensor, optional
        Shape ``(T, B, ...)``, as `input`; together with `loss`.
    batch_first : bool, optional
        Default: ``module.batch_first`` if there is such an attribute, else False.

    Returns
    -------
    output : torch.Tensor
        The outputs of all steps; with `loss`, the sum of the segments' losses.
    state : torch.Tensor or tuple of torch.Tensor
        The final state.

    Raises
    ------
    TypeError
        If `input` or `target` is not a tensor.
    ValueError
        If `segment_length` is not a positive int, the sizes do not fit, or only one of `loss` and `target` is given.

    References
    ----------
    T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174, 2016.
    For recurrent networks: A. Gruslys, R. Munos, I. Danihelka, M. Lanctot and A. Graves, "Memory-efficient
    backpropagation through time", NeurIPS 2016. It stands on :func:`torch.utils.checkpoint.checkpoint`.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> gru, input = rk.GRU(3, 8), torch.randn(100, 4, 3)
    >>> output, h_n = rk.training.checkpointed_bptt(gru, input)
    >>> torch.allclose(output, gru(input)[0], atol=1e-6)
    True
    """
    _check_sequence("input", input)
    time = int(getattr(module, "batch_first", False) if batch_first is None else batch_first)
    length = input.shape[time]
    if length == 0:
        raise ValueError(f"input: expected at least one time step, got shape {tuple(input.shape)}")
    segment_length = math.isqrt(length - 1) + 1 if segment_length is None else segment_length
    _check_count("segment_length", segment_length, 1)
    if (loss is None) != (target is None):
        raise ValueError("loss, target: expected both or none of them, got one")
    if target is not None:
        _check_sequence("target", target)
        if target.shape[:2] != input.shape[:2]:
            expected = tuple(input.shape[:2])
            raise ValueError(f"target: expected leading dimensions {expected}, got shape {tuple(target.shape)}")

    def run(segment, segment_target, state):
        output, state = module(segment, state)
        # a copy, since torch's mse_loss returns its scalar in a storage as large as all its terms
        return output if loss is None else loss(output, segment_target).clone(), state

    segments = input.split(segment_length, dim=time)
    targets = [None] * len(segments) if target is None else target.split(segment_length, dim=time)
    outputs, state = [], hx
    for segment, segment_target in zip(segments, targets, strict=True):
        output, state = checkpoint(run, segment, segment_target, state, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs, dim=time) if loss is None else sum(outputs), state


def target_replication(losses: Tensor, weight: float = 0.5, lengths: Tensor | None = None) -> Tensor:
    r"""Loss of a sequence with one target, asked for at every step as an auxiliary loss.

    .. math:: L=(1-\alpha)\,\ell_T+\frac{\alpha}{T}\sum_{t=1}^{T}\ell_t

    The gradient of :math:`\ell_T` alone has to travel back over all T steps. The auxiliary term asks for the answer
    wherever it could already be known, so that errors arise close to what caused them, and a truncated gradient reaches
    it. Where the answer can't be known before the end, the term is noise.

    Parameters
    ----------
    losses : torch.Tensor
        :math:`\ell_t`, the loss of predicting a sequence's target at step t; shape ``(T, B)``.
    weight : float, default 0.5
        :math:`\alpha`, from 0 to 1.
    lengths : torch.Tensor of int64, optional
        Steps of each sequence, shape ``(B,)``, on the device of `losses`. All T by default.

    Returns
    -------
    torch.Tensor
        The mean of :math:`L` over the batch, a scalar.

    Raises
    ------
    TypeError
        If `losses` is not a floating-point tensor.
    ValueError
        If a shape does not fit, `losses` is empty, or `weight` is out of range.

    References
    ----------
    Z. C. Lipton, D. C. Kale, C. Elkan and R. Wetzel, "Learning to diagnose with LSTM recurrent neural networks", ICLR
    2016: target replication.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> losses = torch.tensor([[3.0], [2.0], [1.0]])  # one sequence of three steps
    >>> rk.training.target_replication(losses, weight=0.5)  # 0.5 * 1 + 0.5 * 2
    tensor(1.5000)
    """
    check_tensor("losses", losses, ("T", "B"))
    if losses.numel() == 0:
        raise ValueError(f"losses: expected at least one step and sequence, got shape {tuple(losses.shape)}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number from 0 to 1, got {weight!r}")
    length, batch = losses.shape
    if lengths is None:
        return ((1 - weight) * losses[-1] + weight * losses.mean(0)).mean()
    if not isinstance(lengths, Tensor) or tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected a Tensor of shape ({batch},), got {getattr(lengths, 'shape', lengths)}")
    counts = torch.arange(length, device=losses.device).unsqueeze(1) < lengths
    last = losses.gather(0, lengths.unsqueeze(0) - 1).squeeze(0)
    mean = torch.where(counts, losses, 0).sum(0) / lengths
    return ((1 - weight) * last + weight * mean).mean()
