"""What the kernels of the *persistent* design share: one launch for all steps, the weights spread over the whole GPU.

A group of programs takes a tile of the batch through all steps. Each holds the weights of a slice of hidden units on
chip, from the first step to the last. After each step they exchange what the next product needs through global memory
(the L2 cache) and wait for each other at a barrier. Groups know nothing of each other. Forward, the states are
exchanged; backward, the gradients of the gates, a result that is written anyway: the sums of partial products would
take as many bytes for the LSTM, more for the others, and a second pass over them.

A launch may hold several recurrences, each in a *lane* with groups and an exchange of its own.

Where lengths differ, a group whose sequences have all ended goes on: the launch lasts as long as its longest sequence.
The step design, whose programs share the chip, leaves out what has ended (``rnnkernels.kernels.triton.launch``).

The exchange has two slots, for even and odd steps: who writes a slot again has passed a barrier since all have read it.

Options of a cell that are pointwise ride along: resets, zoneout, recurrent dropout, peepholes, a bound on gradients.
The exchange then holds the state as the next product reads it, masked by dropout and by the next step's reset, and the
state itself stays with its program. What needs a whole row or a second product, ``general`` sends elsewhere.

On a CPU, the interpreter compares these kernels with the reference launched step by step, in one program with the
barrier, and with a process for each program; every tile compiles for its GPUs. None has been timed.
"""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkernels.kernels.triton import dispatch
from rnnkernels.kernels.triton.options import is_reset

COUNTER_STRIDE = tl.constexpr(32)
"""Elements from the counter of a group to that of the next: each has a cache line of its own."""


