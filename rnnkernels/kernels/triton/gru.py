"""The gated recurrent unit's recurrence on a GPU, in the two designs of ``rnnkernels.kernels.triton.rnn``.

``gates`` is the buffer that ``rnnkernels.kernels.eager.gru`` describes: W_hn h + b_hn, r, z, n side by side.
The weights come as three square matrices, for r, z and n, padded with zeros to a multiple of 16 rows and columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from rnnkernels.kernels.triton.dispatch import Resident, choose, input_precision
from rnnkernels.kernels.triton.pointwise import clip, sigmoid, tanh
from rnnkernels.kernels.triton.rnn import RUNTIME


@triton.jit
def new_state(z, n, previous):
    return n + z * (previous - n)


@triton.jit
def through_state(grad_state, z, n, previous, bound):
    """From the gradient of the state: those of z and n before their activations, between -bound and bound."""
    grad_z = clip(grad_state * (previous - n) * z * (1.0 - z), bound)
    return grad_z, clip(grad_state * (1.0 - z) * (1.0 - n * n), bound)


@triton.jit
def through_reset(gradient, factor, r, bound):
    """From the gradient of r * factor: that of r before its activation."""
    return clip(gradient * factor * r * (1.0 - r), bound)


@triton.jit
def gate_gradients(grad_state, hn, r, z, n, previous, bound):
    """Gradients of the four parts before their activations, from that of the state."""
    grad_z, grad_n = through_state(grad_state, z, n, previous, bound)
    return grad_n * r, through_reset(grad_n, hn, r, bound), grad_z, grad_n


@triton.jit(do_not_specialize=RUNTIME)
def forward_resident(
    gates,
    h_0,
    weight_hh,
    bias_n,
    lengths,
    output,
    h_n,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    parts = gates + row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    weights = weight_hh + columns[:, None] * weight_size + columns[None, :]
    matrix = weight_size * weight_size
    # Transposed: row k, column n holds the weight from unit k to unit n.
    weight_r = tl.load(weights, mask=square, other=0.0).T
    weight_z = tl.load(weights + matrix, mask=square, other=0.0).T
    weight_n = tl.load(weights + 2 * matrix, mask=square, other=0.0).T
    bias = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_n + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    h = tl.load(h_0 + tile, mask=mask, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    stride = tl.cast(batch, tl.int64) * hidden_size
    states = output + tile
    if REVERSE:
        states += (sequence_length - 1) * stride
        parts += (sequence_length - 1) * stride * 4
        stride = -stride
    r_ahead = tl.load(parts + hidden_size, mask=mask, other=0.0)
    z_ahead = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0)
    n_ahead = tl.load(parts + 3 * hidden_size, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    for step in range(sequence_length):
        projected_r, projected_z, projected_n = r_ahead, z_ahead, n_ahead
        # Asked for a step ahead, so that the memory answers during the products.
        more = mask & (zero < sequence_length - 1 - step)
        following = parts + stride * 4
        r_ahead = tl.load(following + hidden_size, mask=more, other=0.0)
        z_ahead = tl.load(following + 2 * hidden_size, mask=more, other=0.0)
        n_ahead = tl.load(following + 3 * hidden_size, mask=more, other=0.0)
        r = sigmoid(tl.dot(h, weight_r, acc=projected_r.to(tl.float32), input_precision=PRECISION))
        z = sigmoid(tl.dot(h, weight_z, acc=projected_z.to(tl.float32), input_precision=PRECISION))
        hn = tl.dot(h, weight_n, acc=bias, input_precision=PRECISION)
        n = tanh(projected_n.to(tl.float32) + r * hn)
        new = new_state(z, n, h.to(tl.float32)).to(h.dtype)
        tl.store(parts, hn, mask=mask)
        tl.store(parts + hidden_size, r, mask=mask)
        tl.store(parts + 2 * hidden_size, z, mask=mask)
        tl.store(parts + 3 * hidden_size, n, mask=mask)
        if HAS_LENGTHS:
            if REVERSE:
                active = sequence_length - 1 - step < length
            else:
                active = step < length
            h = tl.where(active, new, h)
            tl.store(states, tl.where(active, new, 0.0), mask=mask)
        else:
            h = new
            tl.store(states, new, mask=mask)
        states += stride
        parts = following
    tl.store(h_n + tile, h, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_resident(
    grad_output,
    grad_h_n,
    output,
    gates,
    h_0,
    weight_hh,
    lengths,
    grad_gates,
    grad_h_0,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    part = row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    weights = weight_hh + columns[:, None] * weight_size + columns[None, :]
    matrix = weight_size * weight_size
    weight_r = tl.load(weights, mask=square, other=0.0)
    weight_z = tl.load(weights + matrix, mask=square, other=0.0)
    weight_n = tl.load(weights + 2 * matrix, mask=square, other=0.0)
    carried = tl.load(grad_h_n + tile, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    # The steps run against the order of the forward pass.
    stride = tl.cast(batch, tl.int64) * hidden_size
    offset = tile
    if not REVERSE:
        offset += (sequence_length - 1) * stride
        part += (sequence_length - 1) * stride * 4
        stride = -stride
    zero = tl.zeros_like(mask.to(tl.int32))
    for step in range(sequence_length):
        first = zero == sequence_length - 1 - step
        if HAS_LENGTHS:
            if REVERSE:
                active = step < length
                first = zero + step == length - 1
            else:
                active = sequence_length - 1 - step < length
        hn = tl.load(gates + part, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(gates + part + hidden_size, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        outer = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
        source = tl.where(first, h_0 + tile, output + offset + stride)
        previous = tl.load(source, mask=mask & (first | (zero < sequence_length - 1 - step)), other=0.0).to(tl.float32)
        grad_state = carried + outer
        grad_hn, grad_r, grad_z, grad_n = gate_gradients(grad_state, hn, r, z, n, previous, float("inf"))
        if HAS_LENGTHS:
            grad_hn = tl.where(active, grad_hn, 0.0)
            grad_r = tl.where(active, grad_r, 0.0)
            grad_z = tl.where(active, grad_z, 0.0)
            grad_n = tl.where(active, grad_n, 0.0)
        tl.store(grad_gates + part, grad_hn, mask=mask)
        tl.store(grad_gates + part + hidden_size, grad_r, mask=mask)
        tl.store(grad_gates + part + 2 * hidden_size, grad_z, mask=mask)
        tl.store(grad_gates + part + 3 * hidden_size, grad_n, mask=mask)
        onward = tl.dot(grad_r.to(weight_r.dtype), weight_r, acc=grad_state * z, input_precision=PRECISION)
        onward = tl.dot(grad_z.to(weight_z.dtype), weight_z, acc=onward, input_precision=PRECISION)
        onward = tl.dot(grad_hn.to(weight_n.dtype), weight_n, acc=onward, input_precision=PRECISION)
        if HAS_LENGTHS:
            carried = tl.where(active, onward, carried)
        else:
            carried = onward
        offset += stride
        part += stride * 4
    tl.store(grad_h_0 + tile, carried, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def forward_step(
    gates,
    previous,
    weight_hh,
    bias_n,
    lengths,
    states,
    following,
    time,
    batch,
    hidden_size,
    weight_size,
    HAS_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step: ``gates`` holds the projected input of this step; ``states`` receives its states.

    With lengths, ``following`` receives the state to go on from, which stands still where a sequence has ended.
    """
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    row_mask = rows < batch
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    parts = gates + row_offset * 4 + columns[None, :]
    weights = weight_hh + columns.to(tl.int64)[None, :] * weight_size
    matrix = tl.cast(weight_size, tl.int64) * weight_size
    r = tl.load(parts + hidden_size, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    hn = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    if HAS_BIAS:
        hn += tl.load(bias_n + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    for start in range(0, hidden_size, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        h = tl.load(previous + row_offset + k[None, :], mask=row_mask[:, None] & (k < hidden_size)[None, :], other=0.0)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weights + k[:, None]
        r = tl.dot(h, tl.load(w, mask=within, other=0.0), acc=r, input_precision=PRECISION)
        z = tl.dot(h, tl.load(w + matrix, mask=within, other=0.0), acc=z, input_precision=PRECISION)
        hn = tl.dot(h, tl.load(w + 2 * matrix, mask=within, other=0.0), acc=hn, input_precision=PRECISION)
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(tl.load(parts + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32) + r * hn)
    old = tl.load(previous + tile, mask=mask, other=0.0)
    new = new_state(z, n, old.to(tl.float32)).to(old.dtype)
    tl.store(parts, hn, mask=mask)
    tl.store(parts + hidden_size, r, mask=mask)
    tl.store(parts + 2 * hidden_size, z, mask=mask)
    tl.store(parts + 3 * hidden_size, n, mask=mask)
    if HAS_LENGTHS:
        active = time < tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
        tl.store(following + tile, tl.where(active, new, old), mask=mask)
        new = tl.where(active, new, 0.0)
    tl.store(states + tile, new, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_step(
    grad_output,
    gates,
    previous,
    carried,
    weight_hh,
    lengths,
    grad_gates,
    following,
    time,
    batch,
    hidden_size,
    weight_size,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step back: from ``carried``, the float32 gradient of this step's state from later ones, to ``following``."""
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    row_mask = rows < batch
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    matrix = tl.cast(weight_size, tl.int64) * weight_size
    if HAS_LENGTHS:
        active = time < tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
    product = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        tile = row_offset + k[None, :]
        part = row_offset * 4 + k[None, :]
        mask = row_mask[:, None] & (k < hidden_size)[None, :]
        hn = tl.load(gates + part, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(gates + part + hidden_size, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(previous + tile, mask=mask, other=0.0).to(tl.float32)
        grad_state = tl.load(carried + tile, mask=mask, other=0.0)
        grad_state += tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)
        grad_hn, grad_r, grad_z, grad_n = gate_gradients(grad_state, hn, r, z, n, h, float("inf"))
        if HAS_LENGTHS:
            grad_hn = tl.where(active, grad_hn, 0.0)
            grad_r = tl.where(active, grad_r, 0.0)
            grad_z = tl.where(active, grad_z, 0.0)
            grad_n = tl.where(active, grad_n, 0.0)
        if tl.program_id(1) == 0:
            tl.store(grad_gates + part, grad_hn, mask=mask)
            tl.store(grad_gates + part + hidden_size, grad_r, mask=mask)
            tl.store(grad_gates + part + 2 * hidden_size, grad_z, mask=mask)
            tl.store(grad_gates + part + 3 * hidden_size, grad_n, mask=mask)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weight_hh + k.to(tl.int64)[:, None] * weight_size + columns[None, :]
        kind = weight_hh.dtype.element_ty
        weight_r = tl.load(w, mask=within, other=0.0)
        product = tl.dot(grad_r.to(kind), weight_r, acc=product, input_precision=PRECISION)
        weight_z = tl.load(w + matrix, mask=within, other=0.0)
        product = tl.dot(grad_z.to(kind), weight_z, acc=product, input_precision=PRECISION)
        weight_n = tl.load(w + 2 * matrix, mask=within, other=0.0)
        product = tl.dot(grad_hn.to(kind), weight_n, acc=product, input_precision=PRECISION)
    tile = row_offset + columns[None, :]
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    old = tl.load(carried + tile, mask=mask, other=0.0)
    z = tl.load(gates + row_offset * 4 + 2 * hidden_size + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    onward = (old + tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)) * z + product
    if HAS_LENGTHS:
        onward = tl.where(active, onward, old)
    tl.store(following + tile, onward, mask=mask)


def _squares(weight_hh: Tensor) -> Tensor:
    """The weights as (3, size, size), with zeros up to a multiple of 16."""
    hidden_size = weight_hh.shape[1]
    missing = -hidden_size % 16
    return functional.pad(weight_hh.view(3, hidden_size, hidden_size), (0, missing, 0, missing)).contiguous()


def forward(
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place; return the states and the final state."""
    sequence_length, batch, width = gates.shape
    hidden_size = width // 4
    output = gates.new_empty(sequence_length, batch, hidden_size)
    if output.numel() == 0:
        return output, h_0.clone()
    h_0, weights = h_0.contiguous(), _squares(weight_hh.contiguous())
    bias_n = None if bias_hh is None else bias_hh[2 * hidden_size :].contiguous()
    sizes = batch, hidden_size, weights.shape[-1]
    design = choose("gru", hidden_size, batch, gates.dtype, gates.device)
    options = {
        "HAS_LENGTHS": lengths is not None,
        "HAS_BIAS": bias_n is not None,
        "PRECISION": input_precision(gates.dtype),
        **design.constants(),
    }
    grid = design.grid(batch, hidden_size)
    if isinstance(design, Resident):
        h_n = torch.empty_like(h_0)
        forward_resident[grid](
            gates, h_0, weights, bias_n, lengths, output, h_n, sequence_length, *sizes, REVERSE=reverse, **options
        )
        return output, h_n
    previous, spare = h_0, None
    if lengths is not None:
        spare = [torch.empty_like(h_0), torch.empty_like(h_0)]
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        following = output[t] if spare is None else spare[t % 2]
        forward_step[grid](gates[t], previous, weights, bias_n, lengths, output[t], following, t, *sizes, **options)
        previous = following
    return output, previous.clone()


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the four parts of ``gates`` before their activations, and of the initial state."""
    sequence_length, batch, hidden_size = output.shape
    grad_gates = torch.empty_like(gates)
    if output.numel() == 0:
        return grad_gates, grad_h_n.clone()
    grad_output, grad_h_n, h_0 = grad_output.contiguous(), grad_h_n.contiguous(), h_0.contiguous()
    weights = _squares(weight_hh.contiguous())
    sizes = batch, hidden_size, weights.shape[-1]
    design = choose("gru", hidden_size, batch, output.dtype, output.device)
    options = {"HAS_LENGTHS": lengths is not None, "PRECISION": input_precision(output.dtype), **design.constants()}
    grid = design.grid(batch, hidden_size)
    if isinstance(design, Resident):
        grad_h_0 = torch.empty_like(grad_h_n)
        backward_resident[grid](
            grad_output,
            grad_h_n,
            output,
            gates,
            h_0,
            weights,
            lengths,
            grad_gates,
            grad_h_0,
            sequence_length,
            *sizes,
            REVERSE=reverse,
            **options,
        )
        return grad_gates, grad_h_0
    before = output
    if reverse and lengths is not None:
        # The state before a sequence's last step is its initial state, where the output has padding.
        before = torch.cat([output, torch.empty_like(output[:1])])
        before[lengths, torch.arange(batch, device=lengths.device)] = h_0
    carried, following = grad_h_n.float().clone(), torch.empty_like(grad_h_n, dtype=torch.float32)
    for t in range(sequence_length) if reverse else reversed(range(sequence_length)):
        earlier = t + 1 if reverse else t - 1
        previous = before[earlier] if 0 <= earlier < len(before) else h_0
        backward_step[grid](
            grad_output[t],
            gates[t],
            previous,
            carried,
            weights,
            lengths,
            grad_gates[t],
            following,
            t,
            *sizes,
            **options,
        )
        carried, following = following, carried
    return grad_gates, carried.to(output.dtype)
