"""The linear recurrence on a GPU.

A step maps the state $h$ to $a h + b$. One kernel scans tiles of (time, channel) with the composition of such maps, and
carries the state from tile to tile; a channel is an element of a step. Its three regimes (``choose`` decides):

- *lanes*: a tile is as wide as a warp can load, so that each channel's steps lie in one thread, which takes them in
  turn. For steps so large that channels alone fill the GPU.
- *chunks*: taller tiles, whose steps are scanned across the threads of a program.
- *phases*: for long sequences of small steps, time is cut into spans with a program for each. One launch finds the map
  of each span, one scans those maps, and one scans the spans from the states that they start with.

The backward pass is the same scan against the direction of the forward pass, each decay one step late. Sums are
float32, and no product of decays is ever divided by.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

RUNTIME = ("sequence_length", "span", "batch")
"""Arguments on whose value no kernel is specialized: a new length or batch compiles nothing."""


@dataclass(frozen=True)
class Regime:
    """How a scan is divided among programs."""

    block_time: int
    """Steps in a tile."""
    block_channels: int
    """Channels in a tile."""
    num_warps: int
    """Warps in a program."""
    spans: bool = False
    """Whether time, too, is divided among programs."""

    def constants(self) -> dict[str, int]:
        """What a launch passes of this."""
        return {"BLOCK_TIME": self.block_time, "BLOCK": self.block_channels, "num_warps": self.num_warps}


REGIMES = {
    # A thread loads 16 bytes at once where rows start on such a bound. Where they do not, it loads element by element,
    # and larger tiles run out of registers.
    ("lanes", 4, True): Regime(block_time=4, block_channels=128, num_warps=1),
    ("lanes", 2, True): Regime(block_time=4, block_channels=256, num_warps=1),
    ("lanes", 4, False): Regime(block_time=8, block_channels=32, num_warps=1),
    ("lanes", 2, False): Regime(block_time=8, block_channels=32, num_warps=1),
    ("chunks", 4, True): Regime(block_time=64, block_channels=32, num_warps=4),
    ("chunks", 2, True): Regime(block_time=64, block_channels=32, num_warps=4),
    ("chunks", 4, False): Regime(block_time=32, block_channels=32, num_warps=4),
    ("chunks", 2, False): Regime(block_time=32, block_channels=32, num_warps=4),
    ("phases", 4, True): Regime(block_time=64, block_channels=32, num_warps=4, spans=True),
    ("phases", 2, True): Regime(block_time=64, block_channels=32, num_warps=4, spans=True),
    ("phases", 4, False): Regime(block_time=32, block_channels=32, num_warps=4, spans=True),
    ("phases", 2, False): Regime(block_time=32, block_channels=32, num_warps=4, spans=True),
}
"""By name, bytes an element, and whether ``hidden_size`` is a multiple of 16. Not timed on a GPU yet."""

PROGRAMS_PER_PROCESSOR = 4
"""How many programs the *phases* regime wants for each multiprocessor."""


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H100's where the interpreter stands in for one."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def choose(sequence_length: int, channels: int, device: torch.device) -> str:
    """The regime for a shape: the simplest whose programs have enough bytes on their way to hide memory's latency.

    By that model alone (4.8 TB/s and 0.7 µs ask for 25 KiB a multiprocessor): no bound has been measured on a GPU yet.
    """
    if channels >= 2048 * processors(device):
        return "lanes"
    if channels >= 64 * processors(device) or sequence_length <= 512:
        return "chunks"
    return "phases"


@triton.jit
def compose(a_first, b_first, a_second, b_second):
    """The map of two stretches of time, one after the other (Blelloch, CMU-CS-90-190, section 1.4)."""
    return a_first * a_second, a_second * b_first + b_second


@triton.jit
def moment(step, sequence_length, DESCENDING: tl.constexpr):
    """The time at which a pass takes its step of this number."""
    if DESCENDING:
        return sequence_length - 1 - step
    else:
        return step


@triton.jit
def decays(decay, reset, length, time, row, channel, mask, sequence_length, batch, channels, HAS_LENGTHS: tl.constexpr,
           HAS_RESET: tl.constexpr):  # fmt: skip
    """Decays at a time: zero where a sequence begins, one in padding and outside of the sequence."""
    mask = mask & (time >= 0) & (time < sequence_length)
    a = tl.load(decay + time.to(tl.int64) * channels + channel, mask=mask, other=1.0).to(tl.float32)
    if HAS_RESET:
        a = tl.where(tl.load(reset + time.to(tl.int64) * batch + row, mask=mask, other=0) != 0, 0.0, a)
    if HAS_LENGTHS:
        a = tl.where(time < length, a, 1.0)
    return a


@triton.jit(do_not_specialize=RUNTIME)
def scan(
    decay,
    added,
    initial,
    lengths,
    reset,
    states,
    h_0,
    result,
    grad_decay,
    final,
    sequence_length,
    span,
    batch,
    hidden_size,
    KIND: tl.constexpr,
    DESCENDING: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scan ``span`` steps of some channels, from the state that ``initial`` holds for this span.

    ``KIND`` is what becomes of it. "forward": ``added`` is the input, ``result`` receives the states, ``final`` the
    last. "backward": ``added`` is the gradient of the states, ``result`` receives that of the input, ``grad_decay``
    that of the decays, found with the forward pass's ``states`` and ``h_0``, and ``final`` that of h_0. "forward maps"
    and "backward maps": ``result`` and ``final`` receive the factor and the summand of the span's map.
    """
    BACKWARD: tl.constexpr = KIND == "backward" or KIND == "backward maps"
    MAPS: tl.constexpr = KIND == "forward maps" or KIND == "backward maps"
    channels = tl.cast(batch, tl.int64) * hidden_size
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    row = channel // hidden_size
    length = channel
    if HAS_LENGTHS:
        length = tl.load(lengths + row, mask=inside, other=0)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * span, sequence_length)
    of_part = part.to(tl.int64) * channels + channel
    in_tile = tl.arange(0, BLOCK_TIME)
    factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if MAPS:
        state = tl.zeros((BLOCK,), dtype=tl.float32)
    else:
        state = tl.load(initial + of_part, mask=inside, other=0.0).to(tl.float32)
    if KIND == "backward":
        outset = tl.load(h_0 + channel, mask=inside, other=0.0).to(tl.float32)
    for start in range(part * span, end, BLOCK_TIME):
        step = (start + in_tile)[:, None]
        mask = (step < end) & inside[None, :]
        time = moment(step, sequence_length, DESCENDING)
        tile = time.to(tl.int64) * channels + channel[None, :]
        late = moment(step - 1, sequence_length, DESCENDING) if BACKWARD else time
        a = decays(decay, reset, length[None, :], late, row[None, :], channel[None, :], mask, sequence_length, batch,
                   channels, HAS_LENGTHS, HAS_RESET)  # fmt: skip
        b = tl.load(added + tile, mask=mask, other=0.0).to(tl.float32)
        if HAS_LENGTHS:
            running = time < length[None, :]
            b = tl.where(running, b, 0.0)
        a, b = tl.associative_scan((a, b), 0, compose)
        h = a * state[None, :] + b
        last = in_tile[:, None] == BLOCK_TIME - 1
        state = tl.sum(tl.where(last, h, 0.0), 0)
        if MAPS:
            factor = factor * tl.sum(tl.where(last, a, 0.0), 0)
        elif BACKWARD:
            earlier = moment(step + 1, sequence_length, DESCENDING)
            known = (earlier >= 0) & (earlier < sequence_length)
            if HAS_LENGTHS:
                known = known & (earlier < length[None, :])
            before = tl.load(states + earlier.to(tl.int64) * channels + channel[None, :], mask=mask & known, other=0.0)
            through = h * tl.where(known, before.to(tl.float32), outset[None, :])
            if HAS_RESET:
                begins = tl.load(reset + time.to(tl.int64) * batch + row[None, :], mask=mask, other=0) != 0
                through = tl.where(begins, 0.0, through)
            if HAS_LENGTHS:
                h = tl.where(running, h, 0.0)
                through = tl.where(running, through, 0.0)
            tl.store(result + tile, h, mask=mask)
            tl.store(grad_decay + tile, through, mask=mask)
        else:
            if HAS_LENGTHS:
                h = tl.where(running, h, 0.0)
            tl.store(result + tile, h, mask=mask)
    if MAPS:
        tl.store(result + of_part, factor, mask=inside)
        tl.store(final + of_part, state, mask=inside)
    elif end == sequence_length:
        if BACKWARD:
            first = moment(sequence_length - 1, sequence_length, DESCENDING) + tl.zeros((BLOCK,), dtype=tl.int32)
            state *= decays(decay, reset, length, first, row, channel, inside, sequence_length, batch, channels,
                            HAS_LENGTHS, HAS_RESET)  # fmt: skip
        tl.store(final + channel, state, mask=inside)


