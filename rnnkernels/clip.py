"""Clipping of gradients and weights, on many tensors at once.

On a GPU each function is one or two launches of a multi-tensor kernel, and the host waits for nothing: norms and
factors stay on the device. Elsewhere PyTorch's own functions do the work.
"""

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rnnkernels import _backend

__all__ = ["adaptive_grad_clip_", "clip_grad_norm_", "clip_grad_value_", "clip_weight_value_"]

_PLAIN = {Tensor, torch.nn.Parameter}


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale the gradients so that their norm, as one vector, is at most ``max_norm``. In place.

    With $\mathbf{g}$ all gradients as one vector, each becomes

    .. math::

        g \leftarrow g \cdot \min\left(1, \frac{\text{max\_norm}}{\lVert \mathbf{g} \rVert_p + 10^{-6}}\right),

    which leaves the direction of the step as it is. This is :func:`torch.nn.utils.clip_grad_norm_`, argument for
    argument.

    Parameters
    ----------
    parameters : iterable of Tensor, or Tensor
        Parameters of any shapes; those without a gradient are passed over.
    max_norm : float
        The largest norm to leave, 0 or more.
    norm_type : float, default 2.0
        $p$, any number; ``math.inf`` or ``"inf"`` for the largest absolute value.
    error_if_nonfinite : bool, default False
        Raise, and scale nothing, where the norm is NaN or infinite. On a GPU this waits for the norm. Otherwise a NaN
        makes all gradients NaN, and an infinity makes the finite ones 0 and itself NaN, as in PyTorch.
    foreach : bool, optional
        PyTorch's implementation on lists (True) or one tensor after the other (False). By default the fastest: the
        Triton kernels on a GPU, for $p$ of 1, 2 and infinity.

    Returns
    -------
    Tensor
        The norm before clipping: no dimensions, in the gradients' type, on the device of the first.

    Raises
    ------
    ValueError
        If ``max_norm`` is negative or NaN.
    RuntimeError
        If the norm is not finite and ``error_if_nonfinite`` is set.

    Notes
    -----
    On the GPU, 16-bit gradients are summed in float32, and the factor is formed from that sum.

    Under ``DistributedDataParallel`` every process has the whole gradients and clips them alike. Gradients that are
    ``DTensor`` s, as under FSDP2 (``fully_shard``), go through PyTorch's function, which takes the norm over all shards
    and returns a ``DTensor``. For the wrapper class ``FullyShardedDataParallel`` use its own ``clip_grad_norm_``: to
    this function its shards look like whole tensors.

    References
    ----------
    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> rk.clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    parameters = _listed(parameters)
    max_norm, norm_type = _at_least_zero("max_norm", max_norm), float(norm_type)
    gradients = _gradients(parameters)
    kernels = _kernels(gradients) if foreach is None and norm_type in (1.0, 2.0, math.inf) else None
    if kernels is None:
        if foreach is None and not error_if_nonfinite and _on_cpu(gradients):
            return _clip_grad_norm_on_cpu(gradients, max_norm, norm_type)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    total, factor = kernels.norm_and_factor(gradients, max_norm, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The norm of order {norm_type} of the gradients is {float(total)}, so they can't be clipped. With "
            "error_if_nonfinite=False they are scaled all the same"
        )
    kernels.scale(gradients, factor)
    torch.autograd.graph.increment_version(gradients)
    dtype = gradients[0].dtype
    for gradient in gradients:
        dtype = torch.promote_types(dtype, gradient.dtype)
    return total.to(dtype)


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    r"""Bring every element of the gradients into [-``clip_value``, ``clip_value``]. In place.

    .. math::

        g_i \leftarrow \max(-c, \min(c, g_i))

    The direction of the step changes: large elements lose, small ones do not. It is
    :func:`torch.nn.utils.clip_grad_value_`, argument for argument.

    Parameters
    ----------
    parameters : iterable of Tensor, or Tensor
        Parameters of any shapes; those without a gradient are passed over.
    clip_value : float
        $c$, 0 or more. NaN in a gradient stays NaN.
    foreach : bool, optional
        PyTorch's implementation on lists (True) or one tensor after the other (False). By default the fastest.

    Raises
    ------
    ValueError
        If ``clip_value`` is negative or NaN.

    Notes
    -----
    Each element is treated by itself, so sharded gradients (``DTensor``) work too.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> weight.grad = torch.tensor([-7.0, 0.5, 2.0])
    >>> rk.clip_grad_value_(weight, 1.0)
    >>> weight.grad
    tensor([-1.0000,  0.5000,  1.0000])
    """
    parameters = _listed(parameters)
    clip_value = _at_least_zero("clip_value", clip_value)
    gradients = _gradients(parameters)
    kernels = _kernels(gradients) if foreach is None else None
    if not gradients:
        return
    if kernels is None and foreach is None and _on_cpu(gradients):
        _clamp_on_cpu(gradients, clip_value)
    elif kernels is None:
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)
    else:
        kernels.clamp(gradients, clip_value)
        torch.autograd.graph.increment_version(gradients)


