"""The LSTM's recurrence on a GPU, in the three designs of ``rnnkernels.kernels.triton.rnn``.

``gates`` holds i, f, g, o side by side. ``cells`` holds the cell state after every step; in padding the one that stands
still, so that the state before a step is always its neighbour. The weights come as four square matrices, padded with
zeros to a multiple of 16 rows and columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from rnnkernels.kernels.directions import one_after_the_other
from rnnkernels.kernels.eager.variable_length import order_of_steps
from rnnkernels.kernels.triton.barrier import arrive, wait
from rnnkernels.kernels.triton.directions import lane_and_direction, lanes_of, last_taken
from rnnkernels.kernels.triton.dispatch import Persistent, Resident, choose, input_precision, step_design
from rnnkernels.kernels.triton.launch import RUNTIME as STEP
from rnnkernels.kernels.triton.launch import (
    at,
    by_length,
    carried,
    final_state,
    inner_size,
    left_of,
    lookup,
    moment,
    rows_at,
    rows_before,
    run_steps,
    stream,
    wait_for_the_step_before,
    weight_tile,
)
from rnnkernels.kernels.triton.options import CELL, STATE, as_read, factor_of, forget, through_zoneout, zone_out
from rnnkernels.kernels.triton.persistent import (
    clears,
    counter_of,
    empty_exchange,
    exchange_from,
    exchange_places,
    is_active,
    launch,
    length_of,
    load_parts,
    load_weights,
    multiply,
    state_after,
    store_parts,
    sum_two,
    time_of,
)
from rnnkernels.kernels.triton.pointwise import clip, load_either, sigmoid, tanh
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
def activate_gates(i, f, g, o, c, peepholes=None):
    """The four gates and the new cell state, of which the peephole to o is."""
    if peepholes is not None:
        i += peepholes[0] * c
        f += peepholes[1] * c
    i, f, g = sigmoid(i), sigmoid(f), tanh(g)
    new_c = cell_state(i, f, g, c)
    if peepholes is not None:
        o += peepholes[2] * new_c
    return i, f, g, sigmoid(o), new_c


@triton.jit
def through_gates(grad_cell, grad_o, i, f, g, previous, peepholes, bound):
    """Gradients of i, f, g before their activations and of the cell state before the step, from that of the new one."""
    if peepholes is not None:
        grad_cell += grad_o * peepholes[2]
    grad_i, grad_f, grad_g = through_cell_state(grad_cell, i, f, g, previous, bound)
    grad_previous = grad_cell * f
    if peepholes is not None:
        grad_previous += grad_i * peepholes[0] + grad_f * peepholes[1]
    return grad_i, grad_f, grad_g, grad_previous


@triton.jit
def gate_gradients(grad_hidden, grad_cell, i, f, g, o, previous, c, peepholes=None, bound=None):
    """Gradients of the four gates before their activations, and of the cell state before the step."""
    grad_o, through_tanh = through_output(grad_hidden, o, tanh(c), bound)
    grad_cell += through_tanh
    grad_i, grad_f, grad_g, onward = through_gates(grad_cell, grad_o, i, f, g, previous, peepholes, bound)
    return grad_i, grad_f, grad_g, grad_o, onward


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
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    parts = gates + row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    matrix = weight_size * weight_size
    weights = weight_hh + 4 * lane * matrix + columns[:, None] * weight_size + columns[None, :]
    # Transposed: row k, column n holds the weight from unit k to unit n.
    weight_i = tl.load(weights, mask=square, other=0.0).T
    weight_f = tl.load(weights + matrix, mask=square, other=0.0).T
    weight_g = tl.load(weights + 2 * matrix, mask=square, other=0.0).T
    weight_o = tl.load(weights + 3 * matrix, mask=square, other=0.0).T
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    h = tl.load(h_0 + of_lane, mask=mask, other=0.0)
    c = tl.load(c_0 + of_lane, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    start = (lane * sequence_length + time_of(0, sequence_length, reverse)) * stride
    offset = tile + start
    parts += start * 4
    stride = tl.where(reverse, -stride, stride)
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
            active = time_of(step, sequence_length, reverse) < length
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
    tl.store(h_n + of_lane, h, mask=mask)
    tl.store(c_n + of_lane, c, mask=mask)


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
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    part = row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    matrix = weight_size * weight_size
    weights = weight_hh + 4 * lane * matrix + columns[:, None] * weight_size + columns[None, :]
    weight_i = tl.load(weights, mask=square, other=0.0)
    weight_f = tl.load(weights + matrix, mask=square, other=0.0)
    weight_g = tl.load(weights + 2 * matrix, mask=square, other=0.0)
    weight_o = tl.load(weights + 3 * matrix, mask=square, other=0.0)
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    carried_h = tl.load(grad_h_n + of_lane, mask=mask, other=0.0).to(tl.float32)
    carried_c = tl.load(grad_c_n + of_lane, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    # The steps run against the order of the forward pass.
    start = (lane * sequence_length + time_of(sequence_length - 1, sequence_length, reverse)) * stride
    offset = tile + start
    part += start * 4
    stride = tl.where(reverse, stride, -stride)
    c = tl.load(cells + offset, mask=mask, other=0.0)
    i_ahead = tl.load(gates + part, mask=mask, other=0.0)
    f_ahead = tl.load(gates + part + hidden_size, mask=mask, other=0.0)
    g_ahead = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0)
    o_ahead = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0)
    outer_ahead = tl.load(grad_output + offset, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    previous_ahead = load_either(zero >= sequence_length - 1, c_0 + of_lane, cells + offset + stride, mask)
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
        first = zero >= sequence_length - 2 - step
        previous_ahead = load_either(first, c_0 + of_lane, cells + offset + 2 * stride, more)
        grad_i, grad_f, grad_g, grad_o, onward_c = gate_gradients(carried_h + outer, carried_c, i, f, g, o, previous, c)
        if HAS_LENGTHS:
            active = time_of(sequence_length - 1 - step, sequence_length, reverse) < length
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
    tl.store(grad_h_0 + of_lane, carried_h, mask=mask)
    tl.store(grad_c_0 + of_lane, carried_c, mask=mask)


@triton.jit(do_not_specialize=STEP)
def forward_step(
    table,
    step,
    hidden_size,
    weight_size,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step: ``gates`` holds its projected input; ``output`` and ``cells`` receive its states."""
    wait_for_the_step_before(DEPENDENT)
    time, sequence_length, batch = moment(table, step)
    gates = lookup(table, 0, ELEMENT, ALIGNED)
    h_0 = lookup(table, 1, ELEMENT, ALIGNED)
    c_0 = lookup(table, 2, tl.float32, ALIGNED)
    weight_hh = lookup(table, 3, ELEMENT, ALIGNED)
    lengths = lookup(table, 4, tl.int64, False)
    output = lookup(table, 5, ELEMENT, ALIGNED)
    cells = lookup(table, 6, tl.float32, ALIGNED)
    order = lookup(table, 7, tl.int64, False)
    positions = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    rows = rows_at(order, positions, batch, HAS_LENGTHS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    row_mask = positions < batch
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    parts = at(gates, time, batch, hidden_size * 4) + row_offset * 4 + columns[None, :]
    length = sequence_length
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
    previous = rows_before(output, h_0, time, length, batch, hidden_size, row_offset, REVERSE)
    weights = weight_hh + columns.to(tl.int64)[None, :] * weight_size
    matrix = tl.cast(weight_size, tl.int64) * weight_size
    i = tl.load(parts, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(parts + hidden_size, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(parts + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        h = tl.load(previous + k[None, :], mask=row_mask[:, None] & (k < hidden_size)[None, :], other=0.0)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weights + k[:, None]
        i = tl.dot(h, weight_tile(w, within), acc=i, input_precision=PRECISION)
        f = tl.dot(h, weight_tile(w + matrix, within), acc=f, input_precision=PRECISION)
        g = tl.dot(h, weight_tile(w + 2 * matrix, within), acc=g, input_precision=PRECISION)
        o = tl.dot(h, weight_tile(w + 3 * matrix, within), acc=o, input_precision=PRECISION)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    # In padding the cell state stands still, so that its neighbour is always the one before.
    before = rows_before(cells, c_0, time, sequence_length, batch, hidden_size, row_offset, REVERSE)
    old_c = tl.load(before + columns[None, :], mask=mask, other=0.0)
    c = cell_state(i, f, g, old_c)
    new = (o * tanh(c)).to(ELEMENT)
    stream(parts, i, mask)
    stream(parts + hidden_size, f, mask)
    stream(parts + 2 * hidden_size, g, mask)
    stream(parts + 3 * hidden_size, o, mask)
    if HAS_LENGTHS:
        c = tl.where(time < length, c, old_c)
        new = tl.where(time < length, new, 0.0)
    tl.store(at(cells, time, batch, hidden_size) + tile, c, mask=mask)
    tl.store(at(output, time, batch, hidden_size) + tile, new, mask=mask)


@triton.jit(do_not_specialize=STEP)
def backward_step(
    table,
    step,
    hidden_size,
    weight_size,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step back: from the float32 gradients of this step's states from later ones to those of the states before.

    ``carried_h`` and ``carried_c`` hold both, by turns.
    """
    wait_for_the_step_before(DEPENDENT)
    time, sequence_length, batch = moment(table, step)
    grad_output = lookup(table, 0, ELEMENT, ALIGNED)
    gates = lookup(table, 1, ELEMENT, ALIGNED)
    cells = lookup(table, 2, tl.float32, ALIGNED)
    c_0 = lookup(table, 3, tl.float32, ALIGNED)
    carried_h = lookup(table, 4, tl.float32, ALIGNED)
    carried_c = lookup(table, 5, tl.float32, ALIGNED)
    weight_hh = lookup(table, 6, ELEMENT, ALIGNED)
    lengths = lookup(table, 7, tl.int64, False)
    grad_gates = lookup(table, 8, ELEMENT, ALIGNED)
    order = lookup(table, 9, tl.int64, False)
    positions = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    rows = rows_at(order, positions, batch, HAS_LENGTHS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    row_mask = positions < batch
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    matrix = tl.cast(weight_size, tl.int64) * weight_size
    before = rows_before(cells, c_0, time, sequence_length, batch, hidden_size, row_offset, REVERSE)
    grad_output = at(grad_output, time, batch, hidden_size)
    gates = at(gates, time, batch, hidden_size * 4)
    grad_gates = at(grad_gates, time, batch, hidden_size * 4)
    cells = at(cells, time, batch, hidden_size)
    arriving_h, arriving_c = at(carried_h, time & 1, batch, hidden_size), at(carried_c, time & 1, batch, hidden_size)
    following_h = at(carried_h, (time & 1) ^ 1, batch, hidden_size)
    following_c = at(carried_c, (time & 1) ^ 1, batch, hidden_size)
    length = 0
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
        active = time < length
    product = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        tile = row_offset + k[None, :]
        part = row_offset * 4 + k[None, :]
        mask = row_mask[:, None] & (k < hidden_size)[None, :]
        i = tl.load(gates + part, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(gates + part + hidden_size, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cells + tile, mask=mask, other=0.0)
        old_c = tl.load(before + k[None, :], mask=mask, other=0.0)
        grad_h = tl.load(arriving_h + tile, mask=mask, other=0.0)
        grad_h += tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)
        grad_c = tl.load(arriving_c + tile, mask=mask, other=0.0)
        grad_i, grad_f, grad_g, grad_o, onward_c = gate_gradients(grad_h, grad_c, i, f, g, o, old_c, c)
        if HAS_LENGTHS:
            grad_i = tl.where(active, grad_i, 0.0)
            grad_f = tl.where(active, grad_f, 0.0)
            grad_g = tl.where(active, grad_g, 0.0)
            grad_o = tl.where(active, grad_o, 0.0)
            onward_c = tl.where(active, onward_c, grad_c)
        if tl.program_id(1) == 0:
            stream(grad_gates + part, grad_i, mask)
            stream(grad_gates + part + hidden_size, grad_f, mask)
            stream(grad_gates + part + 2 * hidden_size, grad_g, mask)
            stream(grad_gates + part + 3 * hidden_size, grad_o, mask)
            tl.store(following_c + tile, onward_c, mask=mask)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weight_hh + k.to(tl.int64)[:, None] * weight_size + columns[None, :]
        product = tl.dot(grad_i.to(ELEMENT), weight_tile(w, within), acc=product, input_precision=PRECISION)
        product = tl.dot(grad_f.to(ELEMENT), weight_tile(w + matrix, within), acc=product, input_precision=PRECISION)
        weight_g = weight_tile(w + 2 * matrix, within)
        product = tl.dot(grad_g.to(ELEMENT), weight_g, acc=product, input_precision=PRECISION)
        weight_o = weight_tile(w + 3 * matrix, within)
        product = tl.dot(grad_o.to(ELEMENT), weight_o, acc=product, input_precision=PRECISION)
    if HAS_LENGTHS:
        # What the loop left out, by the same programs: there is nothing to multiply where all sequences have ended.
        left_out = tl.where(tl.program_id(1) == 0, inner_end, hidden_size)
        for start in range(left_out, hidden_size, BLOCK_INNER):
            k = start + tl.arange(0, BLOCK_INNER)
            mask = row_mask[:, None] & (k < hidden_size)[None, :]
            nothing, part = tl.zeros((BLOCK_BATCH, BLOCK_INNER), dtype=tl.float32), row_offset * 4 + k[None, :]
            stream(grad_gates + part, nothing, mask)
            stream(grad_gates + part + hidden_size, nothing, mask)
            stream(grad_gates + part + 2 * hidden_size, nothing, mask)
            stream(grad_gates + part + 3 * hidden_size, nothing, mask)
            tile = row_offset + k[None, :]
            tl.store(following_c + tile, tl.load(arriving_c + tile, mask=mask, other=0.0), mask=mask)
    tile = row_offset + columns[None, :]
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    if HAS_LENGTHS:
        product = tl.where(active, product, tl.load(arriving_h + tile, mask=mask, other=0.0))
    tl.store(following_h + tile, product, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def forward_persistent(
    gates,
    c_0,
    weight_hh,
    lengths,
    output,
    cells,
    exchange,
    counters,
    first_step,
    last_step,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    projected=None,
    state=None,
    new_cells=None,
    weight_peephole=None,
    reset=None,
    recurrent_mask=None,
    key: tl.int64 = 1,
    zoneout: tl.int64 = 0,
    zoneout_cell: tl.int64 = 0,
    ZONEOUT: tl.constexpr = "none",
    ZONEOUT_CELL: tl.constexpr = "none",
):
    """Steps from ``first_step`` up to ``last_step``. What comes before the first, ``exchange`` and ``cells`` hold.

    With options, ``projected`` holds the projected input, and ``state`` takes the state from launch to launch.
    """
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counter_of(counters, lane)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    matrix = weight_size * weight_size
    weight_hh += 4 * lane * matrix
    weight_i = load_weights(weight_hh, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    weight_f = load_weights(weight_hh + matrix, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    weight_g = load_weights(weight_hh + 2 * matrix, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    weight_o = load_weights(weight_hh + 3 * matrix, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 1, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    factor = factor_of(recurrent_mask, tile, mask)
    peepholes = None
    if weight_peephole is not None:
        unit = columns[None, :]
        peepholes = load_parts(weight_peephole + unit, hidden_size, unit < hidden_size, 3)

    stride = tl.cast(batch, tl.int64) * hidden_size
    c_0 += lane * stride
    start = (lane * sequence_length + time_of(first_step, sequence_length, reverse)) * stride
    stride = tl.where(reverse, -stride, stride)
    offset = tile + start
    parts = gates + row_offset * 4 + columns[None, :] + start * 4
    zero = tl.zeros_like(mask.to(tl.int32))
    given, within = parts, mask
    before = target + (first_step + 1) % 2 * slot_size
    if projected is not None:
        given = projected + row_offset * 4 + columns[None, :] + start * 4
        within = mask & is_active(time_of(first_step, sequence_length, reverse), length)
        before = state + tile
    h = tl.load(before, mask=mask, other=0.0)
    c = load_either(zero == first_step, c_0 + tile, cells + offset - stride, mask)
    cleared = clears(reset, time_of(first_step, sequence_length, reverse), rows, batch, length)
    clears_next = clears(reset, time_of(first_step + 1, sequence_length, reverse), rows, batch, length)
    projected_i, projected_f, projected_g, projected_o = load_parts(given, hidden_size, within, 4)
    for step in range(first_step, last_step):
        i, f, g, o = nothing, nothing, nothing, nothing
        previous = source + (step + 1) % 2 * slot_size
        # Past the L1 cache, which may hold what was there two steps ago.
        ahead = tl.load(previous, cache_modifier=".cg")
        for chunk in tl.static_range(CHUNKS):
            x = ahead
            if chunk + 1 < CHUNKS:
                ahead = tl.load(previous + (chunk + 1) * BLOCK_INNER, cache_modifier=".cg")
            i = tl.dot(x, weight_i[chunk], acc=i, input_precision=PRECISION)
            f = tl.dot(x, weight_f[chunk], acc=f, input_precision=PRECISION)
            g = tl.dot(x, weight_g[chunk], acc=g, input_precision=PRECISION)
            o = tl.dot(x, weight_o[chunk], acc=o, input_precision=PRECISION)
        i, f = sum_two(i, f)
        g, o = sum_two(g, o)
        i, f = projected_i.to(tl.float32) + i, projected_f.to(tl.float32) + f
        g, o = projected_g.to(tl.float32) + g, projected_o.to(tl.float32) + o
        old, old_c = forget(h.to(tl.float32), cleared), forget(c, cleared)
        i, f, g, o, new_c = activate_gates(i, f, g, o, old_c, peepholes)
        new = zone_out(old, o * tanh(new_c), offset, key, zoneout, STATE, ZONEOUT).to(h.dtype)
        mixed = zone_out(old_c, new_c, offset, key, zoneout_cell, CELL, ZONEOUT_CELL)
        active = is_active(time_of(step, sequence_length, reverse), length)
        h = tl.where(active, new, h)
        c = tl.where(active, mixed, c)
        tl.store(target + step % 2 * slot_size, as_read(h, factor, clears_next), mask=mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        tl.store(output + offset, tl.where(active, new, 0.0), mask=mask)
        tl.store(cells + offset, c, mask=mask)
        store_parts(parts, hidden_size, (i, f, g, o), mask)
        if new_cells is not None:
            tl.store(new_cells + offset, new_c, mask=mask)
        offset += stride
        parts += stride * 4
        more = mask & (zero < sequence_length - 1 - step)
        if projected is None:
            given = parts
        else:
            given += stride * 4
            more = more & is_active(time_of(step + 1, sequence_length, reverse), length)
        projected_i, projected_f, projected_g, projected_o = load_parts(given, hidden_size, more, 4)
        cleared = clears_next
        clears_next = clears(reset, time_of(step + 2, sequence_length, reverse), rows, batch, length)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1))
    if state is not None:
        tl.store(state + tile, h, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_persistent(
    grad_output,
    gates,
    cells,
    c_0,
    weight_hh,
    lengths,
    grad_gates,
    carried_h,
    carried_c,
    exchange,
    counters,
    first_step,
    last_step,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    new_cells=None,
    weight_peephole=None,
    reset=None,
    recurrent_mask=None,
    grad_clip=None,
    key: tl.int64 = 1,
    zoneout: tl.int64 = 0,
    zoneout_cell: tl.int64 = 0,
    ZONEOUT: tl.constexpr = "none",
    ZONEOUT_CELL: tl.constexpr = "none",
):
    """Steps back from ``first_step`` up to ``last_step``; after the last of the sequence, one that only multiplies.

    ``carried_h`` and ``carried_c`` take the float32 gradients of the states from launch to launch.
    """
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counter_of(counters, lane)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    matrix = weight_size * weight_size
    weight_hh += 4 * lane * matrix
    weights = load_weights(weight_hh, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    weights += load_weights(weight_hh + matrix, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    weights += load_weights(weight_hh + 2 * matrix, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    weights += load_weights(weight_hh + 3 * matrix, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 4, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    stride = tl.cast(batch, tl.int64) * hidden_size
    carried_h, carried_c, c_0 = carried_h + lane * stride, carried_c + lane * stride, c_0 + lane * stride
    factor = factor_of(recurrent_mask, tile, mask)
    peepholes = None
    if weight_peephole is not None:
        unit = columns[None, :]
        peepholes = load_parts(weight_peephole + unit, hidden_size, unit < hidden_size, 3)
    computed = cells
    if new_cells is not None:
        computed = new_cells
    grad_h = tl.load(carried_h + tile, mask=mask, other=0.0)
    grad_c = tl.load(carried_c + tile, mask=mask, other=0.0)

    # The steps run against the order of the forward pass.
    time = time_of(sequence_length - 1 - first_step, sequence_length, reverse)
    start = (lane * sequence_length + time) * stride
    offset = tile + start
    part = row_offset * 4 + columns[None, :] + start * 4
    stride = tl.where(reverse, stride, -stride)
    zero = tl.zeros_like(mask.to(tl.int32))
    active = mask & is_active(time, length)
    cleared = clears(reset, time, rows, batch, length)
    cleared_later = clears(reset, time_of(sequence_length - first_step, sequence_length, reverse), rows, batch, length)
    i, f, g, o = load_parts(gates + part, hidden_size, active, 4)
    outer = tl.load(grad_output + offset, mask=active, other=0.0)
    c = tl.load(computed + offset, mask=active, other=0.0)
    previous = load_either(zero == sequence_length - 1 - first_step, c_0 + tile, cells + offset + stride, active)
    for step in range(first_step, last_step):
        product = multiply(source + (step + 1) % 2 * slot_size, weights, nothing, BLOCK_INNER, PRECISION)
        grad_h += as_read(product, factor, cleared_later)
        grad_state = grad_h + outer.to(tl.float32)
        grad_old, grad_hidden = through_zoneout(grad_state, offset, key, zoneout, STATE, ZONEOUT)
        grad_old_c, grad_new_c = through_zoneout(grad_c, offset, key, zoneout_cell, CELL, ZONEOUT_CELL)
        grad_i, grad_f, grad_g, grad_o, onward_c = gate_gradients(
            grad_hidden,
            grad_new_c,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            forget(previous, cleared),
            c,
            peepholes,
            grad_clip,
        )
        grad_h = tl.where(active, forget(grad_old, cleared), grad_h)
        grad_c = tl.where(active, forget(grad_old_c + onward_c, cleared), grad_c)
        grad_i = tl.where(active, grad_i, 0.0)
        grad_f = tl.where(active, grad_f, 0.0)
        grad_g = tl.where(active, grad_g, 0.0)
        grad_o = tl.where(active, grad_o, 0.0)
        gradients = grad_i, grad_f, grad_g, grad_o
        store_parts(target + step % 2 * slot_size, CHUNKS * BLOCK_INNER, gradients, mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        within = mask & (tl.zeros_like(length) + step < sequence_length)
        store_parts(grad_gates + part, hidden_size, gradients, within)
        offset += stride
        part += stride * 4
        time = time_of(sequence_length - 2 - step, sequence_length, reverse)
        active = mask & is_active(time, length)
        i, f, g, o = load_parts(gates + part, hidden_size, active, 4)
        outer = tl.load(grad_output + offset, mask=active, other=0.0)
        c = tl.load(computed + offset, mask=active, other=0.0)
        previous = load_either(zero == sequence_length - 2 - step, c_0 + tile, cells + offset + stride, active)
        cleared_later = cleared
        cleared = clears(reset, time, rows, batch, length)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1))
    tl.store(carried_h + tile, grad_h, mask=mask)
    tl.store(carried_c + tile, grad_c, mask=mask)


def squares(weight_hh: Tensor) -> Tensor:
    """The weights as (4, size, size), with zeros up to a multiple of 16."""
    *directions, _, hidden_size = weight_hh.shape
    missing = -hidden_size % 16
    squares = weight_hh.contiguous().view(*directions, 4, hidden_size, hidden_size)
    return functional.pad(squares, (0, missing, 0, missing)) if missing else squares


def forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place.

    Returns the states, the final state, the final cell state, and the float32 cell states.
    """
    output = gates.new_empty(*gates.shape[:-1], gates.shape[-1] // 4)
    cells = torch.empty_like(output, dtype=torch.float32)
    if output.numel() == 0:
        return output, h_0.clone(), c_0.clone(), cells
    tensors = gates, h_0.contiguous(), c_0.contiguous(), squares(weight_hh), output, cells
    return output, *_forward(*tensors, lengths, reverse), cells


def _forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Tensor,
    output: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> Sequence[Tensor]:
    """Fill ``output`` and ``cells``; return the final state and the final cell state."""
    sequence_length, batch, hidden_size = output.shape[-3:]
    sizes = batch, hidden_size, weights.shape[-1]
    options = {"REVERSE": reverse, "HAS_LENGTHS": lengths is not None, "PRECISION": input_precision(gates.dtype)}
    lanes = lanes_of(reverse)
    design = choose("lstm", hidden_size, batch, gates.dtype, gates.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        exchange = exchange_from(design, h_0)
        tensors = gates, c_0.float(), weights, lengths, output, cells, exchange
        all_sizes = sequence_length, *sizes
        if launch(forward_persistent, design, sequence_length, tensors, all_sizes, **options):
            h_n, c_n = state_after(exchange, sequence_length, h_0), last_taken(cells, reverse)
            return h_n, c_n.to(c_0.dtype, copy=True)
        design = step_design("lstm", hidden_size, batch)
    if design.lanes < lanes:
        return one_after_the_other(_forward, (gates, h_0, c_0, weights, output, cells), lengths)
    if isinstance(design, Resident):
        h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
        forward_resident[design.grid(batch, hidden_size)](
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
            **options,
            **design.constants(),
        )
        return h_n, c_n
    tensors = gates, h_0, c_0.float(), weights, lengths, output, cells, by_length(lengths)
    times = order_of_steps(sequence_length, reverse)
    run_steps(forward_step, design, tensors, (sequence_length, *sizes), times, **options)
    c_n = cells[times[-1]].to(c_0.dtype, copy=True)
    return final_state(output, lengths, reverse), c_n


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
    reverse: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the four gates before their activations, and of both initial states."""
    grad_gates = torch.empty_like(gates)
    if gates.numel() == 0:
        return grad_gates, grad_h_n.clone(), grad_c_n.clone()
    given = (tensor.contiguous() for tensor in (grad_output, grad_h_n, grad_c_n))
    tensors = *given, gates, cells, c_0.contiguous().float(), squares(weight_hh), grad_gates
    return grad_gates, *_backward(*tensors, lengths, reverse)


def _backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weights: Tensor,
    grad_gates: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> Sequence[Tensor]:
    """Fill ``grad_gates``; return the gradients of both initial states."""
    sequence_length, batch, hidden_size = cells.shape[-3:]
    sizes = batch, hidden_size, weights.shape[-1]
    options = {"REVERSE": reverse, "HAS_LENGTHS": lengths is not None, "PRECISION": input_precision(gates.dtype)}
    lanes = lanes_of(reverse)
    design = choose("lstm", hidden_size, batch, gates.dtype, gates.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        gradient_h, gradient_c = grad_h_n.float().clone(), grad_c_n.float().clone()
        exchange = empty_exchange(design, batch, 4, gates)
        tensors = grad_output, gates, cells, c_0, weights, lengths, grad_gates, gradient_h, gradient_c
        tensors, all_sizes = (*tensors, exchange), (sequence_length, *sizes)
        if launch(backward_persistent, design, sequence_length + 1, tensors, all_sizes, **options):
            return gradient_h.to(grad_h_n.dtype), gradient_c.to(grad_c_n.dtype)
        design = step_design("lstm", hidden_size, batch)
    if design.lanes < lanes:
        tensors = grad_output, grad_h_n, grad_c_n, gates, cells, c_0, weights, grad_gates
        return one_after_the_other(_backward, tensors, lengths)
    if isinstance(design, Resident):
        grad_h_0, grad_c_0 = torch.empty_like(grad_h_n), torch.empty_like(grad_c_n)
        backward_resident[design.grid(batch, hidden_size)](
            grad_output,
            grad_h_n,
            grad_c_n,
            gates,
            cells,
            c_0,
            weights,
            lengths,
            grad_gates,
            grad_h_0,
            grad_c_0,
            sequence_length,
            *sizes,
            **options,
            **design.constants(),
        )
        return grad_h_0, grad_c_0
    times = order_of_steps(sequence_length, not reverse)
    carried_h, carried_c = carried(grad_h_n, times), carried(grad_c_n, times)
    tensors = grad_output, gates, cells, c_0, carried_h, carried_c, weights, lengths, grad_gates, by_length(lengths)
    run_steps(backward_step, design, tensors, (sequence_length, *sizes), times, **options)
    return left_of(carried_h, times, grad_h_n.dtype), left_of(carried_c, times, grad_c_n.dtype)
