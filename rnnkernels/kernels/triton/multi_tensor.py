"""Work on many tensors in one launch: norms, clipping, and the steps of the optimizers.

A kernel finds its tensors through a table of addresses in the GPU's memory: a row for each role (parameter, gradient,
state ...), a column for each tensor, and a last row of sizes. A program takes one chunk of one tensor, and a second
table says which. Both stay on the GPU from call to call for as long as the addresses do. A sum comes as one partial sum
a program, which a second kernel adds up in a fixed order: the same gradients give the same bits. Nothing here waits for
the GPU, and all of it can be captured in a CUDA graph.

A tensor is taken as what lies in its memory: it must be dense, and the tensors of one column must be strided alike.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkernels.kernels.triton.tables import ELEMENTS, kept

BLOCK = 1024
"""Elements that a program takes at a time."""
CHUNK = 8 * BLOCK
"""Elements that a program takes in all."""
FINISH_BLOCK = 2048
"""Partial sums that the finishing kernel takes at a time."""
WARPS = 4

NORMS = (1.0, 2.0, math.inf)
"""Orders of the norms that have a kernel."""

RUNTIME = ["tensors", "programs", "count"]

_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_chunks: OrderedDict[tuple, Tensor] = OrderedDict()
_captured: list[Tensor] = []


# ---------------------------------------------------------------- tables


def _chunks_of(sizes: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """For each program its tensor, in the first row, and which chunk of it, in the second."""
    counts = torch.tensor([-(-size // length) for size, length in zip(sizes, lengths, strict=True)])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = counts.cumsum(0) - counts
    return torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]]).int()


class Launch:
    """The tables and compile-time constants of launches over the same tensors.

    Parameters
    ----------
    roles : sequence of sequences of Tensor
        For each role its tensors: none empty, all of one type, on one device.
    lengths : sequence of int, optional
        Elements of each tensor that a program takes, :data:`CHUNK` where left out.
    """

    def __init__(self, *roles: Sequence[Tensor], lengths: Sequence[int] | None = None):
        self.device = device = roles[0][0].device
        sizes = tuple(tensor.numel() for tensor in roles[0])
        addresses = tuple(tensor.data_ptr() for role in roles for tensor in role)
        last = sizes if lengths is None else tuple(lengths)
        lengths = (CHUNK,) * len(sizes) if lengths is None else last

        def table():
            return torch.tensor([*addresses, *last])

        def chunks():
            return _chunks_of(sizes, lengths)

        if device.type != "cuda":
            self.table, self.chunks = table(), chunks()
        elif torch.cuda.is_current_stream_capturing():
            # The graph copies these again at every replay, so both ends of the copy have to stay.
            sources = table().pin_memory(), chunks().pin_memory()
            self.table, self.chunks = (source.to(device, non_blocking=True) for source in sources)
            _captured.extend((*sources, self.table, self.chunks))
        else:
            where = device, torch.cuda.current_stream(device).cuda_stream
            upload = lambda make: lambda: make().pin_memory().to(device, non_blocking=True)  # noqa: E731
            self.table = kept(_tables, (where, addresses, last), upload(table))
            self.chunks = kept(_chunks, (where, sizes, lengths), upload(chunks))
        self.tensors, self.programs = len(sizes), self.chunks.shape[1]
        self.constants = {
            "ELEMENTS": tuple(ELEMENTS[role[0].dtype] for role in roles),
            "ALIGNED": all(address % 16 == 0 for address in addresses),
            "num_warps": WARPS,
        }

    def __call__(self, kernel, *arguments, **constants):
        """Launch a kernel that takes both tables, how long they are, and the arguments."""
        tables = self.table, self.chunks, self.tensors, self.programs
        with torch.cuda.device_of(self.table):
            kernel[(self.programs,)](*tables, *arguments, **constants, **self.constants)


def by_type(*roles: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The roles, split so that within each all tensors have one type. Empty tensors are left out."""
    groups: dict[tuple, tuple[list[Tensor], ...]] = {}
    for column in zip(*roles, strict=True):
        if column[0].numel():
            group = groups.setdefault(tuple(tensor.dtype for tensor in column), tuple([] for _ in roles))
            for role, tensor in zip(group, column, strict=True):
                role.append(tensor)
    yield from groups.values()


