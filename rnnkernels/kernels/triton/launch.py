"""Launch a kernel for every step of a recurrence, at little cost to the host.

Each time, Triton's Python finds out anew what to launch, which costs it several times what the launch of a compiled
kernel does. So a pass launches its first step that way, then replays a CUDA graph of :data:`CHUNK` steps for as long as
so many are left, and launches the rest through the compiled kernel.

A graph holds the addresses that it was captured with, and a pass comes with tensors of its own: the kernels find the
tensors, the sizes and the time through a table in the GPU's memory, which each pass writes anew. So one graph serves
every sequence length, every batch of as many tiles, and all tensors, and no result lies in memory that a later pass
writes. The table belongs to the stream, on which the passes follow each other. Within a caller's own capture, and where
there are no CUDA graphs, every step is launched: by the same kernels, so that the numbers are the same.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from rnnkernels.kernels.triton import dispatch
from rnnkernels.kernels.triton.tables import ELEMENTS, kept

CHUNK = 32
"""Steps in a graph."""

TIME, LENGTH, BATCH, TENSORS = (tl.constexpr(row) for row in range(4))
"""Rows of the table: the time from which steps count, the length of the sequences, the batch, and the addresses."""

MOST_TENSORS = 10
"""Addresses in a table."""

RUNTIME = ("step",)
"""Arguments on whose value no step is specialized."""


# What the kernels begin with


@triton.jit
def wait_for_the_step_before(DEPENDENT: tl.constexpr):
    """Let the next launch begin as early as this one did, and wait for what the launch before leaves in memory."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def moment(table, step):
    """The time of a step, the length of the sequences, and the batch."""
    time = tl.load(table + TIME).to(tl.int32) + step
    return time, tl.load(table + LENGTH).to(tl.int32), tl.load(table + BATCH).to(tl.int32)


