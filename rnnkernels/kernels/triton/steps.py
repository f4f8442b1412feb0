"""The pointwise kernels of a step of any cell with any of its options, where no launch holds all steps.

Kernels take whole sequences and the time, and find their rows themselves: addresses are then aligned at every step
alike.

A ``place`` is the time; the rows of the batch and the columns of a tile, and where they exist; the size of the
batch, and the number of columns.
"""

import triton
import triton.language as tl

from rnnkernels.kernels.triton.gru import gate_gradients, new_state, through_reset, through_state
from rnnkernels.kernels.triton.lstm import activate_gates, through_gates, through_output
from rnnkernels.kernels.triton.options import (
    CELL,
    DRAWN,
    STATE,
    as_read,
    at,
    factor_of,
    forget,
    is_reset,
    read,
    through_zoneout,
    zone_out,
)
from rnnkernels.kernels.triton.persistent import load_parts
from rnnkernels.kernels.triton.pointwise import activate, clip, load_either, sigmoid, tanh, through_activation

RUNTIME = ("time", "earlier", "earlier_cell", "later", "batch", *DRAWN)
"""Arguments on whose value no kernel is specialized."""

# What all kernels share


@triton.jit
def tile_of(batch, size, BLOCK_BATCH: tl.constexpr, BLOCK_HIDDEN: tl.constexpr):
    """Rows of the batch and columns of a program, and where they exist."""
    rows = (tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)[None, :]
    return rows, columns, (rows < batch) & (columns < size)


@triton.jit
def write(pointers, value, ended, mask):
    """Store ``value``, and zero in padding."""
    tl.store(pointers, tl.where(ended, 0.0, value), mask=mask)


@triton.jit
def has_ended(lengths, time, rows, batch):
    """Whether the sequences of these rows are over."""
    if lengths is None:
        return tl.zeros_like(rows) != 0
    else:
        return time >= tl.load(lengths + rows, mask=rows < batch, other=0)


