"""The gated recurrent unit's recurrence on a GPU, in the three designs of ``rnnkernels.kernels.triton.rnn``.

``gates`` is the buffer that ``rnnkernels.kernels.eager.gru`` describes: W_hn h + b_hn, r, z, n side by side.
The weights come as three square matrices, for r, z and n, padded with zeros to a multiple of 16 rows and columns.
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
from rnnkernels.kernels.triton.directions import lane_and_direction, lanes_of
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
from rnnkernels.kernels.triton.options import STATE, as_read, factor_of, forget, through_zoneout, zone_out
from rnnkernels.kernels.triton.persistent import (
    clears,
    counter_of,
    empty_exchange,
    exchange_from,
    exchange_places,
    is_active,
    is_first,
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
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    parts = gates + row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    matrix = weight_size * weight_size
    weights = weight_hh + 3 * lane * matrix + columns[:, None] * weight_size + columns[None, :]
    # Transposed: row k, column n holds the weight from unit k to unit n.
    weight_r = tl.load(weights, mask=square, other=0.0).T
    weight_z = tl.load(weights + matrix, mask=square, other=0.0).T
    weight_n = tl.load(weights + 2 * matrix, mask=square, other=0.0).T
    bias = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    if HAS_BIAS:
        bias_n += lane * hidden_size
        bias += tl.load(bias_n + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    h = tl.load(h_0 + of_lane, mask=mask, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    start = (lane * sequence_length + time_of(0, sequence_length, reverse)) * stride
    states = output + tile + start
    parts += start * 4
    stride = tl.where(reverse, -stride, stride)
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
            active = time_of(step, sequence_length, reverse) < length
            h = tl.where(active, new, h)
            tl.store(states, tl.where(active, new, 0.0), mask=mask)
        else:
            h = new
            tl.store(states, new, mask=mask)
        states += stride
        parts = following
    tl.store(h_n + of_lane, h, mask=mask)


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
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.arange(0, BLOCK_HIDDEN)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    part = row_offset * 4 + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    matrix = weight_size * weight_size
    weights = weight_hh + 3 * lane * matrix + columns[:, None] * weight_size + columns[None, :]
    weight_r = tl.load(weights, mask=square, other=0.0)
    weight_z = tl.load(weights + matrix, mask=square, other=0.0)
    weight_n = tl.load(weights + 2 * matrix, mask=square, other=0.0)
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    carried = tl.load(grad_h_n + of_lane, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    # The steps run against the order of the forward pass.
    start = (lane * sequence_length + time_of(sequence_length - 1, sequence_length, reverse)) * stride
    offset = tile + start
    part += start * 4
    stride = tl.where(reverse, stride, -stride)
    zero = tl.zeros_like(rows)[:, None]
    last = sequence_length - 1
    hn_ahead = tl.load(gates + part, mask=mask, other=0.0)
    r_ahead = tl.load(gates + part + hidden_size, mask=mask, other=0.0)
    z_ahead = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0)
    n_ahead = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0)
    outer_ahead = tl.load(grad_output + offset, mask=mask, other=0.0)
    first = zero >= last
    if HAS_LENGTHS:
        first = zero >= tl.where(reverse, length - 1, last)
    previous_ahead = load_either(first, h_0 + of_lane, output + offset + stride, mask)
    for step in range(sequence_length):
        hn, r = hn_ahead.to(tl.float32), r_ahead.to(tl.float32)
        z, n = z_ahead.to(tl.float32), n_ahead.to(tl.float32)
        outer, previous = outer_ahead.to(tl.float32), previous_ahead.to(tl.float32)
        # Asked for a step ahead, so that the memory answers during the products.
        more = mask & (zero < last - step)
        following = gates + part + stride * 4
        hn_ahead = tl.load(following, mask=more, other=0.0)
        r_ahead = tl.load(following + hidden_size, mask=more, other=0.0)
        z_ahead = tl.load(following + 2 * hidden_size, mask=more, other=0.0)
        n_ahead = tl.load(following + 3 * hidden_size, mask=more, other=0.0)
        outer_ahead = tl.load(grad_output + offset + stride, mask=more, other=0.0)
        first = zero >= last - 1 - step
        if HAS_LENGTHS:
            active = time_of(last - step, sequence_length, reverse) < length
            first = zero + step >= tl.where(reverse, length - 1, last) - 1
        previous_ahead = load_either(first, h_0 + of_lane, output + offset + 2 * stride, more)
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
    tl.store(grad_h_0 + of_lane, carried, mask=mask)


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
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step: ``gates`` holds its projected input; ``output`` receives its states."""
    wait_for_the_step_before(DEPENDENT)
    time, sequence_length, batch = moment(table, step)
    gates = lookup(table, 0, ELEMENT, ALIGNED)
    h_0 = lookup(table, 1, ELEMENT, ALIGNED)
    weight_hh = lookup(table, 2, ELEMENT, ALIGNED)
    bias_n = lookup(table, 3, ELEMENT, ALIGNED)
    lengths = lookup(table, 4, tl.int64, False)
    output = lookup(table, 5, ELEMENT, ALIGNED)
    order = lookup(table, 6, tl.int64, False)
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
    r = tl.load(parts + hidden_size, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(parts + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
    hn = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    if HAS_BIAS:
        hn += tl.load(bias_n + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        h = tl.load(previous + k[None, :], mask=row_mask[:, None] & (k < hidden_size)[None, :], other=0.0)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weights + k[:, None]
        r = tl.dot(h, weight_tile(w, within), acc=r, input_precision=PRECISION)
        z = tl.dot(h, weight_tile(w + matrix, within), acc=z, input_precision=PRECISION)
        hn = tl.dot(h, weight_tile(w + 2 * matrix, within), acc=hn, input_precision=PRECISION)
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(tl.load(parts + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32) + r * hn)
    old = tl.load(previous + columns[None, :], mask=mask, other=0.0)
    new = new_state(z, n, old.to(tl.float32)).to(ELEMENT)
    stream(parts, hn, mask)
    stream(parts + hidden_size, r, mask)
    stream(parts + 2 * hidden_size, z, mask)
    stream(parts + 3 * hidden_size, n, mask)
    if HAS_LENGTHS:
        new = tl.where(time < length, new, 0.0)
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
    """One step back: from the float32 gradient of this step's state from later ones to that of the state before.

    ``carried`` holds both, by turns.
    """
    wait_for_the_step_before(DEPENDENT)
    time, sequence_length, batch = moment(table, step)
    grad_output = lookup(table, 0, ELEMENT, ALIGNED)
    gates = lookup(table, 1, ELEMENT, ALIGNED)
    output = lookup(table, 2, ELEMENT, ALIGNED)
    h_0 = lookup(table, 3, ELEMENT, ALIGNED)
    carried = lookup(table, 4, tl.float32, ALIGNED)
    weight_hh = lookup(table, 5, ELEMENT, ALIGNED)
    lengths = lookup(table, 6, tl.int64, False)
    grad_gates = lookup(table, 7, ELEMENT, ALIGNED)
    order = lookup(table, 8, tl.int64, False)
    positions = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    rows = rows_at(order, positions, batch, HAS_LENGTHS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    row_mask = positions < batch
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    matrix = tl.cast(weight_size, tl.int64) * weight_size
    length = sequence_length
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
        active = time < length
    previous = rows_before(output, h_0, time, length, batch, hidden_size, row_offset, REVERSE)
    grad_output = at(grad_output, time, batch, hidden_size)
    gates = at(gates, time, batch, hidden_size * 4)
    grad_gates = at(grad_gates, time, batch, hidden_size * 4)
    arriving = at(carried, time & 1, batch, hidden_size)
    following = at(carried, (time & 1) ^ 1, batch, hidden_size)
    product = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        tile = row_offset + k[None, :]
        part = row_offset * 4 + k[None, :]
        mask = row_mask[:, None] & (k < hidden_size)[None, :]
        hn = tl.load(gates + part, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(gates + part + hidden_size, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gates + part + 2 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(gates + part + 3 * hidden_size, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(previous + k[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_state = tl.load(arriving + tile, mask=mask, other=0.0)
        grad_state += tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)
        grad_hn, grad_r, grad_z, grad_n = gate_gradients(grad_state, hn, r, z, n, h, float("inf"))
        if HAS_LENGTHS:
            grad_hn = tl.where(active, grad_hn, 0.0)
            grad_r = tl.where(active, grad_r, 0.0)
            grad_z = tl.where(active, grad_z, 0.0)
            grad_n = tl.where(active, grad_n, 0.0)
        if tl.program_id(1) == 0:
            stream(grad_gates + part, grad_hn, mask)
            stream(grad_gates + part + hidden_size, grad_r, mask)
            stream(grad_gates + part + 2 * hidden_size, grad_z, mask)
            stream(grad_gates + part + 3 * hidden_size, grad_n, mask)
        within = (k < weight_size)[:, None] & (columns < weight_size)[None, :]
        w = weight_hh + k.to(tl.int64)[:, None] * weight_size + columns[None, :]
        product = tl.dot(grad_r.to(ELEMENT), weight_tile(w, within), acc=product, input_precision=PRECISION)
        product = tl.dot(grad_z.to(ELEMENT), weight_tile(w + matrix, within), acc=product, input_precision=PRECISION)
        weight_n = weight_tile(w + 2 * matrix, within)
        product = tl.dot(grad_hn.to(ELEMENT), weight_n, acc=product, input_precision=PRECISION)
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
    tile = row_offset + columns[None, :]
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    old = tl.load(arriving + tile, mask=mask, other=0.0)
    z = tl.load(gates + row_offset * 4 + 2 * hidden_size + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    onward = (old + tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)) * z + product
    if HAS_LENGTHS:
        onward = tl.where(active, onward, old)
    tl.store(following + tile, onward, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def forward_persistent(
    gates,
    weight_hh,
    bias_n,
    lengths,
    output,
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
    HAS_BIAS: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    projected=None,
    state=None,
    reset=None,
    recurrent_mask=None,
    key: tl.int64 = 1,
    zoneout: tl.int64 = 0,
    ZONEOUT: tl.constexpr = "none",
):
    """Steps from ``first_step`` up to ``last_step``. What comes before the first, ``exchange`` holds.

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
    weight_hh += 3 * lane * matrix
    weight_r = load_weights(weight_hh, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    weight_z = load_weights(weight_hh + matrix, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    weight_n = load_weights(weight_hh + 2 * matrix, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 1, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    factor = factor_of(recurrent_mask, tile, mask)
    bias = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    if HAS_BIAS:
        bias_n += lane * hidden_size
        bias += tl.load(bias_n + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]

    stride = tl.cast(batch, tl.int64) * hidden_size
    start = (lane * sequence_length + time_of(first_step, sequence_length, reverse)) * stride
    stride = tl.where(reverse, -stride, stride)
    offset = tile + start
    parts = gates + row_offset * 4 + columns[None, :] + start * 4
    zero = tl.zeros_like(mask.to(tl.int32))
    given, within = parts + hidden_size, mask
    before = target + (first_step + 1) % 2 * slot_size
    if projected is not None:
        given = projected + row_offset * 3 + columns[None, :] + start * 3
        within = mask & is_active(time_of(first_step, sequence_length, reverse), length)
        before = state + tile
    h = tl.load(before, mask=mask, other=0.0)
    cleared = clears(reset, time_of(first_step, sequence_length, reverse), rows, batch, length)
    clears_next = clears(reset, time_of(first_step + 1, sequence_length, reverse), rows, batch, length)
    projected_r, projected_z, projected_n = load_parts(given, hidden_size, within, 3)
    for step in range(first_step, last_step):
        r, z, hn = nothing, nothing, nothing
        previous = source + (step + 1) % 2 * slot_size
        # Past the L1 cache, which may hold what was there two steps ago.
        ahead = tl.load(previous, cache_modifier=".cg")
        for chunk in tl.static_range(CHUNKS):
            x = ahead
            if chunk + 1 < CHUNKS:
                ahead = tl.load(previous + (chunk + 1) * BLOCK_INNER, cache_modifier=".cg")
            r = tl.dot(x, weight_r[chunk], acc=r, input_precision=PRECISION)
            z = tl.dot(x, weight_z[chunk], acc=z, input_precision=PRECISION)
            hn = tl.dot(x, weight_n[chunk], acc=hn, input_precision=PRECISION)
        r, z = sum_two(r, z)
        hn = tl.sum(hn, axis=0) + bias
        r, z = sigmoid(projected_r.to(tl.float32) + r), sigmoid(projected_z.to(tl.float32) + z)
        n = tanh(projected_n.to(tl.float32) + r * hn)
        old = forget(h.to(tl.float32), cleared)
        new = zone_out(old, new_state(z, n, old), offset, key, zoneout, STATE, ZONEOUT).to(h.dtype)
        active = is_active(time_of(step, sequence_length, reverse), length)
        h = tl.where(active, new, h)
        tl.store(target + step % 2 * slot_size, as_read(h, factor, clears_next), mask=mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        tl.store(output + offset, tl.where(active, new, 0.0), mask=mask)
        store_parts(parts, hidden_size, (hn, r, z, n), mask)
        offset += stride
        parts += stride * 4
        more = mask & (zero < sequence_length - 1 - step)
        if projected is None:
            given = parts + hidden_size
        else:
            given += stride * 3
            more = more & is_active(time_of(step + 1, sequence_length, reverse), length)
        projected_r, projected_z, projected_n = load_parts(given, hidden_size, more, 3)
        cleared = clears_next
        clears_next = clears(reset, time_of(step + 2, sequence_length, reverse), rows, batch, length)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1))
    if state is not None:
        tl.store(state + tile, h, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_persistent(
    grad_output,
    output,
    gates,
    h_0,
    weight_hh,
    lengths,
    grad_gates,
    carried,
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
    reset=None,
    recurrent_mask=None,
    grad_clip=None,
    key: tl.int64 = 1,
    zoneout: tl.int64 = 0,
    ZONEOUT: tl.constexpr = "none",
):
    """Steps back from ``first_step`` up to ``last_step``; after the last of the sequence, one that only multiplies.

    ``carried`` takes the float32 gradient of the state from launch to launch.
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
    weight_hh += 3 * lane * matrix
    # In the order of the first three parts: W_hn h, r, z.
    weights = load_weights(weight_hh + 2 * matrix, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    weights += load_weights(weight_hh, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    weights += load_weights(weight_hh + matrix, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 3, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    stride = tl.cast(batch, tl.int64) * hidden_size
    carried, h_0 = carried + lane * stride, h_0 + lane * stride
    factor = factor_of(recurrent_mask, tile, mask)
    grad_h = tl.load(carried + tile, mask=mask, other=0.0)

    # The steps run against the order of the forward pass.
    time = time_of(sequence_length - 1 - first_step, sequence_length, reverse)
    start = (lane * sequence_length + time) * stride
    offset = tile + start
    part = row_offset * 4 + columns[None, :] + start * 4
    stride = tl.where(reverse, stride, -stride)
    active = mask & is_active(time, length)
    cleared = clears(reset, time, rows, batch, length)
    cleared_later = clears(reset, time_of(sequence_length - first_step, sequence_length, reverse), rows, batch, length)
    hn, r, z, n = load_parts(gates + part, hidden_size, active, 4)
    outer = tl.load(grad_output + offset, mask=active, other=0.0)
    previous = load_either(is_first(time, length, reverse), h_0 + tile, output + offset + stride, active)
    for step in range(first_step, last_step):
        product = multiply(source + (step + 1) % 2 * slot_size, weights, nothing, BLOCK_INNER, PRECISION)
        grad_h += as_read(product, factor, cleared_later)
        grad_state = grad_h + outer.to(tl.float32)
        grad_old, grad_new = through_zoneout(grad_state, offset, key, zoneout, STATE, ZONEOUT)
        grad_hn, grad_r, grad_z, grad_n = gate_gradients(
            grad_new,
            hn.to(tl.float32),
            r.to(tl.float32),
            z.to(tl.float32),
            n.to(tl.float32),
            forget(previous.to(tl.float32), cleared),
            grad_clip,
        )
        grad_old += grad_new * z.to(tl.float32)
        grad_h = tl.where(active, forget(grad_old, cleared), grad_h)
        grad_hn = tl.where(active, grad_hn, 0.0)
        grad_r = tl.where(active, grad_r, 0.0)
        grad_z = tl.where(active, grad_z, 0.0)
        grad_n = tl.where(active, grad_n, 0.0)
        multiplied = grad_hn, grad_r, grad_z  # by the weights, on the way to the state before
        store_parts(target + step % 2 * slot_size, CHUNKS * BLOCK_INNER, multiplied, mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        within = mask & (tl.zeros_like(length) + step < sequence_length)
        store_parts(grad_gates + part, hidden_size, (grad_hn, grad_r, grad_z, grad_n), within)
        offset += stride
        part += stride * 4
        time = time_of(sequence_length - 2 - step, sequence_length, reverse)
        active = mask & is_active(time, length)
        hn, r, z, n = load_parts(gates + part, hidden_size, active, 4)
        outer = tl.load(grad_output + offset, mask=active, other=0.0)
        previous = load_either(is_first(time, length, reverse), h_0 + tile, output + offset + stride, active)
        cleared_later = cleared
        cleared = clears(reset, time, rows, batch, length)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1))
    tl.store(carried + tile, grad_h, mask=mask)


def squares(weight_hh: Tensor) -> Tensor:
    """The weights as (3, size, size), with zeros up to a multiple of 16."""
    *directions, _, hidden_size = weight_hh.shape
    missing = -hidden_size % 16
    squares = weight_hh.contiguous().view(*directions, 3, hidden_size, hidden_size)
    return functional.pad(squares, (0, missing, 0, missing)).contiguous()


def forward(
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool | None,
) -> tuple[Tensor, Tensor]:
    """Activate ``gates``, which hold the projected input, in place; return the states and the final state."""
    hidden_size = gates.shape[-1] // 4
    output = gates.new_empty(*gates.shape[:-1], hidden_size)
    if output.numel() == 0:
        return output, h_0.clone()
    bias_n = None if bias_hh is None else bias_hh[..., 2 * hidden_size :].contiguous()
    tensors = gates, h_0.contiguous(), squares(weight_hh), bias_n, output
    return output, *_forward(*tensors, lengths, reverse)


def _forward(
    gates: Tensor,
    h_0: Tensor,
    weights: Tensor,
    bias_n: Tensor | None,
    output: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> Sequence[Tensor]:
    """Fill ``output``; return the final state."""
    sequence_length, batch, hidden_size = output.shape[-3:]
    sizes = batch, hidden_size, weights.shape[-1]
    options = {
        "REVERSE": reverse,
        "HAS_LENGTHS": lengths is not None,
        "HAS_BIAS": bias_n is not None,
        "PRECISION": input_precision(gates.dtype),
    }
    lanes = lanes_of(reverse)
    design = choose("gru", hidden_size, batch, gates.dtype, gates.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        exchange = exchange_from(design, h_0)
        tensors, all_sizes = (gates, weights, bias_n, lengths, output, exchange), (sequence_length, *sizes)
        if launch(forward_persistent, design, sequence_length, tensors, all_sizes, **options):
            return (state_after(exchange, sequence_length, h_0),)
        design = step_design("gru", hidden_size, batch)
    if design.lanes < lanes:
        return one_after_the_other(_forward, (gates, h_0, weights, bias_n, output), lengths)
    if isinstance(design, Resident):
        h_n = torch.empty_like(h_0)
        forward_resident[design.grid(batch, hidden_size)](
            gates, h_0, weights, bias_n, lengths, output, h_n, sequence_length, *sizes, **options, **design.constants()
        )
        return (h_n,)
    tensors = gates, h_0, weights, bias_n, lengths, output, by_length(lengths)
    times = order_of_steps(sequence_length, reverse)
    run_steps(forward_step, design, tensors, (sequence_length, *sizes), times, **options)
    return (final_state(output, lengths, reverse),)


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the four parts of ``gates`` before their activations, and of the initial state."""
    grad_gates = torch.empty_like(gates)
    if output.numel() == 0:
        return grad_gates, grad_h_n.clone()
    tensors = grad_output.contiguous(), grad_h_n.contiguous(), output, gates, h_0.contiguous()
    return grad_gates, *_backward(*tensors, squares(weight_hh), grad_gates, lengths, reverse)


def _backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor,
    weights: Tensor,
    grad_gates: Tensor,
    lengths: Tensor | None,
    reverse: bool | None,
) -> Sequence[Tensor]:
    """Fill ``grad_gates``; return the gradient of the initial state."""
    sequence_length, batch, hidden_size = output.shape[-3:]
    sizes = batch, hidden_size, weights.shape[-1]
    options = {"REVERSE": reverse, "HAS_LENGTHS": lengths is not None, "PRECISION": input_precision(output.dtype)}
    lanes = lanes_of(reverse)
    design = choose("gru", hidden_size, batch, output.dtype, output.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        gradient, exchange = grad_h_n.float().clone(), empty_exchange(design, batch, 3, output)
        tensors = grad_output, output, gates, h_0, weights, lengths, grad_gates, gradient, exchange
        all_sizes = sequence_length, *sizes
        if launch(backward_persistent, design, sequence_length + 1, tensors, all_sizes, **options):
            return (gradient.to(output.dtype),)
        design = step_design("gru", hidden_size, batch)
    if design.lanes < lanes:
        return one_after_the_other(_backward, (grad_output, grad_h_n, output, gates, h_0, weights, grad_gates), lengths)
    if isinstance(design, Resident):
        grad_h_0 = torch.empty_like(grad_h_n)
        backward_resident[design.grid(batch, hidden_size)](
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
            **options,
            **design.constants(),
        )
        return (grad_h_0,)
    times = order_of_steps(sequence_length, not reverse)
    gradient = carried(grad_h_n, times)
    tensors = grad_output, gates, output, h_0, gradient, weights, lengths, grad_gates, by_length(lengths)
    run_steps(backward_step, design, tensors, (sequence_length, *sizes), times, **options)
    return (left_of(gradient, times, output.dtype),)
