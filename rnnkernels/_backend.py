"""Which implementation an operator uses, and how to override the choice."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "triton", "eager")

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_selected = _checked(os.environ.get("RNNKERNELS_BACKEND", "auto"), "environment variable RNNKERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the implementation that the operators use inside a ``with`` block.

    The environment variable ``RNNKERNELS_BACKEND`` sets what holds outside of any block. A backward pass uses what its
    forward pass used, wherever it runs.

    Parameters
    ----------
    backend : {"auto", "triton", "eager"}
        ``"auto"``, the default: Triton for CUDA tensors in float32, bfloat16 and float16 where Triton is installed,
        PyTorch for all others. ``"eager"``: always PyTorch. ``"triton"``: always Triton; CPU tensors then need Triton's
        interpreter (``TRITON_INTERPRET=1`` in the environment before the first use).

    Raises
    ------
    ValueError
        If ``backend`` is none of the three.
    RuntimeError
        By the operator, if ``"triton"`` was asked for and can't run on the tensors that came.

    Examples
    --------
    >>> import rnnkernels as rk
    >>> with rk.use_backend("eager"):
    ...     output, h_n = rk.RNN(3, 4)(torch.randn(5, 2, 3))
    """
    global _selected
    previous, _selected = _selected, _checked(backend, "backend")
    try:
        yield
    finally:
        _selected = previous


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: looking takes longer than a short sequence


def has_triton() -> bool:
    """Whether Triton is installed (it is not imported)."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, as its environment variable says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def asked_for(backend: str) -> bool:
    """Whether this implementation was chosen by name."""
    return _selected == backend


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for tensors of this device and type: ``"triton"`` or ``"eager"``.

    Raises
    ------
    RuntimeError
        If ``use_backend("triton")`` holds and Triton can't run on them.
    """
    if _selected == "auto" and device.type == "cpu":  # before a reason is worded, which takes longer than the choice
        return "eager"
    return explain(device, dtype)[0]


def explain(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What :func:`resolve` returns, and the reason."""
    if _selected == "eager":
        return "eager", 'backend "eager" is selected'
    if dtype not in TRITON_DTYPES:
        obstacle = f"the Triton kernels take float32, bfloat16 and float16, got {dtype}"
    elif not has_triton():
        obstacle = "triton is not installed"
    elif device.type == "cuda" or (device.type == "cpu" and _selected == "triton" and interpreting()):
        return "triton", "on a GPU" if device.type == "cuda" else "in Triton's interpreter"
    elif _selected == "triton":
        obstacle = (
            f"the tensors are on {device.type}; CPU tensors need Triton's interpreter "
            "(set TRITON_INTERPRET=1 before the first use)"
        )
    else:
        obstacle = f"the tensors are on {device.type}"
    if _selected == "triton":
        raise RuntimeError(f'backend "triton" was asked for, but {obstacle}')
    return "eager", obstacle


# Asked once, since torch.compile does not trace the question before torch 2.10.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that ``torch.autocast`` asks of operators on this device; None where it is off."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