@torch.no_grad()
def clip_weight_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    r"""Bring every element of the parameters themselves into [-``clip_value``, ``clip_value``]. In place.

    .. math::

        \theta_i \leftarrow \max(-c, \min(c, \theta_i))

    This is no gradient clipping, though the two are often confused: it bounds the model, not the step. It was proposed
    to bound the slope of a network in its input. Call it after ``optimizer.step()``.

    Parameters
    ----------
    parameters : iterable of Tensor, or Tensor
        Parameters of any shapes.
    clip_value : float
        $c$, 0 or more. NaN in a parameter stays NaN.

    Raises
    ------
    ValueError
        If ``clip_value`` is negative or NaN.

    Notes
    -----
    Each element is treated by itself, so sharded parameters (``DTensor``) work too.

    References
    ----------
    Arjovsky, Chintala and Bottou, "Wasserstein generative adversarial networks", ICML 2017, algorithm 1.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([-0.3, 0.004, 0.02]))
    >>> rk.clip_weight_value_([weight], 0.01)
    >>> weight.data
    tensor([-0.0100,  0.0040,  0.0100])
    """
    parameters = _listed(parameters)
    clip_value = _at_least_zero("clip_value", clip_value)
    kernels = _kernels(parameters)
    if kernels is not None:
        kernels.clamp([parameter.detach() for parameter in parameters], clip_value)
        torch.autograd.graph.increment_version(parameters)
    elif _on_cpu(parameters):
        _clamp_on_cpu(parameters, clip_value)
    elif parameters:
        torch._foreach_clamp_min_(parameters, -clip_value)
        torch._foreach_clamp_max_(parameters, clip_value)


