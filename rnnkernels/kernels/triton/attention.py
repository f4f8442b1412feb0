"""Attention on a GPU without its matrix of weights: a tile of scores at a time, with an online softmax.

Forward, a program holds a tile of queries and passes over the keys. The softmax of a row needs its maximum and its sum;
both are kept up to date, and what has been summed is rescaled when the maximum grows (Milakov and Gimelshein,
arXiv:1805.02867; Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1). Of the softmax only the logarithm of that
sum is kept for the backward pass, which computes the scores again: one kernel passes over the queries for a tile of
keys, one over the keys for a tile of queries, so that no sum is split among programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkernels.kernels.triton.dispatch import input_precision

RUNTIME = ("query_length", "key_length")
"""Arguments on whose value no kernel is specialized: a new length compiles nothing."""

TILES = {
    # (bytes an element, head_dim rounded up): (queries, keys, warps)
    (2, 16): (64, 64, 4),
    (2, 32): (64, 64, 4),
    (2, 64): (64, 32, 4),
    (2, 128): (64, 32, 8),
    (4, 16): (32, 32, 4),
    (4, 32): (32, 32, 8),
    (4, 64): (32, 32, 8),
    (4, 128): (16, 16, 8),
}
"""Tiles of scores, the same forward and backward: the largest that do not spill registers for an A100. Not timed on a
GPU yet."""


@triton.jit
def load_rows(tensor, which, rows, length, head_dim, BLOCK_HEAD: tl.constexpr):
    """Rows of one head's matrix of shape (length, head_dim), zero outside of it."""
    inner = tl.arange(0, BLOCK_HEAD)
    offsets = (which * length + rows)[:, None] * head_dim + inner[None, :]
    return tl.load(tensor + offsets, mask=(rows < length)[:, None] & (inner < head_dim)[None, :], other=0.0)


@triton.jit
def store_rows(tensor, value, which, rows, length, head_dim, BLOCK_HEAD: tl.constexpr):
    inner = tl.arange(0, BLOCK_HEAD)
    offsets = (which * length + rows)[:, None] * head_dim + inner[None, :]
    tl.store(tensor + offsets, value, mask=(rows < length)[:, None] & (inner < head_dim)[None, :])


