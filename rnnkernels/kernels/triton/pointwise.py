"""Pointwise mathematics that the kernels share, in float32."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) can't overflow, but cancels near zero, where the series is exact to float32.
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -magnitude, magnitude))


@triton.jit
def activate(x, NONLINEARITY: tl.constexpr):
    """$f(x)$. NaN stays NaN."""
    if NONLINEARITY == "tanh":
        return tanh(x)
    elif NONLINEARITY == "sigmoid":
        return sigmoid(x)
    elif NONLINEARITY == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    else:
        return x


@triton.jit
def through_activation(gradient, y, NONLINEARITY: tl.constexpr):
    """The gradient of $a$ from that of $y = f(a)$, by $f'$ as a function of $y$."""
    if NONLINEARITY == "tanh":
        return gradient * (1.0 - y * y)
    elif NONLINEARITY == "sigmoid":
        return gradient * y * (1.0 - y)
    elif NONLINEARITY == "relu":
        return tl.where(y <= 0.0, 0.0, gradient)
    else:
        return gradient


@triton.jit
def load_either(first, initial, others, mask):
    """What ``initial`` points to where ``first``, and what ``others`` point to elsewhere; zero out of the mask.

    Two loads, of which one is off: on AMD's GPUs Triton can't compile a choice between pointers.
    """
    at_first = tl.load(initial, mask=mask & first, other=0.0)
    return tl.where(first, at_first, tl.load(others, mask=mask & (first == 0), other=0.0))


@triton.jit
def clip(x, bound):
    """``x``, between -bound and bound where there is one. NaN stays NaN."""
    if bound is None:
        return x
    else:
        return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