@triton.jit
def inner_units(SPLITS: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Units of a chunk, (split, unit): each warp multiplies one split, where ``tl.dot`` would have it repeat all."""
    size: tl.constexpr = BLOCK_INNER // SPLITS
    return tl.arange(0, SPLITS)[:, None] * size + tl.arange(0, size)[None, :]


@triton.jit
def load_weights(
    weight,
    columns,
    weight_size,
    inner_stride,
    column_stride,
    SPLITS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The part of a matrix that multiplies all units and gives those of ``columns``: chunks (split, unit, column)."""
    inner = inner_units(SPLITS, BLOCK_INNER)[:, :, None]
    column = columns[None, None, :]
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * BLOCK_INNER + inner
        within = (k < weight_size) & (column < weight_size)
        chunks += (tl.load(weight + k * inner_stride + column * column_stride, mask=within, other=0.0),)
    return chunks


@triton.jit
def exchange_places(
    exchange,
    rows,
    columns,
    PARTS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    lane=0,
):
    """In the first slot of the exchange: the first chunk to read, the first part to write. And the size of a slot."""
    row_size: tl.constexpr = PARTS * CHUNKS * BLOCK_INNER
    slot_size = tl.num_programs(0) * BLOCK_BATCH * row_size
    exchange += 2 * lane * slot_size
    source = exchange + rows[None, :, None] * row_size + inner_units(SPLITS, BLOCK_INNER)[:, None, :]
    target = exchange + rows[:, None] * row_size + columns[None, :]
    return source, target, slot_size


@triton.jit
def load_parts(pointer, size, mask, PARTS: tl.constexpr):
    """So many tiles, ``size`` elements from each to the next."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (tl.load(pointer + part * size, mask=mask, other=0.0),)
    return parts


@triton.jit
def store_parts(pointer, size, parts, mask):
    """Tiles, ``size`` elements from each to the next."""
    for part in tl.static_range(len(parts)):
        tl.store(pointer + part * size, parts[part], mask=mask)


@triton.jit
def accumulate(source, weights, sums, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr):
    """Add the product of what all programs of the group left at ``source`` with ``weights``, chunk by chunk."""
    # Past the L1 cache, which may hold what was there two steps ago.
    ahead = tl.load(source, cache_modifier=".cg")
    for chunk in tl.static_range(len(weights)):
        x = ahead
        if chunk + 1 < len(weights):
            ahead = tl.load(source + (chunk + 1) * BLOCK_INNER, cache_modifier=".cg")
        sums = tl.dot(x, weights[chunk], acc=sums, input_precision=PRECISION)
    return sums


@triton.jit
def multiply(source, weights, sums, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr):
    """That product, summed over the splits."""
    return tl.sum(accumulate(source, weights, sums, BLOCK_INNER, PRECISION), axis=0)


@triton.jit
def sum_two(a, b):
    """The sums of both over the splits, which go through shared memory together."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def length_of(lengths, rows, batch, sequence_length, HAS_LENGTHS: tl.constexpr):
    """Steps of each row, (row, 1)."""
    if HAS_LENGTHS:
        return tl.load(lengths + rows, mask=rows < batch, other=0)[:, None]
    else:
        return tl.zeros_like(rows)[:, None].to(tl.int64) + sequence_length


@triton.jit
def counter_of(counters, lane):
    """That of a program's group."""
    return counters + (lane * tl.num_programs(0) + tl.program_id(0)) * COUNTER_STRIDE


@triton.jit
def time_of(step, sequence_length, down):
    """The time of a step of a pass, up from the first or down from the last."""
    return tl.where(down, sequence_length - 1 - step, step)


@triton.jit
def is_first(time, length, reverse):
    """Whether a sequence takes its first step at this time."""
    return tl.where(reverse, length - 1, 0) == time


@triton.jit
def is_active(time, length):
    """Whether a sequence has this time; a pass may ask one step too far on either side."""
    return (tl.zeros_like(length) + time >= 0) & (time < length)


@triton.jit
def clears(reset, time, rows, batch, length):
    """Whether a reset clears the state that a step at this time starts from."""
    return is_reset(reset, time, rows[:, None], batch, (rows < batch)[:, None] & is_active(time, length))


def concurrent(device: torch.device) -> bool:
    """Whether the programs of a launch run at once, as a barrier needs: in the interpreter one follows the other."""
    return device.type == "cuda"


def empty_exchange(design: dispatch.Persistent, batch: int, parts: int, like: Tensor) -> Tensor:
    """(slot, row, part, unit), where there are lanes (lane, slot, …): zeros, which stay where no row or unit is."""
    rows = triton.cdiv(batch, design.block_batch) * design.block_batch
    lanes = () if design.lanes == 1 else (design.lanes,)
    return like.new_zeros(*lanes, 2, rows, parts, design.inner_size)


def exchange_from(design: dispatch.Persistent, state: Tensor) -> Tensor:
    """An exchange that holds the state before the first step."""
    batch, hidden_size = state.shape[-2:]
    exchange = empty_exchange(design, batch, 1, state)
    exchange[..., 1, :batch, 0, :hidden_size] = state
    return exchange


def state_after(exchange: Tensor, steps: int, like: Tensor) -> Tensor:
    """The state that so many steps have left."""
    batch, hidden_size = like.shape[-2:]
    return exchange[..., (steps - 1) % 2, :batch, 0, :hidden_size].clone(memory_format=torch.contiguous_format)


def launch(
    kernel,
    design: dispatch.Persistent,
    steps: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    **options,
) -> bool:
    """Run all steps in one launch, or one by one where programs do not run at once. False if the GPU refuses to.

    A kernel takes ``tensors``, counters for the groups, the step to begin with and the one to end before, and ``sizes``
    of sequence, batch, state and padded weights.
    """
    grid, device = design.grid(*sizes[1:3]), tensors[0].device
    counters = torch.zeros(design.lanes * grid[0] * COUNTER_STRIDE.value, dtype=torch.int32, device=device)
    together = concurrent(device)
    for first, last in [(0, steps)] if together else [(step, step + 1) for step in range(steps)]:
        try:
            kernel[grid](
                *tensors,
                counters,
                first,
                last,
                *sizes,
                BARRIER=together,
                launch_cooperative_grid=together,
                **design.constants(),
                **options,
            )
        except RuntimeError as error:
            if not any(reason in str(error) for reason in ("too many blocks in cooperative launch", "not supported")):
                raise
            dispatch.refuse(device)
            warnings.warn(
                f"{device} refused a cooperative launch ({error}); recurrences run one launch a step from now on",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True