def forward(
    decay: Tensor, input: Tensor, h_0: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States at every step, zero in padding, and the final state."""
    output, h_n = torch.empty_like(input, memory_format=torch.contiguous_format), torch.empty_like(h_0)
    if output.numel() == 0:
        return output, h_0.clone()
    _launch("forward", decay, input, h_0, lengths, reset, None, None, output, None, h_n, reverse)
    return output, h_n.contiguous()


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    output: Tensor,
    decay: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the decays, of the input and of the initial state."""
    grad_decay, grad_input = torch.empty_like(output), torch.empty_like(output)
    if output.numel() == 0:
        return grad_decay, grad_input, grad_h_n.clone()
    grad_h_0 = torch.empty_like(grad_h_n, memory_format=torch.contiguous_format)
    results = grad_input, grad_decay, grad_h_0
    _launch("backward", decay, grad_output, grad_h_n, lengths, reset, output, h_0, *results, not reverse)
    return grad_decay, grad_input, grad_h_0


def _launch(
    kind: str,
    decay: Tensor,
    added: Tensor,
    initial: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    states: Tensor | None,
    h_0: Tensor | None,
    result: Tensor,
    grad_decay: Tensor | None,
    final: Tensor,
    descending: bool,
) -> None:
    """Run the kernel of a pass in the regime that suits its shape; the arguments are the kernel's."""
    sequence_length, batch, hidden_size = decay.shape
    channels = batch * hidden_size
    name = choose(sequence_length, channels, decay.device)
    regime = REGIMES[name, decay.element_size(), hidden_size % 16 == 0]
    decay, added, initial = decay.contiguous(), added.contiguous(), initial.contiguous()
    reset = None if reset is None else reset.contiguous().view(torch.uint8)
    lengths = None if lengths is None else lengths.contiguous()
    h_0 = None if h_0 is None else h_0.contiguous()
    options = {
        "DESCENDING": descending,
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESET": reset is not None,
        **regime.constants(),
    }
    width, span, spans = triton.cdiv(channels, regime.block_channels), sequence_length, 1
    if regime.spans:
        tiles = triton.cdiv(sequence_length, regime.block_time)
        wanted = min(tiles, max(1, PROGRAMS_PER_PROCESSOR * processors(decay.device) // width))
        span = triton.cdiv(tiles, wanted) * regime.block_time
        spans = triton.cdiv(sequence_length, span)
    if spans > 1:
        factor, summand, starts = torch.empty(3, spans, channels, device=decay.device).unbind(0)
        sequences = decay, added, None, lengths, reset, None, None, factor, None, summand
        scan[(width, spans)](*sequences, sequence_length, span, batch, hidden_size, KIND=f"{kind} maps", **options)
        # The spans' maps are a recurrence of their own. Its states, one span later, are what the spans start from.
        starts[0] = initial.flatten()
        options_of_maps = {**options, "DESCENDING": False, "HAS_LENGTHS": False, "HAS_RESET": False}
        sequences = factor, summand, starts, None, None, None, None, starts[1:], None, torch.empty_like(starts[0])
        scan[(width, 1)](*sequences, spans - 1, spans - 1, 1, channels, KIND="forward", **options_of_maps)
        initial = starts
    sequences = decay, added, initial, lengths, reset, states, h_0, result, grad_decay, final
    scan[(width, spans)](*sequences, sequence_length, span, batch, hidden_size, KIND=kind, **options)
