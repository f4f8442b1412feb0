"""Several layers of a recurrence in one launch: the persistent design as a *wavefront*.

A *lane*, the third axis of the grid, is a layer. Forward, lane l takes time s - l at step s of the launch: what the
layer below made of that time and the lane's own last state were both left in the step before. So one barrier a step
serves all lanes, and L layers take T + L - 1 steps instead of L * T. Backward, the wave goes from the top layer down,
and from the last time to the first.

A program keeps two sets of weights on the chip: of W_ih, which multiplies what the lane below left, and of W_hh. Both
products are one, over two regions of the lane's rows in the exchange. The lowest lane has its input's product from one
before the launch, and zeros in the first region.

The kernels serve every cell. A hidden unit has ``PARTS`` sums a step, as many as a step keeps. The last ``MATRICES`` of
them take what the lane below left, and the first ones the lane's own state: all of them for RNN and LSTM; for the GRU,
whose parts are W_hn h, r, z and W_in x, three and three. W_hh has its matrices in the order of the parts.

On a CPU, the interpreter compares the kernels with the reference launched step by step, and with a process for each
program; every tile compiles for its GPUs. None has been timed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from rnnkernels.kernels.eager import random
from rnnkernels.kernels.triton.barrier import arrive, wait
from rnnkernels.kernels.triton.dispatch import Persistent, input_precision
from rnnkernels.kernels.triton.general import PARTS, ROWS
from rnnkernels.kernels.triton.gru import gate_gradients as gru_gradients
from rnnkernels.kernels.triton.gru import new_state
from rnnkernels.kernels.triton.lstm import cell_state
from rnnkernels.kernels.triton.lstm import gate_gradients as lstm_gradients
from rnnkernels.kernels.triton.persistent import (
    COUNTER_STRIDE,
    accumulate,
    empty_exchange,
    exchange_places,
    is_active,
    launch,
    length_of,
    load_parts,
    load_weights,
    multiply,
    store_parts,
    sum_two,
)
from rnnkernels.kernels.triton.pointwise import activate, load_either, sigmoid, tanh, through_activation
from rnnkernels.kernels.triton.random import mask_of
from rnnkernels.kernels.triton.rnn import RUNTIME

ELEMENTS = tl.constexpr(random.ELEMENTS)


@triton.jit
def of_lane(below, top, lane, size):
    """Where the states of a lane begin: those of the highest lie apart."""
    return tl.where(lane == tl.num_programs(2) - 1, top, below + lane * size)


@triton.jit
def load_matrices(
    weight,
    columns,
    size,
    weight_size,
    inner_stride,
    column_stride,
    MATRICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The chunks of so many matrices, one matrix after the other; zeros where ``size`` is zero."""
    chunks = ()
    for matrix in tl.static_range(MATRICES):
        first = weight + matrix * weight_size * weight_size
        chunks += load_weights(first, columns, size, inner_stride, column_stride, SPLITS, BLOCK_INNER, CHUNKS)
    return chunks