@torch.no_grad()
def adaptive_grad_clip_(parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    r"""Scale each unit's gradient so that its norm is at most a share of the norm of the unit's weights. In place.

    With $W_i$ the weights that lead to unit $i$, the $i$-th row, and $G_i$ their gradient,

    .. math::

        G_i \leftarrow G_i \cdot
        \min\left(1, \lambda \frac{\max(\lVert W_i \rVert, \epsilon)}{\lVert G_i \rVert}\right).

    Under plain gradient descent with learning rate $\eta$, no unit then changes by more than $\eta\lambda$ of its size,
    so that one threshold serves layers of all scales.

    Parameters
    ----------
    parameters : iterable of Tensor, or Tensor
        Parameters; those without a gradient are passed over. A vector, such as a bias, is one unit. The rows of a
        recurrent layer's weights are units of its gates.
    clip_factor : float, default 0.01
        $\lambda$, 0 or more.
    eps : float, default 1e-3
        The least norm that a unit is taken to have, so that weights which start at zero can grow; 0 or more.

    Raises
    ------
    ValueError
        If ``clip_factor`` or ``eps`` is negative or NaN.
    TypeError
        If a parameter is sharded (a ``DTensor``): a shard does not know the norm of its rows.

    Notes
    -----
    The norms of 16-bit tensors are taken in float32. The gradient of a unit whose norm is NaN is left as it is, and
    that of one whose norm is infinite becomes 0, and NaN where it was infinite. The authors leave the last, linear
    layer out; that is up to the caller.

    References
    ----------
    Brock, De, Smith and Simonyan, "High-performance large-scale image recognition without normalization", ICML 2021,
    section 4, equation 3.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    >>> weight.grad = torch.tensor([[0.6, 0.8], [0.3, 0.4]])
    >>> rk.adaptive_grad_clip_([weight], clip_factor=0.1)  # 1 is more than a tenth of 5; 0.5 is less than one of 50
    >>> weight.grad
    tensor([[0.3000, 0.4000],
            [0.3000, 0.4000]])
    """
    parameters = [parameter for parameter in _listed(parameters) if parameter.grad is not None]
    clip_factor, eps = _at_least_zero("clip_factor", clip_factor), _at_least_zero("eps", eps)
    gradients = _gradients(parameters)
    if any(_sharded(tensor) for tensor in (*parameters, *gradients)):
        raise TypeError(
            "parameters: expected whole tensors, got a DTensor: a shard does not know the norm of its rows. Clip by "
            "the norm or the value of the gradients instead"
        )
    columns = list(zip(parameters, gradients, strict=True))
    kernels = _kernels([*parameters, *gradients])
    # The kernel takes rows one behind the other.
    if kernels is not None and all(tensor.is_contiguous() for tensor in (*parameters, *gradients)):
        kernels.adaptive_clip([parameter.detach() for parameter in parameters], gradients, clip_factor, eps)
        torch.autograd.graph.increment_version(gradients)
        return
    for weight, gradient in columns:
        dims = tuple(range(1, weight.dim())) or None  # None is all of a vector
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True, dtype=wide)
        largest = torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=wide).clamp_min_(eps).mul_(clip_factor)
        gradient.mul_(torch.where(norm > largest, largest / norm, 1.0))


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    listed = list(parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn("parameters: the generator is empty, so nothing is clipped", stacklevel=4)
    for kind in set(map(type, listed)):
        if not issubclass(kind, Tensor):
            raise TypeError(f"parameters: expected Tensors, got {kind.__name__}")
    return listed


def _at_least_zero(name: str, value: float) -> float:
    value = float(value)
    if not value >= 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
    return value


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors where the host need not wait for a number."""
    if not tensors or torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    return all(tensor.is_cpu for tensor in tensors)


def _clip_grad_norm_on_cpu(gradients: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """As in PyTorch, but for the multiplication by 1 in the steps that need no clipping."""
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, norm_type)), norm_type)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    if factor != 1:  # NaN is not
        torch._foreach_mul_(gradients, factor)
    return total


LARGE = 16384
"""Elements from which on a tensor is clamped faster by itself than in a list, which takes two passes (measured)."""


def _clamp_on_cpu(tensors: Sequence[Tensor], bound: float) -> None:
    small = []
    for tensor in tensors:
        if tensor.numel() < LARGE:
            small.append(tensor)
        else:
            tensor.clamp_(-bound, bound)
    if small:
        torch._foreach_clamp_min_(small, -bound)
        torch._foreach_clamp_max_(small, bound)


def _sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked by name, since not every build of PyTorch has the class."""
    return any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def _may_use_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether it is worth asking :func:`_kernels`: the first tensor tells it, so that on a CPU nothing is lost."""
    if not tensors or torch.compiler.is_compiling():
        return False
    return _backend._selected == "triton" or tensors[0].device.type == "cuda"


def _kernels(tensors: Sequence[Tensor]) -> types.ModuleType | None:
    """The multi-tensor kernels, if they are to work on these tensors; None where PyTorch is."""
    if not _may_use_kernels(tensors):
        return None
    places = {(tensor.device, tensor.dtype) for tensor in tensors}
    if not all(_backend.resolve(*place) == "triton" for place in places) or len({device for device, _ in places}) > 1:
        return None
    if not all(type(t) in _PLAIN and t.layout == torch.strided and _dense(t) for t in tensors):
        return None
    from rnnkernels.kernels.triton import multi_tensor

    return multi_tensor


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps and overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    return tensor.permute(order).is_contiguous()