@triton.jit
def masked_scores(q, k, rows, columns, query_length, key_length, scale, IS_CAUSAL: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Scaled products of queries and keys, minus infinity where a query may not look."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
    visible = (columns < key_length)[None, :]
    if IS_CAUSAL:  # the last query stands at the last key
        visible = visible & (columns[None, :] <= (rows + (key_length - query_length))[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=RUNTIME)
def attend(
    query,
    key,
    value,
    output,
    logsumexp,
    scale,
    query_length,
    key_length,
    head_dim,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_QUERY
    rows = first + tl.arange(0, BLOCK_QUERY)
    q = load_rows(query, which, rows, query_length, head_dim, BLOCK_HEAD)
    largest = tl.full((BLOCK_QUERY,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERY,), dtype=tl.float32)
    summed = tl.zeros((BLOCK_QUERY, BLOCK_HEAD), dtype=tl.float32)
    end = key_length
    if IS_CAUSAL:
        end = tl.minimum(end, first + BLOCK_QUERY + key_length - query_length)
    for start in range(0, end, BLOCK_KEY):
        columns = start + tl.arange(0, BLOCK_KEY)
        k = load_rows(key, which, columns, key_length, head_dim, BLOCK_HEAD)
        v = load_rows(value, which, columns, key_length, head_dim, BLOCK_HEAD)
        scores = masked_scores(q, k, rows, columns, query_length, key_length, scale, IS_CAUSAL, PRECISION)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        rescale = tl.exp(largest - larger)
        total = total * rescale + tl.sum(weights, 1)
        summed = tl.dot(weights.to(v.dtype), v, acc=summed * rescale[:, None], input_precision=PRECISION)
        largest = larger
    store_rows(output, summed / total[:, None], which, rows, query_length, head_dim, BLOCK_HEAD)
    tl.store(logsumexp + which * query_length + rows, largest + tl.log(total), mask=rows < query_length)


@triton.jit(do_not_specialize=RUNTIME)
def gradients_of_keys(
    grad_output,
    query,
    key,
    value,
    logsumexp,
    dots,
    grad_key,
    grad_value,
    scale,
    query_length,
    key_length,
    head_dim,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
):
    """``dots`` holds the products of each row of the output with its gradient."""
    which = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    k = load_rows(key, which, columns, key_length, head_dim, BLOCK_HEAD)
    v = load_rows(value, which, columns, key_length, head_dim, BLOCK_HEAD)
    from_scores = tl.zeros((BLOCK_KEY, BLOCK_HEAD), dtype=tl.float32)
    from_output = tl.zeros((BLOCK_KEY, BLOCK_HEAD), dtype=tl.float32)
    begin = 0
    if IS_CAUSAL:
        begin = tl.maximum(0, tl.program_id(0) * BLOCK_KEY - (key_length - query_length)) // BLOCK_QUERY * BLOCK_QUERY
    for start in range(begin, query_length, BLOCK_QUERY):
        rows = start + tl.arange(0, BLOCK_QUERY)
        q = load_rows(query, which, rows, query_length, head_dim, BLOCK_HEAD)
        outer = load_rows(grad_output, which, rows, query_length, head_dim, BLOCK_HEAD)
        log_total = tl.load(logsumexp + which * query_length + rows, mask=rows < query_length, other=float("inf"))
        dot = tl.load(dots + which * query_length + rows, mask=rows < query_length, other=0.0)
        scores = masked_scores(q, k, rows, columns, query_length, key_length, scale, IS_CAUSAL, PRECISION)
        weights = tl.exp(scores - log_total[:, None])
        from_output = tl.dot(weights.to(outer.dtype).T, outer, acc=from_output, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(outer, v.T, input_precision=PRECISION) - dot[:, None]) * scale
        from_scores = tl.dot(grad_scores.to(q.dtype).T, q, acc=from_scores, input_precision=PRECISION)
    store_rows(grad_key, from_scores, which, columns, key_length, head_dim, BLOCK_HEAD)
    store_rows(grad_value, from_output, which, columns, key_length, head_dim, BLOCK_HEAD)


@triton.jit(do_not_specialize=RUNTIME)
def gradients_of_queries(
    grad_output,
    query,
    key,
    value,
    logsumexp,
    dots,
    grad_query,
    scale,
    query_length,
    key_length,
    head_dim,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_QUERY
    rows = first + tl.arange(0, BLOCK_QUERY)
    q = load_rows(query, which, rows, query_length, head_dim, BLOCK_HEAD)
    outer = load_rows(grad_output, which, rows, query_length, head_dim, BLOCK_HEAD)
    log_total = tl.load(logsumexp + which * query_length + rows, mask=rows < query_length, other=float("inf"))
    dot = tl.load(dots + which * query_length + rows, mask=rows < query_length, other=0.0)
    gradient = tl.zeros((BLOCK_QUERY, BLOCK_HEAD), dtype=tl.float32)
    end = key_length
    if IS_CAUSAL:
        end = tl.minimum(end, first + BLOCK_QUERY + key_length - query_length)
    for start in range(0, end, BLOCK_KEY):
        columns = start + tl.arange(0, BLOCK_KEY)
        k = load_rows(key, which, columns, key_length, head_dim, BLOCK_HEAD)
        v = load_rows(value, which, columns, key_length, head_dim, BLOCK_HEAD)
        scores = masked_scores(q, k, rows, columns, query_length, key_length, scale, IS_CAUSAL, PRECISION)
        weights = tl.exp(scores - log_total[:, None])
        grad_scores = weights * (tl.dot(outer, v.T, input_precision=PRECISION) - dot[:, None]) * scale
        gradient = tl.dot(grad_scores.to(k.dtype), k, acc=gradient, input_precision=PRECISION)
    store_rows(grad_query, gradient, which, rows, query_length, head_dim, BLOCK_HEAD)


def _constants(query: Tensor, is_causal: bool) -> dict[str, object]:
    block_head = max(16, triton.next_power_of_2(query.shape[-1]))
    block_query, block_key, num_warps = TILES[query.element_size(), block_head]
    return {
        "IS_CAUSAL": is_causal,
        "PRECISION": input_precision(query.dtype),
        "BLOCK_QUERY": block_query,
        "BLOCK_KEY": block_key,
        "BLOCK_HEAD": block_head,
        "num_warps": num_warps,
    }


def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and the logarithm of the softmax's denominator in float32, of shape (batch, heads, query_length)."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, query_length, head_dim = query.shape
    output = torch.empty_like(query)
    logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return output, logsumexp
    constants = _constants(query, is_causal)
    grid = triton.cdiv(query_length, constants["BLOCK_QUERY"]), batch * heads
    attend[grid](query, key, value, output, logsumexp, scale, query_length, key.shape[2], head_dim, **constants)
    return output, logsumexp


def backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grad_output, query, key, value = (tensor.contiguous() for tensor in (grad_output, query, key, value))
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if query.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    batch, heads, query_length, head_dim = query.shape
    key_length = key.shape[2]
    dots = (output.float() * grad_output.float()).sum(-1)
    constants = _constants(query, is_causal)
    tensors, sizes = (grad_output, query, key, value, logsumexp, dots), (scale, query_length, key_length, head_dim)
    grid = triton.cdiv(key_length, constants["BLOCK_KEY"]), batch * heads
    gradients_of_keys[grid](*tensors, grad_key, grad_value, *sizes, **constants)
    grid = triton.cdiv(query_length, constants["BLOCK_QUERY"]), batch * heads
    gradients_of_queries[grid](*tensors, grad_query, *sizes, **constants)
    return grad_query, grad_key, grad_value