@triton.jit
def lookup(table, INDEX: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor of the pass begins."""
    address = tl.load(table + TENSORS + INDEX).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        return tl.multiple_of(address, 16)
    else:
        return address


@triton.jit
def at(sequence, time, batch, size):
    """Where a step of a sequence begins."""
    return sequence + tl.cast(time, tl.int64) * batch * size


@triton.jit
def rows_before(sequence, initial, time, length, batch, size, row_offset, REVERSE: tl.constexpr):
    """Where the rows of the state before a step begin; ``length`` is that of all sequences, or of each."""
    if REVERSE:
        return tl.where(time >= length - 1, initial + row_offset, at(sequence, time + 1, batch, size) + row_offset)
    else:
        return tl.where(time == 0, initial + row_offset, at(sequence, time - 1, batch, size) + row_offset)


@triton.jit
def rows_at(order, positions, batch, HAS_LENGTHS: tl.constexpr):
    """Rows of the batch in order of falling length, so that sequences which have ended share programs."""
    if HAS_LENGTHS:
        return tl.load(order + positions, mask=positions < batch, other=0).to(tl.int32)
    else:
        return positions


@triton.jit
def inner_size(length, time, hidden_size, HAS_LENGTHS: tl.constexpr):
    """Hidden units to multiply with: none where all of a program's sequences have ended."""
    if HAS_LENGTHS:
        return tl.where(tl.max(length) > time, hidden_size, 0)
    else:
        return hidden_size


@triton.jit
def weight_tile(pointers, mask):
    """A tile of the recurrent weights, which the L2 cache shall keep for the next step.

    Triton's pipelined loads take no such hint: it reaches the tiles with one stage.
    """
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def stream(pointers, value, mask):
    """Store what no later step reads: it shall leave the L2 cache before the weights do."""
    tl.store(pointers, value, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=("time", "length", "batch", *(f"tensor_{k}" for k in range(MOST_TENSORS))))
def write_table(
    table,
    time,
    length,
    batch,
    tensor_0: tl.int64,
    tensor_1: tl.int64,
    tensor_2: tl.int64,
    tensor_3: tl.int64,
    tensor_4: tl.int64,
    tensor_5: tl.int64,
    tensor_6: tl.int64,
    tensor_7: tl.int64,
    tensor_8: tl.int64,
    tensor_9: tl.int64,
):
    tl.store(table + TIME, time)
    tl.store(table + LENGTH, length)
    tl.store(table + BATCH, batch)
    tl.store(table + TENSORS, tensor_0)
    tl.store(table + TENSORS + 1, tensor_1)
    tl.store(table + TENSORS + 2, tensor_2)
    tl.store(table + TENSORS + 3, tensor_3)
    tl.store(table + TENSORS + 4, tensor_4)
    tl.store(table + TENSORS + 5, tensor_5)
    tl.store(table + TENSORS + 6, tensor_6)
    tl.store(table + TENSORS + 7, tensor_7)
    tl.store(table + TENSORS + 8, tensor_8)
    tl.store(table + TENSORS + 9, tensor_9)


@triton.jit(do_not_specialize=("steps",))
def advance(table, steps):
    tl.store(table + TIME, tl.load(table + TIME) + steps)


# What the host does

_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_graphs: OrderedDict[tuple, Callable[[], None]] = OrderedDict()
_one_pass = threading.Lock()


def carried(gradient: Tensor, times: range) -> Tensor:
    """Memory for what a step back reads and what it leaves, in turns: at the parity of its time, and at the other."""
    both = gradient.new_empty(2, *gradient.shape, dtype=torch.float32)
    both[times[0] % 2] = gradient
    return both


def left_of(both: Tensor, times: range, dtype: torch.dtype) -> Tensor:
    """What the last step back left there."""
    return both[1 - times[-1] % 2].to(dtype, copy=True)


def by_length(lengths: Tensor | None) -> Tensor | None:
    """What :func:`rows_at` reads: the rows, the longest sequence first."""
    return None if lengths is None else torch.argsort(lengths, descending=True, stable=True)


def final_state(output: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state after the last step taken."""
    if reverse or lengths is None:
        return output[0 if reverse else -1].clone()
    return output[lengths - 1, torch.arange(len(lengths), device=lengths.device)]


def graphs_serve(device: torch.device) -> bool:
    """Whether steps on this device can be replayed as a CUDA graph now."""
    return device.type == "cuda" and torch.version.cuda is not None and not torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The stream on which launches follow each other."""
    return torch.cuda.current_stream(device).cuda_stream


def capture(launches: Callable[[], None]) -> Callable[[], None]:
    """A function that launches again, on the current stream, what ``launches`` launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads go on with what they do
        try:
            launches()
        finally:
            graph.capture_end()
    return graph.replay


def _launcher(kernel, compiled: CompiledKernel | None, grid: tuple[int, ...], constants: dict) -> Callable[..., None]:
    """A function of the arguments that are no constants, which launches what has been compiled for them."""
    if not isinstance(compiled, CompiledKernel):  # there is nothing compiled in the interpreter
        return lambda *arguments: kernel[grid](*arguments, **constants)
    launch, values = compiled[(*grid, 1, 1)[:3]], [constants[name] for name in kernel.arg_names if name in constants]
    return lambda *arguments: launch(*arguments, *values)


def run_steps(
    kernel,
    design: dispatch.Step,
    tensors: Sequence[Tensor | None],
    sizes: tuple[int, int, int, int],
    times: range,
    **constants: object,
) -> None:
    """Launch ``kernel`` for each of the ``times``.

    Parameters
    ----------
    kernel
        Takes the table, the step, the hidden size and the weights', and constants.
    design : dispatch.Step
        Its tile.
    tensors : sequence of Tensor or None
        What it finds through the table, in this order: contiguous, one for a whole sequence.
    sizes : tuple of int
        Sequence length, batch, hidden size, and that of the padded weights.
    times : range
        All steps, in the order in which they are taken.
    **constants
        Its compile-time arguments, without those of the design.
    """
    sequence_length, batch, *widths = sizes
    device, given = tensors[0].device, [tensor for tensor in tensors if tensor is not None]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    addresses += [0] * (MOST_TENSORS - len(addresses))
    constants |= {
        "ELEMENT": ELEMENTS[tensors[0].dtype],
        "ALIGNED": all(tensor.data_ptr() % 16 == 0 for tensor in given if tensor.is_floating_point()),
        "DEPENDENT": dispatch.programmatic_launch(device),
        **design.constants(),
    }
    if constants["DEPENDENT"]:
        constants["launch_pdl"] = True
    grid, direction = design.grid(batch, widths[0]), times.step
    as_graph = graphs_serve(device)
    with _one_pass:  # two threads on one stream share its table

        def make_table():
            return torch.empty(TENSORS.value + MOST_TENSORS, dtype=torch.int64, device=device)

        table = kept(_tables, (device, stream_of(device)), make_table) if as_graph else make_table()
        write_table[(1,)](table, times[0], sequence_length, batch, *addresses)
        launch = _launcher(kernel, kernel[grid](table, 0, *widths, **constants), grid, constants)

        def launch_chunk():
            for step in range(1, CHUNK + 1):
                launch(table, direction * step, *widths)
            advance[(1,)](table, direction * CHUNK)

        left = sequence_length - 1
        if as_graph and left >= CHUNK:
            advance[(1,)](table, 0)  # loaded before it is captured
            key = kernel, *constants.items(), grid, table.data_ptr(), *widths
            replay = kept(_graphs, key, lambda: capture(launch_chunk))
            for _ in range(left // CHUNK):
                replay()
            left %= CHUNK
        for step in range(1, left + 1):
            launch(table, direction * step, *widths)
