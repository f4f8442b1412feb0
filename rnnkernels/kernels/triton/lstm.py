"""The LSTM's recurrence on a GPU, in the two designs of ``rnnkernels.kernels.triton.rnn``.

``gates`` holds i, f, g, o side by side. ``cells`` holds the cell state after every step; in padding the one that stands
still, so that the state before a step is always its neighbour. The weights come as four square matrices, padded with
zeros to a multiple of 16 rows and columns.
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
def cell_state(i, f, g, c):
    return f * c + i * g


@triton.jit
def through_output(grad_hidden, o, squashed, bound):
    """From the gradient of o * squashed: those of o before its activation, and of what tanh squashed."""
    return clip(grad_hidden * squashed * o * (1.0 - o), bound), grad_hidden * o * (1.0 - squashed * squashed)


@triton.jit
def through_cell_state(grad_cell, i, f, g, previous, bound):
    """From the gradient of the new cell state: those of i, f, g before their activations."""
    grad_i = clip(grad_cell * g * i * (1.0 - i), bound)
    grad_f = clip(grad_cell * previous * f * (1.0 - f), bound)
    return grad_i, grad_f, clip(grad_cell * i * (1.0 - g * g), bound)


@triton.jit
def gate_gradients(grad_hidden, grad_cell, i, f, g, o, previous, c):
    """Gradients of the four gates before their activations, and of the cell state before the step."""
    grad_o, through_tanh = through_output(grad_hidden, o, tanh(c), float("inf"))
    grad_cell += through_tanh
    grad_i, grad_f, grad_g = through_cell_state(grad_cell, i, f, g, previous, float("inf"))
    return grad_i, grad_f, grad_g, grad_o, grad_cell * f


@triton.jit(do_not_specialize=RUNTIME)
def forward_resident(
    gates,
    h_0,
    c_0,
    weight_hh,
    lengths,
    output,
    cells,
    h_n,
    c_n,
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
    parts = gates + row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    weights = weight_hh + columns[:, None] * weight_size + columns[None, :]
    matrix = weight_size * weight_size
    # Transposed: row k, column n holds the weight from unit k to unit n.
    weight_i = tl.load(weights, mask=square, other=0.0).T
    weight_f = tl.load(weights + matrix, mask=square, other=0.0).T
    weight_g = tl.load(weights + 2 * matrix, mask=square, other=0.0).T
    weight_o = tl.load(weights + 3 * matrix, mask=square, other=0.0).T
    h = tl.load(h_0 + tile, mask=mask, other=0.0)
    c = tl.load(c_0 + tile, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    stride = tl.cast(batch, tl.int64) * hidden_size
    offset = tile
    if REVERSE:
        offset += (sequence_length - 1) * stride
        parts += (sequence_length - 1) * stride * 4
        stride = -stride
    i_ahead = tl.load(parts, mask=mask, other=0.0)
    f_ahead = tl.load(parts + hidden_size, mask=mask, other=0.0)
    g_ahead = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0)
    o_ahead = tl.load(parts + 3 * hidden_size, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    for step in range(sequence_length):
        projected_i, projected_f, projected_g, projected_o = i_ahead, f_ahead, g_ahead, o_ahead
        # Asked for a step ahead, so that the memory answers during the products.
        more = mask & (zero < sequence_length - 1 - step)
        following = parts + stride * 4
        i_ahead = tl.load(following, mask=more, other=0.0)
        f_ahead = tl.load(following + hidden_size, mask=more, other=0.0)
        g_ahead = tl.load(following + 2 * hidden_size, mask=more, other=0.0)
        o_ahead = tl.load(following + 3 * hidden_size, mask=more, other=0.0)
        i = sigmoid(tl.dot(h, weight_i, acc=projected_i.to(tl.float32), input_precision=PRECISION))
        f = sigmoid(tl.dot(h, weight_f, acc=projected_f.to(tl.float32), input_precision=PRECISION))
        g = tanh(tl.dot(h, weight_g, acc=projected_g.to(tl.float32), input_precision=PRECISION))
        o = sigmoid(tl.dot(h, weight_o, acc=projected_o.to(tl.float32), input_precision=PRECISION))
        new_c = cell_state(i, f, g, c)
        new = (o * tanh(new_c)).to(h.dtype)
        tl.store(parts, i, mask=mask)
        tl.store(parts + hidden_size, f, mask=mask)
        tl.store(parts + 2 * hidden_size, g, mask=mask)
        tl.store(parts + 3 * hidden_size, o, mask=mask)
        if HAS_LENGTHS:
            if REVERSE:
                active = sequence_length - 1 - step < length
            else:
                active = step < length
            h = tl.where(active, new, h)
            c = tl.where(active, new_c, c)
            tl.store(output + offset, tl.where(active, new, 0.0), mask=mask)
        else:
            h = new
            c = new_c
            tl.store(output + offset, new, mask=mask)
        tl.store(cells + offset, c, mask=mask)
        offset += stride
        parts = following
    tl.store(h_n + tile, h, mask=mask)
    tl.store(c_n + tile, c, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_resident(
    grad_output,
    grad_h_n,
    grad_c_n,
    gates,
    cells,
    c_0,
    weight_hh,
    lengths,
    grad_gates,
    grad_h_0,
    grad_c_0,
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
    weight_i = tl.load(weights, mask=square, other=0.0)
    weight_f = tl.load(weights + matrix, mask=square, other=0.0)
    weight_g = tl.load(weights + 2 * matrix, mask=square, other=0.0)
    weight_o = tl.load(weights + 3 * matrix, mask=square, other=0.0)
    carried_h = tl.load(grad_h_n + tile, mask=mask, other=0.0).to(tl.float32)
    carried_c = tl.load(grad_c_n + tile, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    # The steps run against the order of the forward pass.
    stride = tl.cast(batch, tl.int64) * hidden_size
    offset = tile
    if not REVERSE:
        offset += (sequence_length - 1) * stride
        part += (sequence_length - 1) * stride * 4
        stride = -stride
    c = tl.load(cells + offset, mask=mask, other=0.0)
    i_ahead = tl.load(gates + part, mask=mask, other=0.0)
    f_ahead = tl.load(gates + part + hidden_size, mask=mask, other=0.0)
    g_ahead = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0)
    o_ahead = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0)
    outer_ahead = tl.load(grad_output + offset, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    source = tl.where(zero < sequence_length - 1, cells + offset + stride, c_0 + tile)
    previous_ahead = tl.load(source, mask=mask, other=0.0)
    for step in range(sequence_length):
        i, f, g, o = i_ahead.to(tl.float32), f_ahead.to(tl.float32), g_ahead.to(tl.float32), o_ahead.to(tl.float32)
        outer, previous = outer_ahead.to(tl.float32), previous_ahead
        # Asked for a step ahead, so that the memory answers during the products.
        more = mask & (zero < sequence_length - 1 - step)
        following = gates + part + stride * 4
        i_ahead = tl.load(following, mask=more, other=0.0)
        f_ahead = tl.load(following + hidden_size, mask=more, other=0.0)
        g_ahead = tl.load(following + 2 * hidden_size, mask=more, other=0.0)
        o_ahead = tl.load(following + 3 * hidden_size, mask=more, other=0.0)
        outer_ahead = tl.load(grad_output + offset + stride, mask=more, other=0.0)
        source = tl.where(zero < sequence_length - 2 - step, cells + offset + 2 * stride, c_0 + tile)
        previous_ahead = tl.load(source, mask=more, other=0.0)
        grad_i, grad_f, grad_g, grad_o, onward_c = gate_gradients(carried_h + outer, carried_c, i, f, g, o, previous, c)
        if HAS_LENGTHS:
            if REVERSE:
                active = step < length
            else:
                active = sequence_length - 1 - step < length
            grad_i = tl.where(active, grad_i, 0.0)
            grad_f = tl.where(active, grad_f, 0.0)
            grad_g = tl.where(active, grad_g, 0.0)
            grad_o = tl.where(active, grad_o, 0.0)
        tl.store(grad_gates + part, grad_i, mask=mask)
        tl.store(grad_gates + part + hidden_size, grad_f, mask=mask)
        tl.store(grad_gates + part + 2 * hidden_size, grad_g, mask=mask)
        tl.store(grad_gates + part + 3 * hidden_size, grad_o, mask=mask)
        onward = tl.dot(grad_i.to(weight_i.dtype), weight_i, input_precision=PRECISION)
        onward = tl.dot(grad_f.to(weight_f.dtype), weight_f, acc=onward, input_precision=PRECISION)
        onward = tl.dot(grad_g.to(weight_g.dtype), weight_g, acc=onward, input_precision=PRECISION)
        onward = tl.dot(grad_o.to(weight_o.dtype), weight_o, acc=onward, input_precision=PRECISION)
        if HAS_LENGTHS:
            carried_h = tl.where(active, onward, carried_h)
            carried_c = tl.where(active, onward_c, carried_c)
        else:
            carried_h = onward
            carried_c = onward_c
        c = previous
        offset += stride
        part += stride * 4
    tl.store(grad_h_0 + tile, carried_h, mask=mask)
    tl.store(grad_c_0 + tile, carried_c, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def forward_step(
    gates,
    previous,
    previous_cells,
    weight_hh,
    lengths,
    states,
    cells,
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
    """One step: ``gates`` holds the projected input of this step; ``states`` and ``cells`` receive its states.

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
    i = tl.load(parts, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(parts + hidden_size, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(parts + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    for start in range(0, hidden_size, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        h = tl.load(previous + row_offset + k[None, :], mask=row_mask[:, None] & (k < hidden_size)[None, :], other=0.0)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weights + k[:, None]
        i = tl.dot(h, tl.load(w, mask=within, other=0.0), acc=i, input_precision=PRECISION)
        f = tl.dot(h, tl.load(w + matrix, mask=within, other=0.0), acc=f, input_precision=PRECISION)
        g = tl.dot(h, tl.load(w + 2 * matrix, mask=within, other=0.0), acc=g, input_precision=PRECISION)
        o = tl.dot(h, tl.load(w + 3 * matrix, mask=within, other=0.0), acc=o, input_precision=PRECISION)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    old_c = tl.load(previous_cells + tile, mask=mask, other=0.0)
    c = cell_state(i, f, g, old_c)
    new = (o * tanh(c)).to(states.dtype.element_ty)
    tl.store(parts, i, mask=mask)
    tl.store(parts + hidden_size, f, mask=mask)
    tl.store(parts + 2 * hidden_size, g, mask=mask)
    tl.store(parts + 3 * hidden_size, o, mask=mask)
    if HAS_LENGTHS:
        active = time < tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
        tl.store(following + tile, tl.where(active, new, tl.load(previous + tile, mask=mask, other=0.0)), mask=mask)
        c = tl.where(active, c, old_c)
        new = tl.where(active, new, 0.0)
    tl.store(cells + tile, c, mask=mask)
    tl.store(states + tile, new, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_step(
    grad_output,
    gates,
    cells,
    previous_cells,
    carried_h,
    carried_c,
    weight_hh,
    lengths,
    grad_gates,
    following_h,
    following_c,
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
    """One step back: from the float32 gradients of this step's states from later ones to those of the states before."""
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
        i = tl.load(gates + part, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(gates + part + hidden_size, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cells + tile, mask=mask, other=0.0)
        old_c = tl.load(previous_cells + tile, mask=mask, other=0.0)
        grad_h = tl.load(carried_h + tile, mask=mask, other=0.0)
        grad_h += tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)
        grad_c = tl.load(carried_c + tile, mask=mask, other=0.0)
        grad_i, grad_f, grad_g, grad_o, onward_c = gate_gradients(grad_h, grad_c, i, f, g, o, old_c, c)
        if HAS_LENGTHS:
            grad_i = tl.where(active, grad_i, 0.0)
            grad_f = tl.where(active, grad_f, 0.0)
            grad_g = tl.where(active, grad_g, 0.0)
            grad_o = tl.where(active, grad_o, 0.0)
            onward_c = tl.where(active, onward_c, grad_c)
        if tl.program_id(1) == 0:
            tl.store(grad_gates + part, grad_i, mask=mask)
            tl.store(grad_gates + part + hidden_size, grad_f, mask=mask)
            tl.store(grad_gates + part + 2 * hidden_size, grad_g, mask=mask)
            tl.store(grad_gates + part + 3 * hidden_size, grad_o, mask=mask)
            tl.store(following_c + tile, onward_c, mask=mask)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weight_hh + k.to(tl.int64)[:, None] * weight_size + columns[None, :]
        kind = weight_hh.dtype.element_ty
        weight_i = tl.load(w, mask=within, other=0.0)
        product = tl.dot(grad_i.to(kind), weight_i, acc=product, input_precision=PRECISION)
        weight_f = tl.load(w + matrix, mask=within, other=0.0)
        product = tl.dot(grad_f.to(kind), weight_f, acc=product, input_precision=PRECISION)
        weight_g = tl.load(w + 2 * matrix, mask=within, other=0.0)
        product = tl.dot(grad_g.to(kind), weight_g, acc=product, input_precision=PRECISION)
        weight_o = tl.load(w + 3 * matrix, mask=within, other=0.0)
        product = tl.dot(grad_o.to(kind), weight_o, acc=product, input_precision=PRECISION)
    tile = row_offset + columns[None, :]
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    if HAS_LENGTHS:
        product = tl.where(active, product, tl.load(carried_h + tile, mask=mask, other=0.0))
    tl.store(following_h + tile, product, mask=mask)


def _squares(weight_hh: Tensor) -> Tensor:
    """The weights as (4, size, size), with zeros up to a multiple of 16."""
    hidden_size = weight_hh.shape[1]
    missing = -hidden_size % 16
    squares = weight_hh.contiguous().view(4, hidden_size, hidden_size)
    return functional.pad(squares, (0, missing, 0, missing)) if missing else squares


def forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place.

    Returns the states, the final state, the final cell state, and the float32 cell states.
    """
    sequence_length, batch, width = gates.shape
    hidden_size = width // 4
    output = gates.new_empty(sequence_length, batch, hidden_size)
    cells = torch.empty_like(output, dtype=torch.float32)
    if output.numel() == 0:
        return output, h_0.clone(), c_0.clone(), cells
    h_0, c_0, weights = h_0.contiguous(), c_0.contiguous(), _squares(weight_hh)
    sizes = batch, hidden_size, weights.shape[-1]
    design = choose("lstm", hidden_size, batch, gates.dtype, gates.device)
    options = {
        "HAS_LENGTHS": lengths is not None,
        "PRECISION": input_precision(gates.dtype),
        **design.constants(),
    }
    grid = design.grid(batch, hidden_size)
    if isinstance(design, Resident):
        h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
        forward_resident[grid](
            gates,
            h_0,
            c_0,
            weights,
            lengths,
            output,
            cells,
            h_n,
            c_n,
            sequence_length,
            *sizes,
            REVERSE=reverse,
            **options,
        )
        return output, h_n, c_n, cells
    previous, previous_cells, spare = h_0, c_0.float(), None
    if lengths is not None:
        spare = [torch.empty_like(h_0), torch.empty_like(h_0)]
    for t in reversed(range(sequence_length)) if reverse else range(sequence_length):
        following = output[t] if spare is None else spare[t % 2]
        forward_step[grid](
            gates[t],
            previous,
            previous_cells,
            weights,
            lengths,
            output[t],
            cells[t],
            following,
            t,
            *sizes,
            **options,
        )
        previous, previous_cells = following, cells[t]
    return output, previous.clone(), previous_cells.to(c_0.dtype, copy=True), cells


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the four gates before their activations, and of both initial states."""
    sequence_length, batch, hidden_size = output.shape
    grad_gates = torch.empty_like(gates)
    if gates.numel() == 0:
        return grad_gates, grad_h_n.clone(), grad_c_n.clone()
    grad_output, grad_h_n, grad_c_n = grad_output.contiguous(), grad_h_n.contiguous(), grad_c_n.contiguous()
    initial_cells, weights = c_0.contiguous().float(), _squares(weight_hh)
    sizes = batch, hidden_size, weights.shape[-1]
    design = choose("lstm", hidden_size, batch, gates.dtype, gates.device)
    options = {"HAS_LENGTHS": lengths is not None, "PRECISION": input_precision(gates.dtype), **design.constants()}
    grid = design.grid(batch, hidden_size)
    if isinstance(design, Resident):
        grad_h_0, grad_c_0 = torch.empty_like(grad_h_n), torch.empty_like(c_0)
        backward_resident[grid](
            grad_output,
            grad_h_n,
            grad_c_n,
            gates,
            cells,
            initial_cells,
            weights,
            lengths,
            grad_gates,
            grad_h_0,
            grad_c_0,
            sequence_length,
            *sizes,
            REVERSE=reverse,
            **options,
        )
        return grad_gates, grad_h_0, grad_c_0
    carried_h, carried_c = grad_h_n.float().clone(), grad_c_n.float().clone()
    following_h, following_c = torch.empty_like(carried_h), torch.empty_like(carried_c)
    for t in range(sequence_length) if reverse else reversed(range(sequence_length)):
        earlier = t + 1 if reverse else t - 1
        backward_step[grid](
            grad_output[t],
            gates[t],
            cells[t],
            cells[earlier] if 0 <= earlier < sequence_length else initial_cells,
            carried_h,
            carried_c,
            weights,
            lengths,
            grad_gates[t],
            following_h,
            following_c,
            t,
            *sizes,
            **options,
        )
        carried_h, following_h = following_h, carried_h
        carried_c, following_c = following_c, carried_c
    return grad_gates, carried_h.to(gates.dtype), carried_c.to(c_0.dtype)