@triton.jit
def locate(table, chunks, tensors, programs, ROLES: tl.constexpr, CHUNK: tl.constexpr):
    """The tensor of this program, where its chunk begins, and how many elements the tensor has from there on."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program)
    start = tl.load(chunks + programs + program).to(tl.int64) * CHUNK
    return tensor, start, tl.load(table + ROLES * tensors + tensor) - start


@triton.jit
def pointer(table, tensor, tensors, start, ROLE: tl.constexpr, ELEMENTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the chunk of a role's tensor begins."""
    address = tl.load(table + ROLE * tensors + tensor).to(tl.pointer_type(ELEMENTS[ROLE]))
    if ALIGNED:
        # Chunks are multiples of 16 bytes, so what holds for the tensor holds for them.
        return tl.multiple_of(address + start, 16)
    else:
        return address + start


@triton.jit
def read(source, offsets, remaining, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(source + offsets, mask=offsets < remaining, other=0.0).to(tl.float32)
    else:
        return tl.load(source + offsets).to(tl.float32)


@triton.jit
def write(target, offsets, remaining, value, MASKED: tl.constexpr):
    if MASKED:
        tl.store(target + offsets, value, mask=offsets < remaining)
    else:
        tl.store(target + offsets, value)


# ---------------------------------------------------------------- norms and clipping


@triton.jit
def accumulate(total, value, NORM: tl.constexpr):
    if NORM == 1:
        return total + tl.abs(value)
    elif NORM == 2:
        return total + value * value
    else:
        return tl.maximum(total, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def combine(total, NORM: tl.constexpr):
    """The sum of a block, or its largest element: NaN where it has a NaN."""
    if NORM == 1 or NORM == 2:
        return tl.sum(total)
    else:
        missing = total != total
        largest = tl.max(tl.where(missing, 0.0, total))
        return tl.where(tl.sum(missing.to(tl.int32)) > 0, float("nan"), largest)


@triton.jit(do_not_specialize=RUNTIME)
def norm_kernel(
    table,
    chunks,
    tensors,
    programs,
    partials,
    NORM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, start, remaining = locate(table, chunks, tensors, programs, 1, CHUNK)
    source = pointer(table, tensor, tensors, start, 0, ELEMENTS, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Only loads without a mask are sure to be wide.
    if remaining >= CHUNK:
        for _ in range(0, CHUNK, BLOCK):
            total = accumulate(total, read(source, offsets, remaining, False), NORM)
            offsets += BLOCK
    else:
        for _ in range(0, remaining.to(tl.int32), BLOCK):
            total = accumulate(total, read(source, offsets, remaining, True), NORM)
            offsets += BLOCK
    tl.store(partials + tl.program_id(0), combine(total, NORM))


@triton.jit(do_not_specialize=RUNTIME)
def finish_kernel(partials, results, max_norm, count, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """The norm, and the factor that brings it down to ``max_norm``, as ``torch.nn.utils`` defines it."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        partial = tl.load(partials + offsets, mask=offsets < count, other=0.0)
        if NORM == 1 or NORM == 2:
            total += partial
        else:
            total = tl.maximum(total, partial, propagate_nan=tl.PropagateNan.ALL)
    norm = combine(total, NORM)
    if NORM == 2:
        norm = tl.sqrt_rn(norm)
    factor = tl.div_rn(max_norm, norm + 1e-6)
    tl.store(results, norm)
    tl.store(results + 1, tl.where(factor > 1.0, 1.0, factor))  # NaN stays NaN


@triton.jit(do_not_specialize=RUNTIME)
def scale_kernel(
    table,
    chunks,
    tensors,
    programs,
    factor,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    by = tl.load(factor)
    if by != 1.0:  # most steps need no clipping, and then nothing is read; NaN is not 1
        tensor, start, remaining = locate(table, chunks, tensors, programs, 1, CHUNK)
        target = pointer(table, tensor, tensors, start, 0, ELEMENTS, ALIGNED)
        offsets = tl.arange(0, BLOCK)
        if remaining >= CHUNK:
            for _ in range(0, CHUNK, BLOCK):
                write(target, offsets, remaining, read(target, offsets, remaining, False) * by, False)
                offsets += BLOCK
        else:
            for _ in range(0, remaining.to(tl.int32), BLOCK):
                write(target, offsets, remaining, read(target, offsets, remaining, True) * by, True)
                offsets += BLOCK


@triton.jit
def clamp_block(target, offsets, remaining, bound, MASKED: tl.constexpr):
    value = read(target, offsets, remaining, MASKED)
    value = tl.where(value > bound, bound, tl.where(value < -bound, -bound, value))  # NaN stays NaN
    write(target, offsets, remaining, value, MASKED)


@triton.jit(do_not_specialize=RUNTIME)
def clamp_kernel(
    table,
    chunks,
    tensors,
    programs,
    bound,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, start, remaining = locate(table, chunks, tensors, programs, 1, CHUNK)
    target = pointer(table, tensor, tensors, start, 0, ELEMENTS, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    if remaining >= CHUNK:
        for _ in range(0, CHUNK, BLOCK):
            clamp_block(target, offsets, remaining, bound, False)
            offsets += BLOCK
    else:
        for _ in range(0, remaining.to(tl.int32), BLOCK):
            clamp_block(target, offsets, remaining, bound, True)
            offsets += BLOCK


@triton.jit(do_not_specialize=RUNTIME)
def adaptive_kernel(
    table,
    chunks,
    tensors,
    programs,
    clip_factor,
    eps,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes a unit: a row of a weight. The last row of the table says how long those are."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program)
    length = tl.load(table + 2 * tensors + tensor)
    start = tl.load(chunks + programs + program) * length
    # Rows may begin anywhere.
    weight = pointer(table, tensor, tensors, start, 0, ELEMENTS, False)
    gradient = pointer(table, tensor, tensors, start, 1, ELEMENTS, False)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    gradient_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, length, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        weight_sum = accumulate(weight_sum, read(weight, offsets, length, True), 2)
        gradient_sum = accumulate(gradient_sum, read(gradient, offsets, length, True), 2)
    largest = clip_factor * tl.maximum(tl.sqrt_rn(tl.sum(weight_sum)), eps)
    norm = tl.sqrt_rn(tl.sum(gradient_sum))
    if norm > largest:
        for first in range(0, length, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            value = read(gradient, offsets, length, True) * tl.div_rn(largest, norm)
            write(gradient, offsets, length, value, True)


def norm_and_factor(gradients: Sequence[Tensor], max_norm: float, norm: float) -> Tensor:
    """The norm of all gradients as one vector, and the factor that clips it: float32, shape (2,), on the device."""
    results = gradients[0].new_empty(2, dtype=torch.float32)
    launches = [Launch(group) for (group,) in by_type(gradients)]
    count = sum(launch.programs for launch in launches)
    partials = results.new_empty(count)
    first = 0
    for launch in launches:
        launch(norm_kernel, partials[first:], NORM=norm, BLOCK=BLOCK, CHUNK=CHUNK)
        first += launch.programs
    with torch.cuda.device_of(results):
        finish_kernel[(1,)](partials, results, max_norm, count, NORM=norm, BLOCK=FINISH_BLOCK, num_warps=WARPS)
    return results


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all by a number that lies on the GPU, in place."""
    for (group,) in by_type(tensors):
        Launch(group)(scale_kernel, factor, BLOCK=BLOCK, CHUNK=CHUNK)


def clamp(tensors: Sequence[Tensor], bound: float) -> None:
    """Bring every element into [-bound, bound], in place."""
    for (group,) in by_type(tensors):
        Launch(group)(clamp_kernel, bound, BLOCK=BLOCK, CHUNK=CHUNK)


def adaptive_clip(weights: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float) -> None:
    """Bring the norm of each unit's gradient to at most ``clip_factor`` of the unit's own, in place."""
    for columns in by_type(weights, gradients):
        lengths = [weight.numel() // weight.shape[0] if weight.dim() > 1 else weight.numel() for weight in columns[0]]
        Launch(*columns, lengths=lengths)(adaptive_kernel, clip_factor, eps, BLOCK=BLOCK)


# ---------------------------------------------------------------- optimizers


@triton.jit
def one_minus_power(log_base, exponent):
    """$1 - b^t$ from $\\log b$, without the cancellation for $b$ near 1."""
    x = log_base * exponent
    series = -x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0))))))
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def sgd(p, g, buffer, lr, momentum, rest_1, FIRST: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    if MOMENTUM:
        if FIRST:
            buffer = g
        else:
            buffer = buffer * momentum + g * rest_1
        if NESTEROV:
            g += momentum * buffer
        else:
            g = buffer
    return p - lr * g, buffer


@triton.jit
def adagrad(p, g, total, lr, eps):
    total += g * g
    return p - lr * tl.div_rn(g, tl.sqrt_rn(total) + eps), total


@triton.jit
def rmsprop(
    p,
    g,
    square,
    mean,
    buffer,
    lr,
    eps,
    momentum,
    decay_2,
    rest_2,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    square = square * decay_2 + g * g * rest_2
    variance = square
    if CENTERED:
        mean += (g - mean) * rest_2
        variance -= mean * mean
    update = tl.div_rn(g, tl.sqrt_rn(variance) + eps)
    if MOMENTUM:
        buffer = buffer * momentum + update
        update = buffer
    return p - lr * update, square, mean, buffer


@triton.jit
def adam(p, g, mean, square, largest, lr, eps, rest_1, decay_2, rest_2, bias_1, bias_2_root, AMSGRAD: tl.constexpr):
    mean += (g - mean) * rest_1
    square = square * decay_2 + g * g * rest_2
    second = square
    if AMSGRAD:
        largest = tl.maximum(largest, square, propagate_nan=tl.PropagateNan.ALL)
        second = largest
    denominator = tl.div_rn(tl.sqrt_rn(second), bias_2_root) + eps
    return p - tl.div_rn(lr, bias_1) * tl.div_rn(mean, denominator), mean, square, largest


@triton.jit
def step_block(
    param,
    grad,
    state_0,
    state_1,
    state_2,
    offsets,
    remaining,
    factor,
    lr,
    weight_decay,
    eps,
    momentum,
    rest_1,
    decay_2,
    rest_2,
    bias_1,
    bias_2_root,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    CENTERED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    DECAY: tl.constexpr,
    STATES: tl.constexpr,
    MASKED: tl.constexpr,
):
    p = read(param, offsets, remaining, MASKED)
    g = read(grad, offsets, remaining, MASKED)
    if HAS_FACTOR:
        g *= factor
    if MAXIMIZE:
        g = -g
    if DECAY == "decoupled":
        p *= 1.0 - lr * weight_decay
    elif DECAY == "gradient":  # only where there is any: 0 times an infinite weight would be NaN
        g += weight_decay * p
    # A state that the rule does not have is never stored.
    first, second, third = g, g, g
    if STATES > 0:
        first = read(state_0, offsets, remaining, MASKED)
    if STATES > 1:
        second = read(state_1, offsets, remaining, MASKED)
    if STATES > 2:
        third = read(state_2, offsets, remaining, MASKED)

    if RULE == "sgd":
        p, first = sgd(p, g, first, lr, momentum, rest_1, FIRST, STATES > 0, NESTEROV)
    elif RULE == "adagrad":
        p, first = adagrad(p, g, first, lr, eps)
    elif RULE == "rmsprop":
        if CENTERED:
            p, first, second, third = rmsprop(
                p, g, first, second, third, lr, eps, momentum, decay_2, rest_2, True, STATES > 2
            )
        else:
            p, first, third, second = rmsprop(
                p, g, first, third, second, lr, eps, momentum, decay_2, rest_2, False, STATES > 1
            )
    else:
        p, first, second, third = adam(
            p, g, first, second, third, lr, eps, rest_1, decay_2, rest_2, bias_1, bias_2_root, STATES > 2
        )

    write(param, offsets, remaining, p, MASKED)
    if STATES > 0:
        write(state_0, offsets, remaining, first, MASKED)
    if STATES > 1:
        write(state_1, offsets, remaining, second, MASKED)
    if STATES > 2:
        write(state_2, offsets, remaining, third, MASKED)


@triton.jit(do_not_specialize=RUNTIME)
def step_kernel(
    table,
    chunks,
    tensors,
    programs,
    factor,
    lr,
    weight_decay,
    eps,
    momentum,
    rest_1,
    decay_2,
    rest_2,
    log_1,
    log_2,
    lr_decay,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    CENTERED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
    DECAY: tl.constexpr,
    COUNTS: tl.constexpr,
    STATES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The roles: parameter, gradient, the states, and the step's number where the rule ``COUNTS``."""
    tensor, start, remaining = locate(table, chunks, tensors, programs, 2 + STATES + COUNTS, CHUNK)
    param = pointer(table, tensor, tensors, start, 0, ELEMENTS, ALIGNED)
    grad = pointer(table, tensor, tensors, start, 1, ELEMENTS, ALIGNED)
    state_0, state_1, state_2 = param, param, param
    if STATES > 0:
        state_0 = pointer(table, tensor, tensors, start, 2, ELEMENTS, ALIGNED)
    if STATES > 1:
        state_1 = pointer(table, tensor, tensors, start, 3, ELEMENTS, ALIGNED)
    if STATES > 2:
        state_2 = pointer(table, tensor, tensors, start, 4, ELEMENTS, ALIGNED)
    rate = lr
    if LR_IS_TENSOR:
        rate = tl.load(lr).to(tl.float32)
    by = 1.0
    if HAS_FACTOR:
        by = tl.load(factor)
    bias_1, bias_2_root = 1.0, 1.0
    if COUNTS:
        step = tl.load(pointer(table, tensor, tensors, 0, 2 + STATES, ELEMENTS, False))
        if RULE == "adam":
            bias_1 = one_minus_power(log_1, step)
            bias_2_root = tl.sqrt_rn(one_minus_power(log_2, step))
        else:
            rate = tl.div_rn(rate, 1.0 + (step - 1.0) * lr_decay)
    offsets = tl.arange(0, BLOCK)
    if remaining >= CHUNK:
        for _ in range(0, CHUNK, BLOCK):
            step_block(
                param, grad, state_0, state_1, state_2, offsets, remaining, by, rate, weight_decay, eps, momentum,
                rest_1, decay_2, rest_2, bias_1, bias_2_root, RULE, FIRST, NESTEROV, CENTERED, MAXIMIZE, HAS_FACTOR,
                DECAY, STATES, False,
            )  # fmt: skip
            offsets += BLOCK
    else:
        for _ in range(0, remaining.to(tl.int32), BLOCK):
            step_block(
                param, grad, state_0, state_1, state_2, offsets, remaining, by, rate, weight_decay, eps, momentum,
                rest_1, decay_2, rest_2, bias_1, bias_2_root, RULE, FIRST, NESTEROV, CENTERED, MAXIMIZE, HAS_FACTOR,
                DECAY, STATES, True,
            )  # fmt: skip
            offsets += BLOCK


def step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    factor: Tensor | None = None,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    first: bool = False,
    nesterov: bool = False,
    centered: bool = False,
    eps: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    lr_decay: float = 0.0,
) -> None:
    """One step of ``rule``, in place, on tensors of one device.

    ``states`` holds, for each buffer of the rule, one tensor a parameter: the momentum of ``"sgd"``, the sum of
    ``"adagrad"``, the mean square of ``"rmsprop"``, with the mean if ``centered`` and the momentum after it, and the
    mean, the mean square and its maximum of ``"adam"``. ``steps``, float32 tensors of one element, have been counted up
    already. ``factor``, a tensor of one element, multiplies every gradient. ``first``: momentum begins with this
    gradient.
    """
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    # What is left of one is formed in float64: in float32 it would lose four digits.
    rest_1 = 1 - (dampening if rule == "sgd" else betas[0])
    counts = [] if steps is None else [steps]
    lr = lr if isinstance(lr, Tensor) else float(lr)
    decay = "none" if weight_decay == 0 else "decoupled" if decoupled else "gradient"
    for columns in by_type(params, grads, *states, *counts):
        Launch(*columns)(
            step_kernel,
            lr if factor is None else factor,
            lr,
            float(weight_decay),
            float(eps),
            float(momentum),
            float(rest_1),
            float(betas[1]),
            float(1 - betas[1]),
            logs[0],
            logs[1],
            float(lr_decay),
            RULE=rule,
            FIRST=first,
            NESTEROV=nesterov,
            CENTERED=centered,
            MAXIMIZE=maximize,
            HAS_FACTOR=factor is not None,
            LR_IS_TENSOR=isinstance(lr, Tensor),
            DECAY=decay,
            COUNTS=steps is not None,
            STATES=len(states),
            BLOCK=BLOCK,
            CHUNK=CHUNK,
        )
