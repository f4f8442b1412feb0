"""The plain RNN's recurrence on a GPU.

Three designs (``dispatch`` chooses):

- *resident*: one program takes a tile of the batch through all steps, with the whole of W_hh in its shared memory.
- *persistent*: one launch for all steps, whose programs each hold a slice of W_hh and exchange the states after every
  step (``rnnkernels.kernels.triton.persistent``).
- *step*: one launch a step, whose programs tile (batch, hidden) and stream W_hh from the L2 cache. Fits any size.
  ``launch`` makes the launches cheap.

The first two also run both directions of a layer in one launch (``rnnkernels.kernels.triton.directions``). Layers of a
stack may share a persistent launch (``rnnkernels.kernels.triton.wavefront``).

All read the projected input from ``output`` and leave the states there. States pass from step to step in the tensors'
own type, sums are float32.
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
from rnnkernels.kernels.triton.options import (
    DRAWN,
    STATE,
    as_read,
    factor_of,
    forget,
    through_zoneout,
    zone_out,
)
from rnnkernels.kernels.triton.persistent import (
    clears,
    counter_of,
    empty_exchange,
    exchange_from,
    exchange_places,
    is_active,
    launch,
    length_of,
    load_weights,
    multiply,
    state_after,
    time_of,
)
from rnnkernels.kernels.triton.pointwise import activate, clip, through_activation

RUNTIME = ("sequence_length", "batch", "first_step", "last_step", *DRAWN)
"""Arguments on whose value no kernel is specialized: a new length or batch compiles nothing."""


@triton.jit(do_not_specialize=RUNTIME)
def forward_resident(
    output,
    h_0,
    weight_hh,
    lengths,
    h_n,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    NONLINEARITY: tl.constexpr,
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
    tile = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    # Transposed: row k, column n holds the weight from unit k to unit n.
    weight_hh += lane * weight_size * weight_size
    weight = tl.load(weight_hh + columns[:, None] * weight_size + columns[None, :], mask=square, other=0.0).T
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    h = tl.load(h_0 + of_lane, mask=mask, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    states = output + (lane * sequence_length + time_of(0, sequence_length, reverse)) * stride + tile
    stride = tl.where(reverse, -stride, stride)
    projected = tl.load(states, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    for step in range(sequence_length):
        # Asked for a step ahead, so that the memory answers during the product.
        ahead = tl.load(states + stride, mask=mask & (zero < sequence_length - 1 - step), other=0.0)
        a = tl.dot(h, weight, acc=projected.to(tl.float32), input_precision=PRECISION)
        new = activate(a, NONLINEARITY).to(h.dtype)
        if HAS_LENGTHS:
            active = time_of(step, sequence_length, reverse) < length
            h = tl.where(active, new, h)
            tl.store(states, tl.where(active, new, 0.0), mask=mask)
        else:
            h = new
            tl.store(states, new, mask=mask)
        states += stride
        projected = ahead
    tl.store(h_n + of_lane, h, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def backward_resident(
    grad_output,
    grad_h_n,
    output,
    weight_hh,
    lengths,
    grad_projected,
    grad_h_0,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    NONLINEARITY: tl.constexpr,
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
    tile = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    square = (columns < weight_size)[:, None] & (columns < weight_size)[None, :]
    weight_hh += lane * weight_size * weight_size
    weight = tl.load(weight_hh + columns[:, None] * weight_size + columns[None, :], mask=square, other=0.0)
    stride = tl.cast(batch, tl.int64) * hidden_size
    of_lane = tile + lane * stride
    carried = tl.load(grad_h_n + of_lane, mask=mask, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]

    # The steps run against the order of the forward pass.
    offset = tile + (lane * sequence_length + time_of(sequence_length - 1, sequence_length, reverse)) * stride
    stride = tl.where(reverse, stride, -stride)
    y = tl.load(output + offset, mask=mask, other=0.0)
    outer = tl.load(grad_output + offset, mask=mask, other=0.0)
    zero = tl.zeros_like(mask.to(tl.int32))
    for step in range(sequence_length):
        more = mask & (zero < sequence_length - 1 - step)
        y_ahead = tl.load(output + offset + stride, mask=more, other=0.0)
        outer_ahead = tl.load(grad_output + offset + stride, mask=more, other=0.0)
        gradient = through_activation(carried + outer.to(tl.float32), y.to(tl.float32), NONLINEARITY)
        if HAS_LENGTHS:
            active = time_of(sequence_length - 1 - step, sequence_length, reverse) < length
            gradient = tl.where(active, gradient, 0.0)
        inner = gradient.to(weight.dtype)
        tl.store(grad_projected + offset, inner, mask=mask)
        product = tl.dot(inner, weight, input_precision=PRECISION)
        if HAS_LENGTHS:
            carried = tl.where(active, product, carried)
        else:
            carried = product
        offset += stride
        y = y_ahead
        outer = outer_ahead
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
    NONLINEARITY: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One step: ``output`` holds its projected input and receives its states."""
    wait_for_the_step_before(DEPENDENT)
    time, sequence_length, batch = moment(table, step)
    output = lookup(table, 0, ELEMENT, ALIGNED)
    h_0 = lookup(table, 1, ELEMENT, ALIGNED)
    weight_hh = lookup(table, 2, ELEMENT, ALIGNED)
    lengths = lookup(table, 3, tl.int64, False)
    order = lookup(table, 4, tl.int64, False)
    positions = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    rows = rows_at(order, positions, batch, HAS_LENGTHS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inner = tl.arange(0, BLOCK_INNER)
    row_mask = positions < batch
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    states = at(output, time, batch, hidden_size) + row_offset + columns[None, :]
    length = sequence_length
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
    previous = rows_before(output, h_0, time, length, batch, hidden_size, row_offset, REVERSE)
    weights = weight_hh + columns.to(tl.int64)[None, :] * weight_size
    a = tl.load(states, mask=mask, other=0.0).to(tl.float32)
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + inner
        h = tl.load(previous + k[None, :], mask=row_mask[:, None] & (k < hidden_size)[None, :], other=0.0)
        w = weight_tile(weights + k[:, None], (k < weight_size)[:, None] & (columns < weight_size)[None, :])
        a = tl.dot(h, w, acc=a, input_precision=PRECISION)
    new = activate(a, NONLINEARITY).to(ELEMENT)
    if HAS_LENGTHS:
        new = tl.where(time < length, new, 0.0)
    tl.store(states, new, mask=mask)


@triton.jit(do_not_specialize=STEP)
def backward_step(
    table,
    step,
    hidden_size,
    weight_size,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    NONLINEARITY: tl.constexpr,
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
    time, _, batch = moment(table, step)
    grad_output = lookup(table, 0, ELEMENT, ALIGNED)
    output = lookup(table, 1, ELEMENT, ALIGNED)
    carried = lookup(table, 2, tl.float32, ALIGNED)
    weight_hh = lookup(table, 3, ELEMENT, ALIGNED)
    lengths = lookup(table, 4, tl.int64, False)
    grad_projected = lookup(table, 5, ELEMENT, ALIGNED)
    order = lookup(table, 6, tl.int64, False)
    positions = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    rows = rows_at(order, positions, batch, HAS_LENGTHS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inner = tl.arange(0, BLOCK_INNER)
    row_mask = positions < batch
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    grad_output = at(grad_output, time, batch, hidden_size)
    output = at(output, time, batch, hidden_size)
    grad_projected = at(grad_projected, time, batch, hidden_size)
    arriving = at(carried, time & 1, batch, hidden_size)
    following = at(carried, (time & 1) ^ 1, batch, hidden_size)
    length = 0
    if HAS_LENGTHS:
        length = tl.load(lengths + rows, mask=row_mask, other=0)[:, None]
        active = time < length
    product = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    inner_end = inner_size(length, time, hidden_size, HAS_LENGTHS)
    for start in range(0, inner_end, BLOCK_INNER):
        k = start + inner
        tile = row_offset + k[None, :]
        mask = row_mask[:, None] & (k < hidden_size)[None, :]
        y = tl.load(output + tile, mask=mask, other=0.0).to(tl.float32)
        outer = tl.load(grad_output + tile, mask=mask, other=0.0).to(tl.float32)
        gradient = through_activation(tl.load(arriving + tile, mask=mask, other=0.0) + outer, y, NONLINEARITY)
        if HAS_LENGTHS:
            gradient = tl.where(active, gradient, 0.0)
        gradient = gradient.to(ELEMENT)
        if tl.program_id(1) == 0:
            stream(grad_projected + tile, gradient, mask)
        w = weight_hh + k.to(tl.int64)[:, None] * weight_size + columns[None, :]
        w = weight_tile(w, (k < weight_size)[:, None] & (columns < weight_size)[None, :])
        product = tl.dot(gradient, w, acc=product, input_precision=PRECISION)
    if HAS_LENGTHS:
        # What the loop left out, by the same programs: there is nothing to multiply where all sequences have ended.
        left_out = tl.where(tl.program_id(1) == 0, inner_end, hidden_size)
        for start in range(left_out, hidden_size, BLOCK_INNER):
            k = start + tl.arange(0, BLOCK_INNER)
            mask = row_mask[:, None] & (k < hidden_size)[None, :]
            nothing = tl.zeros((BLOCK_BATCH, BLOCK_INNER), dtype=tl.float32)
            stream(grad_projected + row_offset + k[None, :], nothing, mask)
    tile = row_offset + columns[None, :]
    mask = row_mask[:, None] & (columns < hidden_size)[None, :]
    if HAS_LENGTHS:
        product = tl.where(active, product, tl.load(arriving + tile, mask=mask, other=0.0))
    tl.store(following + tile, product, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def forward_persistent(
    output,
    weight_hh,
    lengths,
    exchange,
    counters,
    first_step,
    last_step,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    NONLINEARITY: tl.constexpr,
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
    gates=None,
    state=None,
    reset=None,
    recurrent_mask=None,
    key: tl.int64 = 1,
    zoneout: tl.int64 = 0,
    ZONEOUT: tl.constexpr = "none",
):
    """Steps from ``first_step`` up to ``last_step``. What comes before the first, ``exchange`` holds.

    With options, ``projected`` holds the projected input, ``gates`` receives what the activation gives, and ``state``
    takes the state from launch to launch.
    """
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counter_of(counters, lane)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    tile = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    weight_hh += lane * weight_size * weight_size
    weights = load_weights(weight_hh, columns, weight_size, 1, weight_size, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 1, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    factor = factor_of(recurrent_mask, tile, mask)

    stride = tl.cast(batch, tl.int64) * hidden_size
    start = (lane * sequence_length + time_of(first_step, sequence_length, reverse)) * stride
    stride = tl.where(reverse, -stride, stride)
    offset = tile + start
    zero = tl.zeros_like(mask.to(tl.int32))
    given, within = output, mask
    before = target + (first_step + 1) % 2 * slot_size
    if projected is not None:
        given = projected
        within = mask & is_active(time_of(first_step, sequence_length, reverse), length)
        before = state + tile
    h = tl.load(before, mask=mask, other=0.0)
    cleared = clears(reset, time_of(first_step, sequence_length, reverse), rows, batch, length)
    clears_next = clears(reset, time_of(first_step + 1, sequence_length, reverse), rows, batch, length)
    from_input = tl.load(given + offset, mask=within, other=0.0)
    for step in range(first_step, last_step):
        a = multiply(source + (step + 1) % 2 * slot_size, weights, nothing, BLOCK_INNER, PRECISION)
        candidate = activate(from_input.to(tl.float32) + a, NONLINEARITY)
        old = forget(h.to(tl.float32), cleared)
        new = zone_out(old, candidate, offset, key, zoneout, STATE, ZONEOUT).to(h.dtype)
        active = is_active(time_of(step, sequence_length, reverse), length)
        h = tl.where(active, new, h)
        tl.store(target + step % 2 * slot_size, as_read(h, factor, clears_next), mask=mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        tl.store(output + offset, tl.where(active, new, 0.0), mask=mask)
        if gates is not None:
            tl.store(gates + offset, candidate, mask=mask)
        offset += stride
        more = mask & (zero < sequence_length - 1 - step)
        if projected is not None:
            more = more & is_active(time_of(step + 1, sequence_length, reverse), length)
        from_input = tl.load(given + offset, mask=more, other=0.0)
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
    weight_hh,
    lengths,
    grad_projected,
    carried,
    exchange,
    counters,
    first_step,
    last_step,
    sequence_length,
    batch,
    hidden_size,
    weight_size,
    NONLINEARITY: tl.constexpr,
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

    ``output`` holds what the activation gave; ``carried`` takes the state's float32 gradient from launch to launch.
    """
    lane, reverse = lane_and_direction(REVERSE)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counter_of(counters, lane)
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    tile = rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
    weight_hh += lane * weight_size * weight_size
    weights = load_weights(weight_hh, columns, weight_size, weight_size, 1, SPLITS, BLOCK_INNER, CHUNKS)
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 1, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    stride = tl.cast(batch, tl.int64) * hidden_size
    carried += lane * stride
    factor = factor_of(recurrent_mask, tile, mask)
    grad_h = tl.load(carried + tile, mask=mask, other=0.0)

    # The steps run against the order of the forward pass.
    time = time_of(sequence_length - 1 - first_step, sequence_length, reverse)
    offset = tile + (lane * sequence_length + time) * stride
    stride = tl.where(reverse, stride, -stride)
    active = mask & is_active(time, length)
    cleared = clears(reset, time, rows, batch, length)
    cleared_later = clears(reset, time_of(sequence_length - first_step, sequence_length, reverse), rows, batch, length)
    y = tl.load(output + offset, mask=active, other=0.0)
    outer = tl.load(grad_output + offset, mask=active, other=0.0)
    for step in range(first_step, last_step):
        product = multiply(source + (step + 1) % 2 * slot_size, weights, nothing, BLOCK_INNER, PRECISION)
        grad_h += as_read(product, factor, cleared_later)
        grad_state = grad_h + outer.to(tl.float32)
        grad_old, grad_new = through_zoneout(grad_state, offset, key, zoneout, STATE, ZONEOUT)
        gradient = clip(through_activation(grad_new, y.to(tl.float32), NONLINEARITY), grad_clip)
        gradient = tl.where(active, gradient, 0.0)
        grad_h = tl.where(active, forget(grad_old, cleared), grad_h)
        tl.store(target + step % 2 * slot_size, gradient, mask=mask)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        within = mask & (tl.zeros_like(length) + step < sequence_length)
        tl.store(grad_projected + offset, gradient, mask=within)
        offset += stride
        time = time_of(sequence_length - 2 - step, sequence_length, reverse)
        active = mask & is_active(time, length)
        y = tl.load(output + offset, mask=active, other=0.0)
        outer = tl.load(grad_output + offset, mask=active, other=0.0)
        cleared_later = cleared
        cleared = clears(reset, time, rows, batch, length)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1))
    tl.store(carried + tile, grad_h, mask=mask)


def squares(weight_hh: Tensor) -> Tensor:
    """The recurrent weights with zeros up to a multiple of 16 rows and columns: rows then start on 16-byte bounds."""
    missing = -weight_hh.shape[-1] % 16
    return functional.pad(weight_hh, (0, missing, 0, missing)) if missing else weight_hh.contiguous()


def forward(
    output: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
) -> Tensor:
    """Turn the projected input that ``output`` holds into the states, in place, and return the final state."""
    if output.numel() == 0:
        return h_0.clone()
    return _forward(output, h_0.contiguous(), squares(weight_hh), lengths, nonlinearity, reverse)[0]


def _forward(
    output: Tensor,
    h_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
) -> Sequence[Tensor]:
    sequence_length, batch, hidden_size = output.shape[-3:]
    sizes = batch, hidden_size, weight_hh.shape[-1]
    options = {
        "NONLINEARITY": nonlinearity,
        "REVERSE": reverse,
        "HAS_LENGTHS": lengths is not None,
        "PRECISION": input_precision(output.dtype),
    }
    lanes = lanes_of(reverse)
    design = choose("rnn", hidden_size, batch, output.dtype, output.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        exchange = exchange_from(design, h_0)
        tensors, all_sizes = (output, weight_hh, lengths, exchange), (sequence_length, *sizes)
        if launch(forward_persistent, design, sequence_length, tensors, all_sizes, **options):
            return (state_after(exchange, sequence_length, h_0),)
        design = step_design("rnn", hidden_size, batch)
    if design.lanes < lanes:
        return one_after_the_other(_forward, (output, h_0, weight_hh), lengths, nonlinearity)
    if isinstance(design, Resident):
        h_n = torch.empty_like(h_0)
        forward_resident[design.grid(batch, hidden_size)](
            output, h_0, weight_hh, lengths, h_n, sequence_length, *sizes, **options, **design.constants()
        )
        return (h_n,)
    times = order_of_steps(sequence_length, reverse)
    tensors = output, h_0, weight_hh, lengths, by_length(lengths)
    run_steps(forward_step, design, tensors, (sequence_length, *sizes), times, **options)
    return (final_state(output, lengths, reverse),)


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projected input and of the initial state."""
    grad_projected = torch.empty_like(output)
    if output.numel() == 0:
        return grad_projected, grad_h_n.clone()
    tensors = grad_output.contiguous(), grad_h_n.contiguous(), output, squares(weight_hh), grad_projected
    return grad_projected, *_backward(*tensors, lengths, nonlinearity, reverse)


def _backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    weight_hh: Tensor,
    grad_projected: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool | None,
) -> Sequence[Tensor]:
    """Fill ``grad_projected``; return the gradient of the initial state."""
    sequence_length, batch, hidden_size = output.shape[-3:]
    sizes = batch, hidden_size, weight_hh.shape[-1]
    options = {
        "NONLINEARITY": nonlinearity,
        "REVERSE": reverse,
        "HAS_LENGTHS": lengths is not None,
        "PRECISION": input_precision(output.dtype),
    }
    lanes = lanes_of(reverse)
    design = choose("rnn", hidden_size, batch, output.dtype, output.device, lanes)
    if isinstance(design, Persistent) and design.lanes == lanes:
        gradient, exchange = grad_h_n.float().clone(), empty_exchange(design, batch, 1, output)
        tensors = grad_output, output, weight_hh, lengths, grad_projected, gradient, exchange
        all_sizes = sequence_length, *sizes
        if launch(backward_persistent, design, sequence_length + 1, tensors, all_sizes, **options):
            return (gradient.to(output.dtype),)
        design = step_design("rnn", hidden_size, batch)
    if design.lanes < lanes:
        tensors = grad_output, grad_h_n, output, weight_hh, grad_projected
        return one_after_the_other(_backward, tensors, lengths, nonlinearity)
    if isinstance(design, Resident):
        grad_h_0 = torch.empty_like(grad_h_n)
        backward_resident[design.grid(batch, hidden_size)](
            grad_output,
            grad_h_n,
            output,
            weight_hh,
            lengths,
            grad_projected,
            grad_h_0,
            sequence_length,
            *sizes,
            **options,
            **design.constants(),
        )
        return (grad_h_0,)
    times = order_of_steps(sequence_length, not reverse)
    gradient = carried(grad_h_n, times)
    tensors = grad_output, output, gradient, weight_hh, lengths, grad_projected, by_length(lengths)
    run_steps(backward_step, design, tensors, (sequence_length, *sizes), times, **options)
    return (left_of(gradient, times, output.dtype),)
