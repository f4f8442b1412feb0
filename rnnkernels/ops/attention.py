"""Attention, whose every step looks at all steps before it."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from rnnkernels import reference
from rnnkernels._backend import autocast_dtype, resolve
from rnnkernels.ops._checks import check_tensor
from rnnkernels.ops._sequence import differentiable_gradients, kernels, transformed

MAX_HEAD_DIM = 128
"""Of the Triton kernels: beyond it they run out of registers."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    r"""Scaled dot-product attention: causal, unless told otherwise.

    .. math:: y_t = \sum_{s \le t} \frac{\exp(q_t^\top k_s / \sqrt d)}{\sum_{r \le t} \exp(q_t^\top k_r / \sqrt d)} v_s

    The matrix of weights is never stored. On a GPU a Triton kernel computes it tile by tile with an online softmax
    [1]_, made to be read: :class:`rnnkernels.Transformer` calls PyTorch's
    :func:`~torch.nn.functional.scaled_dot_product_attention` instead, which is what runs here, too, on a CPU and where
    ``head_dim`` exceeds 128. Products follow ``torch.get_float32_matmul_precision()``; sums are float32 or better, and
    the same call gives the same bits each time.

    Differentiable in all three tensors; twice on a GPU, and wherever PyTorch's function is.

    Parameters
    ----------
    query : Tensor, shape (batch, heads, query_length, head_dim)
        $q_t$. float64, float32, bfloat16 or float16.
    key, value : Tensor, shape (batch, heads, key_length, head_dim)
        $k_s$ and $v_s$. Type and device as ``query``.
    is_causal : bool
        Whether a query sees only the keys up to its own. The last query stands at the last key, so that new queries
        go with the keys of a whole past; there must be at least as many keys as queries. Default: True.
    scale : float, optional
        Default: $1 / \sqrt d$, where $d$ is ``head_dim``.

    Returns
    -------
    Tensor, shape of ``query``

    Raises
    ------
    TypeError
        If an argument is not a tensor, or not of the type of ``query``.
    ValueError
        If a shape or a device does not fit.
    RuntimeError
        If ``use_backend("triton")`` holds and Triton can't run on these tensors.

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.1.

    .. [1] Dao, Fu, Ermon, Rudra and Ré, "FlashAttention", NeurIPS 2022, section 3.1.

    Examples
    --------
    >>> query, key, value = torch.randn(3, 2, 4, 10, 8).unbind(0)
    >>> output = attention(query, key, value)
    >>> output.shape, torch.allclose(output[:, :, 0], value[:, :, 0])  # the first step sees itself alone
    (torch.Size([2, 4, 10, 8]), True)
    """
    dtype = autocast_dtype(query.device) if isinstance(query, Tensor) else None
    if dtype is not None:
        query, key, value = (t.to(dtype) if isinstance(t, Tensor) else t for t in (query, key, value))
    check_tensor("query", query, ("batch", "heads", "query_length", "head_dim"))
    batch, heads, query_length, head_dim = query.shape
    check_tensor("key", key, (batch, heads, "key_length", head_dim), like=query, of="query")
    check_tensor("value", value, tuple(key.shape), like=query, of="query")
    key_length = key.shape[2]
    if key_length == 0 or (is_causal and key_length < query_length):
        least = max(1, query_length if is_causal else 1)
        raise ValueError(f"key: expected at least {least} steps, got {key_length}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if transformed():
        return reference.attention(query, key, value, is_causal=is_causal, scale=scale)
    backend = resolve(query.device, query.dtype)
    if backend == "eager" or head_dim > MAX_HEAD_DIM:
        return native(query, key, value, is_causal, scale)
    return torch.ops.rnnkernels.attention(query, key, value, is_causal, scale)[0]


def native(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = True, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """PyTorch's own, whose causal mask puts the first query at the first key: asked only where that is the same."""
    attend = functools.partial(functional.scaled_dot_product_attention, dropout_p=dropout)
    query_length, key_length = query.shape[2], key.shape[2]
    if not is_causal or query_length == 1:
        return attend(query, key, value, scale=scale)
    if query_length == key_length:
        return attend(query, key, value, is_causal=True, scale=scale)
    visible = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
    return attend(query, key, value, attn_mask=visible.tril(key_length - query_length), scale=scale)


@torch.library.custom_op("rnnkernels::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the scores, by Triton."""
    with torch.cuda.device_of(query):
        return kernels("triton", "attention").forward(query, key, value, is_causal, scale)


@_attention.register_fake
def _(query, key, value, is_causal, scale):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("rnnkernels::attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    with torch.cuda.device_of(query):
        return kernels("triton", "attention").backward(
            grad_output, output, logsumexp, query, key, value, is_causal, scale
        )


@_attention_backward.register_fake
def _(grad_output, output, logsumexp, query, key, value, is_causal, scale):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_output, _):
    query, key, value, output, logsumexp = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        tensors = (query, key, value)
        result = reference.attention(*tensors, is_causal=ctx.is_causal, scale=ctx.scale)
        gradients = differentiable_gradients((result,), tensors, needs, (grad_output,))
    else:
        gradients = torch.ops.rnnkernels.attention_backward(
            grad_output, output, logsumexp, query, key, value, ctx.is_causal, ctx.scale
        )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