@triton.jit
def multiply_regions(
    source,
    weights,
    nothing,
    PARTS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums of all parts over the region of the lane below and that of the lane itself."""
    FIRST: tl.constexpr = PARTS - MATRICES
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (nothing,)
    # Past the L1 cache, which may hold what was there two steps ago.
    ahead = tl.load(source, cache_modifier=".cg")
    for region in tl.static_range(2):
        for chunk in tl.static_range(CHUNKS):
            x = ahead
            if region == 0 or chunk + 1 < CHUNKS:
                ahead = tl.load(source + (region * CHUNKS + chunk + 1) * BLOCK_INNER, cache_modifier=".cg")
            before = sums
            sums = ()
            for part in tl.static_range(PARTS):
                if region == 0 and part >= FIRST:
                    w = weights[(part - FIRST) * CHUNKS + chunk]
                    sums += (tl.dot(x, w, acc=before[part], input_precision=PRECISION),)
                elif region == 1 and part < MATRICES:
                    w = weights[(MATRICES + part) * CHUNKS + chunk]
                    sums += (tl.dot(x, w, acc=before[part], input_precision=PRECISION),)
                else:
                    sums += (before[part],)
    if PARTS == 1:
        return (tl.sum(sums[0], axis=0),)
    else:
        a, b = sum_two(sums[0], sums[1])
        c, d = sum_two(sums[2], sums[3])
        return a, b, c, d


@triton.jit(do_not_specialize=(*RUNTIME, "bound"))
def forward_wavefront(
    gates,
    c_0,
    weight_ih,
    weight_hh,
    biases,
    lengths,
    keys,
    below,
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
    scale,
    bound: tl.int64,
    CELL: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    PARTS: tl.constexpr,
    MATRICES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Steps from ``first_step`` up to ``last_step``. What comes before the first, ``exchange`` and ``cells`` hold.

    ``gates`` holds the projected input of the lowest lane and receives what all lanes keep of a step.
    """
    FIRST: tl.constexpr = PARTS - MATRICES
    lane = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counters + tl.program_id(0) * COUNTER_STRIDE
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    stride = tl.cast(batch, tl.int64) * hidden_size
    lane_size = sequence_length * stride

    matrices = MATRICES * weight_size * weight_size
    from_below, own = weight_ih + (lane - 1) * matrices, weight_hh + lane * matrices
    has_below = weight_size * (lane > 0).to(tl.int32)
    weights = load_matrices(
        from_below, columns, has_below, weight_size, 1, weight_size, MATRICES, SPLITS, BLOCK_INNER, CHUNKS
    )
    weights += load_matrices(
        own, columns, weight_size, weight_size, 1, weight_size, MATRICES, SPLITS, BLOCK_INNER, CHUNKS
    )
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 2, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    for_above = target + 2 * slot_size
    target += CHUNKS * BLOCK_INNER
    has_above = mask & (tl.zeros_like(length) + lane + 1 < tl.num_programs(2))
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    bias = load_parts(
        biases + lane * PARTS * hidden_size + columns[None, :], hidden_size, (columns < hidden_size)[None, :], PARTS
    )
    if DROPOUT:
        key = tl.load(keys + lane)

    time = first_step - lane
    offset = tile + time * stride
    states = of_lane(below, output, lane, lane_size)
    parts = gates + lane * lane_size * PARTS + row_offset * PARTS + columns[None, :] + time * stride * PARTS
    zero = tl.zeros_like(length)
    lowest = mask & (zero + lane == 0)
    h = tl.load(target + (first_step + 1) % 2 * slot_size, mask=mask, other=0.0)
    if CELL == "lstm":
        cells += lane * lane_size
        started = zero + time > 0
        left = mask & ((started == 0) | is_active(time - 1, zero + sequence_length))
        c = load_either(started == 0, c_0 + lane * stride + tile, cells + offset - stride, left)
    following = lowest & is_active(time, zero + sequence_length)
    projected = load_parts(parts + FIRST * hidden_size, hidden_size, following, MATRICES)
    for step in range(first_step, last_step):
        previous = source + (step + 1) % 2 * slot_size
        products = multiply_regions(previous, weights, nothing, PARTS, MATRICES, BLOCK_INNER, CHUNKS, PRECISION)
        sums = ()
        for part in tl.static_range(PARTS):
            a = products[part] + bias[part].to(tl.float32)
            if part >= FIRST:
                a += projected[part - FIRST].to(tl.float32)
            sums += (a,)
        active = is_active(time, length)
        if CELL == "lstm":
            i, f, g, o = sigmoid(sums[0]), sigmoid(sums[1]), tanh(sums[2]), sigmoid(sums[3])
            new_c = cell_state(i, f, g, c)
            new = (o * tanh(new_c)).to(h.dtype)
            c = tl.where(active, new_c, c)
            kept = i, f, g, o
        elif CELL == "gru":
            hn, r, z = sums[0], sigmoid(sums[1]), sigmoid(sums[2])
            n = tanh(sums[3] + r * hn)
            new = new_state(z, n, h.to(tl.float32)).to(h.dtype)
            kept = hn, r, z, n
        else:
            new = activate(sums[0], NONLINEARITY).to(h.dtype)
        h = tl.where(active, new, h)
        passed = h
        if DROPOUT:
            passed = (h.to(tl.float32) * mask_of(offset, key, bound, scale, ELEMENTS, h.dtype)).to(h.dtype)
        tl.store(target + step % 2 * slot_size, h, mask=mask)
        tl.store(for_above + step % 2 * slot_size, passed, mask=has_above)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        within = mask & is_active(time, zero + sequence_length)
        tl.store(states + offset, tl.where(active, new, 0.0), mask=within)
        if CELL == "lstm":
            tl.store(cells + offset, c, mask=within)
        if CELL != "rnn":
            store_parts(parts, hidden_size, kept, within)
        time += 1
        offset += stride
        parts += stride * PARTS
        following = lowest & is_active(time, zero + sequence_length)
        projected = load_parts(parts + FIRST * hidden_size, hidden_size, following, MATRICES)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1) * tl.num_programs(2))