@triton.jit
def row_sum(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def centered(x, mean, mask):
    return tl.where(mask, x - mean, 0.0)


@triton.jit
def standardize(x, size, epsilon, mask):
    """Rows with mean 0 and variance 1, and the reciprocal of their standard deviation."""
    x = centered(x, row_sum(x) / size, mask)
    reciprocal = tl.rsqrt(row_sum(x * x) / size + epsilon)
    return x * reciprocal, reciprocal


@triton.jit
def through_standardize(gradient, x, reciprocal, mean, projection):
    """The gradient through :func:`standardize`, of which ``x`` is the result.

    ``mean`` is the mean of the gradient over all that was standardized together, ``projection`` that of gradient * x.
    """
    return reciprocal * (gradient - mean - x * projection)


@triton.jit
def normalize(x, gain, size, epsilon, mask):
    standard, _ = standardize(x, size, epsilon, mask)
    return gain * standard


@triton.jit
def through_normalize(gradient, x, gain, size, epsilon, mask):
    """The gradient of ``x`` through :func:`normalize`."""
    x, reciprocal = standardize(x, size, epsilon, mask)
    gradient *= gain
    return through_standardize(gradient, x, reciprocal, row_sum(gradient) / size, row_sum(gradient * x) / size)


@triton.jit
def standardize_pair(r, z, size, epsilon, mask):
    mean = row_sum(r + z) / (2 * size)
    r, z = centered(r, mean, mask), centered(z, mean, mask)
    reciprocal = tl.rsqrt(row_sum(r * r + z * z) / (2 * size) + epsilon)
    return r * reciprocal, z * reciprocal, reciprocal


@triton.jit
def standardize_four(i, f, g, o, size, epsilon, mask):
    mean = row_sum(i + f + g + o) / (4 * size)
    i, f, g, o = centered(i, mean, mask), centered(f, mean, mask), centered(g, mean, mask), centered(o, mean, mask)
    reciprocal = tl.rsqrt(row_sum(i * i + f * f + g * g + o * o) / (4 * size) + epsilon)
    return i * reciprocal, f * reciprocal, g * reciprocal, o * reciprocal, reciprocal


@triton.jit
def through_normalize_pair(grad_r, grad_z, r, z, gain_r, gain_z, size, epsilon, mask):
    r, z, reciprocal = standardize_pair(r, z, size, epsilon, mask)
    grad_r, grad_z = grad_r * gain_r, grad_z * gain_z
    mean = row_sum(grad_r + grad_z) / (2 * size)
    projection = row_sum(grad_r * r + grad_z * z) / (2 * size)
    grad_r = through_standardize(grad_r, r, reciprocal, mean, projection)
    return grad_r, through_standardize(grad_z, z, reciprocal, mean, projection)


@triton.jit
def state_before(h, h_0, reset, lengths, place, earlier):
    """The state before a step, and what the step starts from: zero after a reset.

    ``h`` at ``earlier`` holds it; but where ``h_0`` is given, sequences begin late, each at its own last step.
    """
    time, rows, columns, mask, batch, size = place
    source = h + at(earlier, batch, rows) * size + columns
    if h_0 is None:
        before = read(source, mask)
    else:
        first = time == tl.load(lengths + rows, mask=rows < batch, other=0) - 1
        before = load_either(first, h_0 + rows * size + columns, source, mask).to(tl.float32)
    return before, forget(before, is_reset(reset, time, rows, batch, rows < batch))


@triton.jit
def settle(
    new,
    before,
    old,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    place,
    later,
    key,
    zoneout,
    ZONEOUT: tl.constexpr,
):
    """From the cell's new state to all that is kept of it.

    With lengths, ``following`` receives the state to go on from. ``recurrent`` receives it as the product of the step
    at ``later`` reads it.
    """
    time, rows, columns, mask, batch, size = place
    tile = at(time, batch, rows) * size + columns
    local = rows * size + columns
    ended = has_ended(lengths, time, rows, batch)
    new = zone_out(old, new, tile, key, zoneout, STATE, ZONEOUT)
    write(output + tile, new, ended, mask)
    state = tl.where(ended, before, new).to(output.dtype.element_ty)
    if following is not None:
        tl.store(following + local, state, mask=mask)
    if recurrent is not None:
        cleared = is_reset(reset, later, rows, batch, rows < batch)
        tl.store(recurrent + local, as_read(state, factor_of(recurrent_mask, local, mask), cleared), mask=mask)


@triton.jit
def arriving(
    grad_output,
    beside,
    through,
    reset,
    lengths,
    recurrent_mask,
    place,
    later,
    key,
    zoneout,
    ZONEOUT: tl.constexpr,
):
    """Gradients of a state from later steps, of the state before it by zoneout, and of what the cell computed.

    From later steps it comes ``through`` the product of the one at ``later``, and ``beside`` it.
    """
    time, rows, columns, mask, batch, size = place
    tile = at(time, batch, rows) * size + columns
    local = rows * size + columns
    factor, cleared = factor_of(recurrent_mask, local, mask), is_reset(reset, later, rows, batch, rows < batch)
    arrived = read(beside + local, mask) + as_read(read(through + local, mask), factor, cleared)
    gradient = tl.where(has_ended(lengths, time, rows, batch), 0.0, arrived + read(grad_output + tile, mask))
    grad_old, grad_new = through_zoneout(gradient, tile, key, zoneout, STATE, ZONEOUT)
    return arrived, grad_old, grad_new


@triton.jit
def leave(following, arrived, grad_old, reset, lengths, place):
    """Keep the gradient that goes on to the state before: in padding, the one that ``arrived``."""
    time, rows, columns, mask, batch, size = place
    grad_old = forget(grad_old, is_reset(reset, time, rows, batch, rows < batch))
    grad_old = tl.where(has_ended(lengths, time, rows, batch), arrived, grad_old)
    tl.store(following + rows * size + columns, grad_old, mask=mask)


# The plain RNN


@triton.jit(do_not_specialize=RUNTIME)
def rnn_forward(
    projected,
    product,
    norm_hh,
    bias,
    gates,
    products,
    h,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    time,
    earlier,
    later,
    batch,
    hidden_size,
    epsilon,
    key: tl.int64,
    zoneout: tl.int64,
    NONLINEARITY: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size + columns
    ended = has_ended(lengths, time, rows, batch)
    a = read(projected + tile, mask) + read(product + rows * hidden_size + columns, mask)
    if norm_hh is not None:
        write(products + tile, a, ended, mask)
        a = normalize(a, read(norm_hh + columns, columns < hidden_size), hidden_size, epsilon, mask)
        if bias is not None:
            a += read(bias + columns, columns < hidden_size)
    new = activate(a, NONLINEARITY)
    write(gates + tile, new, ended, mask)
    before, old = state_before(h, None, reset, lengths, place, earlier)
    settle(
        new,
        before,
        old,
        reset,
        lengths,
        recurrent_mask,
        output,
        following,
        recurrent,
        place,
        later,
        key,
        zoneout,
        ZONEOUT,
    )


@triton.jit(do_not_specialize=RUNTIME)
def rnn_backward(
    grad_output,
    beside,
    through,
    following,
    gates,
    products,
    norm_hh,
    grad_gates,
    grad_products,
    reset,
    lengths,
    recurrent_mask,
    time,
    later,
    batch,
    hidden_size,
    epsilon,
    grad_clip,
    key: tl.int64,
    zoneout: tl.int64,
    NONLINEARITY: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size + columns
    ended = has_ended(lengths, time, rows, batch)
    arrived, grad_old, grad_new = arriving(
        grad_output, beside, through, reset, lengths, recurrent_mask, place, later, key, zoneout, ZONEOUT
    )
    grad_a = clip(through_activation(grad_new, read(gates + tile, mask), NONLINEARITY), grad_clip)
    write(grad_gates + tile, grad_a, ended, mask)
    if norm_hh is not None:
        gain = read(norm_hh + columns, columns < hidden_size)
        grad_sum = through_normalize(grad_a, read(products + tile, mask), gain, hidden_size, epsilon, mask)
        write(grad_products + tile, grad_sum, ended, mask)
    leave(following, arrived, grad_old, reset, lengths, place)


# The GRU. ``gates`` has the parts W_hn h + b_hn, r, z, n.


@triton.jit
def product_of(product, norm_hh, place, gates: tl.constexpr):
    """A step's recurrent product: with normalization, in that of all steps, which the backward pass reads again."""
    time, rows, columns, _, batch, size = place
    if norm_hh is not None:
        rows = at(time, batch, rows)
    return product + rows * gates * size + columns


@triton.jit
def gru_gates(projected, product, norm_hh, place, epsilon):
    """r and z."""
    time, rows, columns, mask, batch, size = place
    given = projected + at(time, batch, rows) * 3 * size + columns
    from_state = product_of(product, norm_hh, place, 3)
    r, z = read(from_state, mask), read(from_state + size, mask)
    if norm_hh is not None:
        r, z, _ = standardize_pair(r, z, size, epsilon, mask)
        gain = norm_hh + columns
        r, z = r * read(gain, columns < size), z * read(gain + size, columns < size)
    return sigmoid(read(given, mask) + r), sigmoid(read(given + size, mask) + z)


@triton.jit
def gru_product(product, norm_hh, place, epsilon):
    """The product with W_hn, normalized where that is asked for."""
    _, _, columns, mask, _, size = place
    hn = read(product_of(product, norm_hh, place, 3) + 2 * size, mask)
    if norm_hh is not None:
        hn = normalize(hn, read(norm_hh + 2 * size + columns, columns < size), size, epsilon, mask)
    return hn


@triton.jit(do_not_specialize=RUNTIME)
def gru_forward(
    projected,
    product,
    norm_hh,
    bias,
    gates,
    h,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    time,
    earlier,
    later,
    batch,
    hidden_size,
    epsilon,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size
    ended = has_ended(lengths, time, rows, batch)
    r, z = gru_gates(projected, product, norm_hh, place, epsilon)
    hn = gru_product(product, norm_hh, place, epsilon)
    if bias is not None:
        hn += read(bias + columns, columns < hidden_size)
    n = tanh(read(projected + tile * 3 + 2 * hidden_size + columns, mask) + r * hn)
    parts = gates + tile * 4 + columns
    write(parts, hn, ended, mask)
    write(parts + hidden_size, r, ended, mask)
    write(parts + 2 * hidden_size, z, ended, mask)
    write(parts + 3 * hidden_size, n, ended, mask)
    before, old = state_before(h, None, reset, lengths, place, earlier)
    new = new_state(z, n, old)
    settle(
        new,
        before,
        old,
        reset,
        lengths,
        recurrent_mask,
        output,
        following,
        recurrent,
        place,
        later,
        key,
        zoneout,
        ZONEOUT,
    )


@triton.jit(do_not_specialize=RUNTIME)
def gru_gates_forward(
    projected,
    product,
    norm_hh,
    gates,
    reset_state,
    h,
    reset,
    lengths,
    recurrent_mask,
    time,
    earlier,
    batch,
    hidden_size,
    epsilon,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The gates where the reset gate acts before the product, and the state on which it has acted."""
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    ended = has_ended(lengths, time, rows, batch)
    r, z = gru_gates(projected, product, norm_hh, place, epsilon)
    parts = gates + at(time, batch, rows) * 4 * hidden_size + columns
    write(parts + hidden_size, r, ended, mask)
    write(parts + 2 * hidden_size, z, ended, mask)
    _, old = state_before(h, None, reset, lengths, place, earlier)
    local = rows * hidden_size + columns
    tl.store(reset_state + local, r * old * factor_of(recurrent_mask, local, mask), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def gru_candidate_forward(
    projected,
    product,
    norm_hh,
    gates,
    h,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    time,
    earlier,
    later,
    batch,
    hidden_size,
    epsilon,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size
    ended = has_ended(lengths, time, rows, batch)
    given = read(projected + tile * 3 + 2 * hidden_size + columns, mask)
    n = tanh(given + gru_product(product, norm_hh, place, epsilon))
    parts = gates + tile * 4 + columns
    write(parts + 3 * hidden_size, n, ended, mask)
    before, old = state_before(h, None, reset, lengths, place, earlier)
    new = new_state(read(parts + 2 * hidden_size, mask), n, old)
    settle(
        new,
        before,
        old,
        reset,
        lengths,
        recurrent_mask,
        output,
        following,
        recurrent,
        place,
        later,
        key,
        zoneout,
        ZONEOUT,
    )


@triton.jit
def through_gru_gates(grad_r, grad_z, products, norm_hh, grad_products, place, epsilon, ended):
    """Gradients of the products that r and z come from."""
    time, rows, columns, mask, batch, size = place
    tile = at(time, batch, rows) * 3 * size + columns
    r, z = read(products + tile, mask), read(products + tile + size, mask)
    gain_r = read(norm_hh + columns, columns < size)
    gain_z = read(norm_hh + size + columns, columns < size)
    grad_r, grad_z = through_normalize_pair(grad_r, grad_z, r, z, gain_r, gain_z, size, epsilon, mask)
    write(grad_products + tile, grad_r, ended, mask)
    write(grad_products + tile + size, grad_z, ended, mask)


@triton.jit
def through_gru_product(grad_hn, products, norm_hh, grad_products, place, epsilon, ended):
    """The gradient of the product with W_hn."""
    time, rows, columns, mask, batch, size = place
    tile = at(time, batch, rows) * 3 * size + 2 * size + columns
    gain = read(norm_hh + 2 * size + columns, columns < size)
    grad_hn = through_normalize(grad_hn, read(products + tile, mask), gain, size, epsilon, mask)
    write(grad_products + tile, grad_hn, ended, mask)


@triton.jit(do_not_specialize=RUNTIME)
def gru_backward(
    grad_output,
    beside,
    through,
    following,
    gates,
    products,
    norm_hh,
    grad_gates,
    grad_products,
    h,
    h_0,
    reset,
    lengths,
    recurrent_mask,
    time,
    earlier,
    later,
    batch,
    hidden_size,
    epsilon,
    grad_clip,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    ended = has_ended(lengths, time, rows, batch)
    arrived, grad_old, grad_new = arriving(
        grad_output, beside, through, reset, lengths, recurrent_mask, place, later, key, zoneout, ZONEOUT
    )
    part = at(time, batch, rows) * 4 * hidden_size + columns
    hn, r = read(gates + part, mask), read(gates + part + hidden_size, mask)
    z, n = read(gates + part + 2 * hidden_size, mask), read(gates + part + 3 * hidden_size, mask)
    _, old = state_before(h, h_0, reset, lengths, place, earlier)
    grad_hn, grad_r, grad_z, grad_n = gate_gradients(grad_new, hn, r, z, n, old, grad_clip)
    write(grad_gates + part, grad_hn, ended, mask)
    write(grad_gates + part + hidden_size, grad_r, ended, mask)
    write(grad_gates + part + 2 * hidden_size, grad_z, ended, mask)
    write(grad_gates + part + 3 * hidden_size, grad_n, ended, mask)
    if norm_hh is not None:
        through_gru_gates(grad_r, grad_z, products, norm_hh, grad_products, place, epsilon, ended)
        through_gru_product(grad_hn, products, norm_hh, grad_products, place, epsilon, ended)
    leave(following, arrived, grad_old + grad_new * z, reset, lengths, place)


@triton.jit(do_not_specialize=RUNTIME)
def gru_candidate_backward(
    grad_output,
    beside,
    through,
    following,
    gates,
    products,
    norm_hh,
    grad_gates,
    grad_products,
    h,
    h_0,
    reset,
    lengths,
    recurrent_mask,
    time,
    earlier,
    later,
    batch,
    hidden_size,
    epsilon,
    grad_clip,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The part of the step after the product with W_hn, where the reset gate acts before it."""
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    ended = has_ended(lengths, time, rows, batch)
    arrived, grad_old, grad_new = arriving(
        grad_output, beside, through, reset, lengths, recurrent_mask, place, later, key, zoneout, ZONEOUT
    )
    part = at(time, batch, rows) * 4 * hidden_size + columns
    z, n = read(gates + part + 2 * hidden_size, mask), read(gates + part + 3 * hidden_size, mask)
    _, old = state_before(h, h_0, reset, lengths, place, earlier)
    grad_z, grad_n = through_state(grad_new, z, n, old, grad_clip)
    write(grad_gates + part + 2 * hidden_size, grad_z, ended, mask)
    write(grad_gates + part + 3 * hidden_size, grad_n, ended, mask)
    if norm_hh is not None:
        through_gru_product(grad_n, products, norm_hh, grad_products, place, epsilon, ended)
    leave(following, arrived, grad_old + grad_new * z, reset, lengths, place)


@triton.jit(do_not_specialize=RUNTIME)
def gru_gates_backward(
    grad_reset_state,
    beside,
    following,
    gates,
    products,
    norm_hh,
    grad_gates,
    grad_products,
    h,
    h_0,
    reset,
    lengths,
    recurrent_mask,
    time,
    earlier,
    batch,
    hidden_size,
    epsilon,
    grad_clip,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The part before it: adds what goes to the state through r * h to what goes ``beside`` the product."""
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    ended = has_ended(lengths, time, rows, batch)
    part = at(time, batch, rows) * 4 * hidden_size + columns
    local = rows * hidden_size + columns
    r = read(gates + part + hidden_size, mask)
    gradient, factor = read(grad_reset_state + local, mask), factor_of(recurrent_mask, local, mask)
    _, old = state_before(h, h_0, reset, lengths, place, earlier)
    grad_r = through_reset(gradient, old * factor, r, grad_clip)
    write(grad_gates + part + hidden_size, grad_r, ended, mask)
    if norm_hh is not None:
        grad_z = read(grad_gates + part + 2 * hidden_size, mask)
        through_gru_gates(grad_r, grad_z, products, norm_hh, grad_products, place, epsilon, ended)
    onward = forget(gradient * r * factor, is_reset(reset, time, rows, batch, rows < batch))
    tl.store(following + local, read(beside + local, mask) + tl.where(ended, 0.0, onward), mask=mask)


# The LSTM


@triton.jit(do_not_specialize=RUNTIME)
def lstm_forward(
    projected,
    product,
    norm_hh,
    norm_cell_weight,
    norm_cell_bias,
    weight_peephole,
    gates,
    c,
    cells,
    new_cells,
    hidden,
    h,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    time,
    earlier,
    earlier_cell,
    later,
    batch,
    hidden_size,
    epsilon,
    key: tl.int64,
    zoneout: tl.int64,
    zoneout_cell: tl.int64,
    ZONEOUT: tl.constexpr,
    ZONEOUT_CELL: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """With a projection, ``hidden`` receives what it projects, and :func:`state_forward` does the rest."""
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size + columns
    part = at(time, batch, rows) * 4 * hidden_size + columns
    ended = has_ended(lengths, time, rows, batch)
    unit = columns < hidden_size
    from_state = product_of(product, norm_hh, place, 4)
    i, f = read(from_state, mask), read(from_state + hidden_size, mask)
    g, o = read(from_state + 2 * hidden_size, mask), read(from_state + 3 * hidden_size, mask)
    if norm_hh is not None:
        i, f, g, o, _ = standardize_four(i, f, g, o, hidden_size, epsilon, mask)
        gain = norm_hh + columns
        i, f = i * read(gain, unit), f * read(gain + hidden_size, unit)
        g, o = g * read(gain + 2 * hidden_size, unit), o * read(gain + 3 * hidden_size, unit)
    i += read(projected + part, mask)
    f += read(projected + part + hidden_size, mask)
    g += read(projected + part + 2 * hidden_size, mask)
    o += read(projected + part + 3 * hidden_size, mask)
    before_c, old_c = state_before(c, None, reset, lengths, place, earlier_cell)
    peepholes = None
    if weight_peephole is not None:
        peepholes = load_parts(weight_peephole + columns, hidden_size, unit, 3)
    i, f, g, o, new_c = activate_gates(i, f, g, o, old_c, peepholes)
    write(gates + part, i, ended, mask)
    write(gates + part + hidden_size, f, ended, mask)
    write(gates + part + 2 * hidden_size, g, ended, mask)
    write(gates + part + 3 * hidden_size, o, ended, mask)
    if new_cells is not None:
        write(new_cells + tile, new_c, ended, mask)
    mixed = zone_out(old_c, new_c, tile, key, zoneout_cell, CELL, ZONEOUT_CELL)
    tl.store(cells + tile, tl.where(ended, before_c, mixed), mask=mask)
    shown = new_c
    if norm_cell_weight is not None:
        shown = normalize(new_c, read(norm_cell_weight + columns, unit), hidden_size, epsilon, mask)
        shown += read(norm_cell_bias + columns, unit)
    new = o * tanh(shown)
    if hidden is not None:
        tl.store(hidden + rows * hidden_size + columns, tl.where(ended, 0.0, new), mask=mask)
    else:
        before, old = state_before(h, None, reset, lengths, place, earlier)
        settle(
            new,
            before,
            old,
            reset,
            lengths,
            recurrent_mask,
            output,
            following,
            recurrent,
            place,
            later,
            key,
            zoneout,
            ZONEOUT,
        )


@triton.jit(do_not_specialize=RUNTIME)
def state_forward(
    projection,
    h,
    reset,
    lengths,
    recurrent_mask,
    output,
    following,
    recurrent,
    time,
    earlier,
    later,
    batch,
    state_size,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """From the ``projection`` to the state."""
    rows, columns, mask = tile_of(batch, state_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, state_size
    new = read(projection + rows * state_size + columns, mask)
    before, old = state_before(h, None, reset, lengths, place, earlier)
    settle(
        new,
        before,
        old,
        reset,
        lengths,
        recurrent_mask,
        output,
        following,
        recurrent,
        place,
        later,
        key,
        zoneout,
        ZONEOUT,
    )


@triton.jit(do_not_specialize=RUNTIME)
def state_backward(
    grad_output,
    beside,
    through,
    following,
    grad_states,
    reset,
    lengths,
    recurrent_mask,
    time,
    later,
    batch,
    state_size,
    key: tl.int64,
    zoneout: tl.int64,
    ZONEOUT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The gradient of the projection."""
    rows, columns, mask = tile_of(batch, state_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, state_size
    arrived, grad_old, grad_new = arriving(
        grad_output, beside, through, reset, lengths, recurrent_mask, place, later, key, zoneout, ZONEOUT
    )
    tl.store(grad_states + at(time, batch, rows) * state_size + columns, grad_new, mask=mask)
    leave(following, arrived, grad_old, reset, lengths, place)


@triton.jit(do_not_specialize=RUNTIME)
def lstm_backward(
    grad_output,
    beside,
    through,
    following,
    grad_hidden,
    grad_states,
    grad_c,
    following_c,
    gates,
    new_cells,
    products,
    norm_hh,
    norm_cell_weight,
    norm_cell_bias,
    weight_peephole,
    grad_gates,
    grad_products,
    c,
    reset,
    lengths,
    recurrent_mask,
    time,
    earlier_cell,
    later,
    batch,
    hidden_size,
    epsilon,
    grad_clip,
    key: tl.int64,
    zoneout: tl.int64,
    zoneout_cell: tl.int64,
    ZONEOUT: tl.constexpr,
    ZONEOUT_CELL: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """With a projection, ``grad_hidden`` holds the gradient of what it projects."""
    rows, columns, mask = tile_of(batch, hidden_size, BLOCK_BATCH, BLOCK_HIDDEN)
    place = time, rows, columns, mask, batch, hidden_size
    tile = at(time, batch, rows) * hidden_size + columns
    local = rows * hidden_size + columns
    ended = has_ended(lengths, time, rows, batch)
    unit = columns < hidden_size
    if grad_hidden is not None:
        grad_m = read(grad_hidden + local, mask)
    else:
        arrived, grad_old, grad_m = arriving(
            grad_output, beside, through, reset, lengths, recurrent_mask, place, later, key, zoneout, ZONEOUT
        )
        leave(following, arrived, grad_old, reset, lengths, place)
        if grad_states is not None:
            tl.store(grad_states + tile, grad_m, mask=mask)
    arrived_c = read(grad_c + local, mask)
    gradient = tl.where(ended, 0.0, arrived_c)
    grad_old_c, grad_new_c = through_zoneout(gradient, tile, key, zoneout_cell, CELL, ZONEOUT_CELL)
    new_c = read(new_cells + tile, mask)
    _, old_c = state_before(c, None, reset, lengths, place, earlier_cell)

    part = at(time, batch, rows) * 4 * hidden_size + columns
    o = read(gates + part + 3 * hidden_size, mask)
    if norm_cell_weight is None:
        grad_o, grad_shown = through_output(grad_m, o, tanh(new_c), grad_clip)
        grad_new_c += grad_shown
    else:
        gain = read(norm_cell_weight + columns, unit)
        shown = normalize(new_c, gain, hidden_size, epsilon, mask) + read(norm_cell_bias + columns, unit)
        grad_o, grad_shown = through_output(grad_m, o, tanh(shown), grad_clip)
        grad_new_c += through_normalize(grad_shown, new_c, gain, hidden_size, epsilon, mask)
    peepholes = None
    if weight_peephole is not None:
        peepholes = load_parts(weight_peephole + columns, hidden_size, unit, 3)
    i, f = read(gates + part, mask), read(gates + part + hidden_size, mask)
    g = read(gates + part + 2 * hidden_size, mask)
    grad_i, grad_f, grad_g, through_c = through_gates(grad_new_c, grad_o, i, f, g, old_c, peepholes, grad_clip)
    grad_old_c += through_c
    leave(following_c, arrived_c, grad_old_c, reset, lengths, place)
    write(grad_gates + part, grad_i, ended, mask)
    write(grad_gates + part + hidden_size, grad_f, ended, mask)
    write(grad_gates + part + 2 * hidden_size, grad_g, ended, mask)
    write(grad_gates + part + 3 * hidden_size, grad_o, ended, mask)
    if norm_hh is not None:
        gain = norm_hh + columns
        grad_i, grad_f = grad_i * read(gain, unit), grad_f * read(gain + hidden_size, unit)
        grad_g, grad_o = grad_g * read(gain + 2 * hidden_size, unit), grad_o * read(gain + 3 * hidden_size, unit)
        i, f = read(products + part, mask), read(products + part + hidden_size, mask)
        g, o = read(products + part + 2 * hidden_size, mask), read(products + part + 3 * hidden_size, mask)
        i, f, g, o, reciprocal = standardize_four(i, f, g, o, hidden_size, epsilon, mask)
        mean = row_sum(grad_i + grad_f + grad_g + grad_o) / (4 * hidden_size)
        projection = row_sum(grad_i * i + grad_f * f + grad_g * g + grad_o * o) / (4 * hidden_size)
        part += grad_products
        write(part, through_standardize(grad_i, i, reciprocal, mean, projection), ended, mask)
        write(part + hidden_size, through_standardize(grad_f, f, reciprocal, mean, projection), ended, mask)
        write(part + 2 * hidden_size, through_standardize(grad_g, g, reciprocal, mean, projection), ended, mask)
        write(part + 3 * hidden_size, through_standardize(grad_o, o, reciprocal, mean, projection), ended, mask)