@triton.jit
def load_saved(
    gates,
    states,
    cells,
    initial,
    offset,
    tile,
    part,
    stride,
    time,
    hidden_size,
    active,
    CELL: tl.constexpr,
):
    """What a step back needs of the forward pass: what a step keeps, then the state before (GRU); the cell state
    before, and after (LSTM)."""
    if CELL == "rnn":
        return (tl.load(states + offset, mask=active, other=0.0),)
    else:
        a, b, c, d = load_parts(gates + part, hidden_size, active, 4)
        first = tl.zeros_like(active.to(tl.int32)) + time == 0
        if CELL == "gru":
            previous = load_either(first, initial + tile, states + offset - stride, active)
            return a, b, c, d, previous
        else:
            previous = load_either(first, initial + tile, cells + offset - stride, active)
            return a, b, c, d, previous, tl.load(cells + offset, mask=active, other=0.0)


@triton.jit(do_not_specialize=(*RUNTIME, "bound"))
def backward_wavefront(
    grad_output,
    below,
    output,
    gates,
    cells,
    initial,
    weight_ih,
    weight_hh,
    lengths,
    keys,
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
    scale,
    bound: tl.int64,
    CELL: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    PARTS: tl.constexpr,
    MATRICES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Steps back from ``first_step`` up to ``last_step``; after a lane's last time comes a step that only multiplies.

    ``initial`` holds what the LSTM's cells, the GRU's states begin with. ``carried_h`` and ``carried_c`` take the
    float32 gradients of the states from launch to launch.
    """
    FIRST: tl.constexpr = PARTS - MATRICES
    lane = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    counter = counters + tl.program_id(0) * COUNTER_STRIDE
    mask = (rows < batch)[:, None] & (columns < hidden_size)[None, :]
    length = length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS)
    row_offset = rows.to(tl.int64)[:, None] * hidden_size
    tile = row_offset + columns[None, :]
    stride = tl.cast(batch, tl.int64) * hidden_size
    lane_size = sequence_length * stride

    matrices = MATRICES * weight_size * weight_size
    own, from_above = weight_hh + lane * matrices, weight_ih + lane * matrices
    has_above = weight_size * (lane + 1 < tl.num_programs(2)).to(tl.int32)
    weights = load_matrices(
        own, columns, weight_size, weight_size, weight_size, 1, MATRICES, SPLITS, BLOCK_INNER, CHUNKS
    )
    weights_above = load_matrices(
        from_above, columns, has_above, weight_size, weight_size, 1, MATRICES, SPLITS, BLOCK_INNER, CHUNKS
    )
    part_size: tl.constexpr = CHUNKS * BLOCK_INNER
    source, target, slot_size = exchange_places(
        exchange, rows, columns, 2 * MATRICES, BLOCK_BATCH, BLOCK_INNER, CHUNKS, SPLITS, lane
    )
    for_below = target - 2 * slot_size + MATRICES * part_size
    nothing = tl.zeros((SPLITS, BLOCK_BATCH, BLOCK_HIDDEN), dtype=tl.float32)
    carried_h += lane * stride
    grad_h = tl.load(carried_h + tile, mask=mask, other=0.0)
    if CELL == "lstm":
        carried_c += lane * stride
        grad_c = tl.load(carried_c + tile, mask=mask, other=0.0)
        cells += lane * lane_size
    if CELL != "rnn":
        initial += lane * stride
        gates += lane * lane_size * PARTS
    if DROPOUT:
        key = tl.load(keys + lane)

    time = sequence_length + tl.num_programs(2) - 2 - lane - first_step
    offset = tile + time * stride
    part = row_offset * PARTS + columns[None, :] + time * stride * PARTS
    grad_gates += lane * lane_size * PARTS
    states = of_lane(below, output, lane, lane_size)
    zero = tl.zeros_like(length)
    highest = zero + lane + 1 == tl.num_programs(2)
    has_below = mask & (zero + lane > 0)
    active = mask & is_active(time, length)
    saved = load_saved(gates, states, cells, initial, offset, tile, part, stride, time, hidden_size, active, CELL)
    outer = tl.load(grad_output + offset, mask=active & highest, other=0.0)
    for step in range(first_step, last_step):
        previous = source + (step + 1) % 2 * slot_size
        if DROPOUT:
            sums = accumulate(previous, weights, nothing, BLOCK_INNER, PRECISION)
            above = accumulate(previous + MATRICES * part_size, weights_above, nothing, BLOCK_INNER, PRECISION)
            sums, above = sum_two(sums, above)
            grad_h += sums + above * mask_of(offset, key, bound, scale, ELEMENTS, outer.dtype)
        else:
            grad_h += multiply(previous, weights + weights_above, nothing, BLOCK_INNER, PRECISION)
        grad_state = grad_h + outer.to(tl.float32)
        onward = tl.zeros_like(grad_h)
        if CELL == "lstm":
            grad_i, grad_f, grad_g, grad_o, onward_c = lstm_gradients(
                grad_state,
                grad_c,
                saved[0].to(tl.float32),
                saved[1].to(tl.float32),
                saved[2].to(tl.float32),
                saved[3].to(tl.float32),
                saved[4],
                saved[5],
            )
            grad_c = tl.where(active, onward_c, grad_c)
            gradients = grad_i, grad_f, grad_g, grad_o
        elif CELL == "gru":
            z = saved[2].to(tl.float32)
            gradients = gru_gradients(
                grad_state,
                saved[0].to(tl.float32),
                saved[1].to(tl.float32),
                z,
                saved[3].to(tl.float32),
                saved[4].to(tl.float32),
                float("inf"),
            )
            onward = grad_state * z
        else:
            gradients = (through_activation(grad_state, saved[0].to(tl.float32), NONLINEARITY),)
        grad_h = tl.where(active, onward, grad_h)
        within_length = ()
        for index in tl.static_range(PARTS):
            within_length += (tl.where(active, gradients[index], 0.0),)
        slot = step % 2 * slot_size
        for index in tl.static_range(MATRICES):
            tl.store(target + slot + index * part_size, within_length[index], mask=mask)
            tl.store(for_below + slot + index * part_size, within_length[FIRST + index], mask=has_below)
        if BARRIER:
            arrive(counter)
        # While the others arrive: what they need not wait for, and what the next step needs besides.
        within = mask & is_active(time, zero + sequence_length)
        store_parts(grad_gates + part, hidden_size, within_length, within)
        time -= 1
        offset -= stride
        part -= stride * PARTS
        active = mask & is_active(time, length)
        saved = load_saved(gates, states, cells, initial, offset, tile, part, stride, time, hidden_size, active, CELL)
        outer = tl.load(grad_output + offset, mask=active & highest, other=0.0)
        if BARRIER:
            wait(counter, (step + 1) * tl.num_programs(1) * tl.num_programs(2))
    tl.store(carried_h + tile, grad_h, mask=mask)
    if CELL == "lstm":
        tl.store(carried_c + tile, grad_c, mask=mask)


# What the host does


class Weights(NamedTuple):
    """The weights of the lanes, as the kernels take them."""

    weight_ih: Tensor
    """(lane, matrix, size, size), without the lowest lane: padded with zeros to a multiple of 16 rows and columns."""
    weight_hh: Tensor
    """(lane, matrix, size, size)"""


def squares(cell: str, weight_ih: Sequence[Tensor], weight_hh: Sequence[Tensor]) -> Weights:
    """The weights of neighbouring layers: W_ih of all but the lowest, and W_hh of all."""
    hidden_size = weight_hh[0].shape[1]
    missing = -hidden_size % 16

    def padded(weights):
        matrices = torch.stack(list(weights)).view(len(weights), ROWS[cell], hidden_size, hidden_size)
        return functional.pad(matrices, (0, missing, 0, missing)) if missing else matrices

    own = padded(weight_hh)
    # In the order of the parts: W_hn, W_hr, W_hz.
    return Weights(padded(weight_ih), own.roll(1, 1) if cell == "gru" else own)


class Dropout(NamedTuple):
    """Dropout between the lanes."""

    probability: float
    """Of an element to be dropped."""
    keys: Sequence[int]
    """The generator's, for the output of every lane but the highest."""


def _options(
    cell: str, nonlinearity: str, lengths: Tensor | None, dropout: Dropout | None, dtype: torch.dtype
) -> dict[str, object]:
    """What both kernels take by name."""
    return {
        "scale": 1.0 if dropout is None else random.scale(dropout.probability),
        "bound": 0 if dropout is None else random.threshold(dropout.probability),
        "CELL": cell,
        "NONLINEARITY": nonlinearity,
        "PARTS": PARTS[cell],
        "MATRICES": ROWS[cell],
        "HAS_LENGTHS": lengths is not None,
        "DROPOUT": dropout is not None,
        "PRECISION": input_precision(dtype),
    }


def _keys(dropout: Dropout | None, device: torch.device) -> Tensor | None:
    """A key for each lane, the highest's unused: filled on the device, so that nothing waits for a copy."""
    if dropout is None:
        return None
    keys = torch.ones(len(dropout.keys) + 1, dtype=torch.int64, device=device)
    for place, key in zip(keys, dropout.keys, strict=False):
        place.fill_(key)
    return keys


def forward(
    cell: str,
    design: Persistent,
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    biases: Tensor,
    lengths: Tensor | None,
    below: Tensor,
    output: Tensor,
    cells: Tensor | None,
    dropout: Dropout | None,
    nonlinearity: str = "tanh",
) -> Tensor | None:
    """The final states (lane, batch, hidden_size); None if the GPU refuses the launch, and nothing was done.

    Parameters
    ----------
    gates : Tensor, shape (lane, sequence_length, batch, parts * hidden_size)
        Activated in place; the lowest lane's hold the projected input. The RNN, which keeps no gates, has it in the
        states of that lane, and ``below`` here.
    h_0, c_0 : Tensor, shape (lane, batch, hidden_size)
        The initial states.
    weights : Weights
    biases : Tensor, shape (lane, parts, hidden_size)
        What is added to each sum, besides the projected input.
    lengths : Tensor of int64, shape (batch,), optional
    below, output : Tensor, shape (lane - 1, sequence_length, batch, hidden_size), and without lane
        Receive the states of all lanes but the highest, and the highest's.
    cells : Tensor of float32, shape (lane, sequence_length, batch, hidden_size)
        Receives the LSTM's cell states.
    dropout : Dropout, optional
    """
    sequence_length, batch, hidden_size = output.shape
    h_0, steps = h_0.contiguous(), sequence_length + len(h_0) - 1
    c_0 = None if c_0 is None else c_0.contiguous().float()
    exchange = empty_exchange(design, batch, 2, output)
    exchange[:, 1, :batch, 1, :hidden_size] = h_0
    tensors = gates, c_0, *weights, biases, lengths, _keys(dropout, output.device), below, output, cells, exchange
    sizes = sequence_length, batch, hidden_size, weights.weight_hh.shape[-1]
    options = _options(cell, nonlinearity, lengths, dropout, output.dtype)
    if not launch(forward_wavefront, design, steps, tensors, sizes, **options):
        return None
    return exchange[:, (steps - 1) % 2, :batch, 1, :hidden_size].clone(memory_format=torch.contiguous_format)


def backward(
    cell: str,
    design: Persistent,
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    below: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    dropout: Dropout | None,
    grad_gates: Tensor,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor | None] | None:
    """Gradients of the initial states; None if the GPU refuses the launch, and nothing was done.

    ``grad_gates`` receives the gradients of the ``gates`` of all lanes before their activations, ``grad_output`` is
    that of the highest lane's states. All others as in :func:`forward`.
    """
    sequence_length, batch, hidden_size = output.shape
    steps = sequence_length + len(h_0)
    gradient_h = grad_h_n.float().clone(memory_format=torch.contiguous_format)
    gradient_c = None if grad_c_n is None else grad_c_n.float().clone(memory_format=torch.contiguous_format)
    initial = {"rnn": None, "gru": h_0.contiguous(), "lstm": c_0}[cell]
    initial = initial.contiguous().float() if cell == "lstm" else initial
    exchange = empty_exchange(design, batch, 2 * ROWS[cell], output)
    tensors = grad_output.contiguous(), below, output, gates, cells, initial, *weights, lengths
    tensors += _keys(dropout, output.device), grad_gates, gradient_h, gradient_c, exchange
    sizes = sequence_length, batch, hidden_size, weights.weight_hh.shape[-1]
    options = _options(cell, nonlinearity, lengths, dropout, output.dtype)
    if not launch(backward_wavefront, design, steps, tensors, sizes, **options):
        return None
    return gradient_h.to(output.dtype), None if gradient_c is None else gradient_c.to(c_0.dtype)
