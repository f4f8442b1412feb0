"""Which design and tile a recurrence runs with, and why: the one table of it.

Resource figures come from offline compilation (Triton 3.7), which ``tests/test_compilation.py`` repeats for every row
on an H100, and for some on other GPUs. Triton 3.5 and 3.6 gave the same for the rows that were tried with them.
No row has been timed on a GPU yet.
"""

import math
import os
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import triton


@dataclass(frozen=True)
class Resident:
    """One program takes a tile of the batch through all steps, the recurrent weights in its shared memory."""

    block_batch: int
    """Rows of the batch in a program."""
    block_hidden: int
    """Hidden units: ``hidden_size`` rounded up to a power of two, at least 16."""
    num_warps: int
    """Warps in a program."""
    lanes: int = 1
    """Recurrences in the launch, each with programs of its own: the directions of a layer."""

    def grid(self, batch: int, hidden_size: int) -> tuple[int, ...]:
        """Programs in a launch, and lanes where there are several."""
        programs = triton.cdiv(batch, self.block_batch)
        return (programs,) if self.lanes == 1 else (programs, 1, self.lanes)

    def constants(self) -> dict[str, int]:
        """What a launch passes of this."""
        return {"BLOCK_BATCH": self.block_batch, "BLOCK_HIDDEN": self.block_hidden, "num_warps": self.num_warps}


@dataclass(frozen=True)
class Persistent:
    """One cooperative launch; a group of programs takes a tile of the batch through all steps, the recurrent weights
    spread over their shared memories, and waits at a barrier after every step."""

    block_batch: int
    """Rows of the batch in a group."""
    block_hidden: int
    """Hidden units in a program."""
    block_inner: int
    """Hidden units of the previous step that it takes at a time."""
    chunks: int
    """How many times it does."""
    num_warps: int = 8
    """Warps in a program, which divide the sums over the hidden units of the previous step among them."""
    lanes: int = 1
    """Recurrences in the launch, each with groups of its own: the directions of a layer, or layers."""

    @property
    def inner_size(self) -> int:
        """``hidden_size`` with the padding of the products."""
        return self.chunks * self.block_inner

    def grid(self, batch: int, hidden_size: int) -> tuple[int, ...]:
        """Groups of a lane, programs in each, and lanes where there are several."""
        groups, programs = triton.cdiv(batch, self.block_batch), triton.cdiv(hidden_size, self.block_hidden)
        return (groups, programs) if self.lanes == 1 else (groups, programs, self.lanes)

    def constants(self) -> dict[str, int]:
        """What a launch passes of this."""
        return {
            "BLOCK_BATCH": self.block_batch,
            "BLOCK_HIDDEN": self.block_hidden,
            "BLOCK_INNER": self.block_inner,
            "CHUNKS": self.chunks,
            "SPLITS": self.num_warps,
            "num_warps": self.num_warps,
            "num_stages": 1,  # what is exchanged must not be loaded ahead of the barrier
        }


@dataclass(frozen=True)
class Step:
    """One launch a step; its programs tile (batch, hidden) and stream the recurrent weights."""

    block_batch: int
    """Rows of the batch in a program."""
    block_hidden: int
    """Hidden units in a program."""
    block_inner: int
    """Hidden units of the previous step that it takes at a time."""
    num_warps: int
    """Warps in a program."""
    num_stages: int
    """Stages of the pipeline that loads the weights."""
    lanes: ClassVar[int] = 1
    """Recurrences in a launch."""

    def grid(self, batch: int, hidden_size: int) -> tuple[int, int]:
        """Programs in a launch."""
        return triton.cdiv(batch, self.block_batch), triton.cdiv(hidden_size, self.block_hidden)

    def constants(self) -> dict[str, int]:
        """What a launch passes of this."""
        return {
            "BLOCK_BATCH": self.block_batch,
            "BLOCK_HIDDEN": self.block_hidden,
            "BLOCK_INNER": self.block_inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


Design = Resident | Persistent | Step


@dataclass(frozen=True)
class Pointwise:
    """One launch a step for what is pointwise in it, the products apart; its programs tile (batch, hidden)."""

    block_batch: int
    """Rows of the batch in a program."""
    block_hidden: int
    """Hidden units in a program: all of them, where rows are normalized."""
    num_warps: int
    """Warps in a program."""

    def grid(self, batch: int, hidden_size: int) -> tuple[int, int]:
        """Programs in a launch."""
        return triton.cdiv(batch, self.block_batch), triton.cdiv(hidden_size, self.block_hidden)

    def constants(self) -> dict[str, int]:
        """What a launch passes of this."""
        return {"BLOCK_BATCH": self.block_batch, "BLOCK_HIDDEN": self.block_hidden, "num_warps": self.num_warps}


def multiplication(dtype: torch.dtype) -> str:
    """How products of this type are formed: ``"16-bit"``, ``"tf32"`` or ``"ieee"``.

    float32 follows ``torch.get_float32_matmul_precision()``: "highest" is IEEE arithmetic, "high" and "medium" are TF32
    (10 bits of each factor), as in PyTorch's own products on a GPU. PyTorch allows bfloat16 (7 bits) for "medium", but
    its products don't use it there, and a layer should not be less precise than the ``torch.nn`` one that it replaces:
    who wants 16-bit products has autocast.
    """
    if dtype != torch.float32:
        return "16-bit"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def input_precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` that ``tl.dot`` takes for it."""
    return "tf32" if multiplication(dtype) == "tf32" else "ieee"


RESIDENT = {
    # (cell, multiplication): {block_hidden: (num_warps, bytes of shared memory that the larger kernel needs)}
    # Above the last row the weights do not fit (16-bit, tf32) or the kernel spills thousands of bytes (ieee).
    # Transposed, W h^T compiles to wgmma at 16 rows. For the LSTM's 128 units on sm_90 (bfloat16), forward, 32 of them
    # and 4 ldmatrix replace 64 mma and 44 ldmatrix in a loop of 972 instructions, not 992; but on the way back it takes
    # 190 registers, not 166, and at 64 units the loops are a fifth and a third longer. Either way a step reads all
    # weights from shared memory once. The simpler form stays until a GPU tells more.
    ("rnn", "16-bit"): {16: (4, 2048), 32: (4, 5120), 64: (4, 12288), 128: (8, 40960), 256: (8, 147456)},
    ("rnn", "tf32"): {16: (4, 4096), 32: (4, 8192), 64: (4, 24576), 128: (8, 81920)},
    ("rnn", "ieee"): {16: (4, 4096), 32: (4, 8192), 64: (8, 24576)},
    ("gru", "16-bit"): {16: (4, 2560), 32: (4, 10240), 64: (8, 32768), 128: (8, 114688)},
    ("gru", "tf32"): {16: (4, 4096), 32: (4, 20480), 64: (8, 65536)},
    ("gru", "ieee"): {16: (4, 19456), 32: (8, 45056), 64: (8, 114688)},
    ("lstm", "16-bit"): {16: (4, 3072), 32: (4, 13312), 64: (8, 43008), 128: (8, 151552)},
    ("lstm", "tf32"): {16: (4, 5120), 32: (4, 26624), 64: (8, 86016)},
    ("lstm", "ieee"): {16: (4, 9216), 32: (4, 26624), 64: (8, 86016)},
}

RESIDENT_ON_AMD = {"rnn": 128, "gru": 32, "lstm": 32}
"""The largest ``block_hidden`` with which the kernels don't spill on AMD's GPUs (compiled for gfx942)."""

PERSISTENT = {
    # (cell, multiplication): {inner_size: {(block_batch, block_hidden): bytes that the larger kernel needs}}
    # A hidden size takes the next inner_size, and there the first tile of which every program finds a multiprocessor.
    # Tiles of 16 rows come first, the least that tensor cores multiply: 32 rows are twice the work at the product and
    # at the exchange, and let twice the batch in. Then those of 16 units, which share a product among the most
    # programs: with more units groups are smaller, and more of them fit. 8 units are for weights that fit in no other
    # way. Above the last size nothing fits, or nothing was looked for (rnn, ieee). Sizes that a resident design holds
    # are here for cells with options, which it does not take, and for GPUs on which it does not fit.
    ("rnn", "16-bit"): {
        128: {(16, 16): 12288, (16, 32): 24576, (32, 32): 40960},
        256: {(16, 16): 16384, (16, 32): 32768, (32, 32): 49152},
        512: {(16, 16): 32768, (16, 32): 49152, (16, 64): 98304, (32, 32): 65536},
        768: {(16, 16): 40960, (16, 32): 65536, (16, 64): 131072},
        1024: {(16, 16): 65536, (16, 32): 98304, (16, 64): 163840},
        1536: {(16, 16): 81920, (16, 32): 131072, (16, 64): 229376},
        2048: {(16, 16): 98304, (16, 32): 163840, (32, 32): 196608},
    },
    ("rnn", "tf32"): {
        128: {(16, 16): 16384, (16, 32): 32768},
        256: {(16, 16): 32768, (16, 32): 49152},
        512: {(16, 16): 65536, (16, 32): 98304},
        1024: {(16, 16): 98304, (32, 16): 131072},
        2048: {(16, 16): 163840},
    },
    ("rnn", "ieee"): {
        128: {(16, 16): 16384},
        256: {(16, 16): 32768},
        512: {(16, 16): 65536},
        1024: {(16, 16): 98304},
    },
    ("gru", "16-bit"): {
        128: {(16, 16): 28672, (16, 32): 57344, (32, 32): 90112},
        256: {(16, 16): 40960, (16, 32): 81920, (32, 32): 114688},
        384: {(16, 16): 53248, (16, 32): 106496},
        512: {(16, 16): 81920, (16, 32): 131072},
        768: {(16, 16): 90112, (16, 32): 180224, (32, 16): 106496},
        1024: {(16, 16): 131072, (16, 32): 229376, (32, 16): 163840},
        1536: {(16, 16): 180224},
        2048: {(16, 16): 229376},
    },
    ("gru", "tf32"): {
        128: {(16, 16): 40960},
        256: {(16, 16): 81920, (32, 16): 114688},
        512: {(16, 16): 131072, (32, 16): 163840},
        768: {(16, 8): 106496},
        1024: {(16, 8): 131072},
    },
    ("gru", "ieee"): {
        128: {(16, 16): 40960},
        256: {(16, 16): 81920},
        512: {(16, 16): 131072},
    },
    ("lstm", "16-bit"): {
        128: {(16, 16): 32768, (16, 32): 65536, (32, 32): 98304},
        256: {(16, 16): 49152, (16, 32): 98304, (32, 32): 131072},
        384: {(16, 16): 65536, (16, 32): 131072, (32, 32): 163840},
        512: {(16, 16): 98304, (16, 32): 163840, (32, 32): 196608},
        768: {(16, 16): 114688, (16, 32): 229376, (32, 16): 131072},
        1024: {(16, 16): 163840, (32, 16): 196608},
        1536: {(16, 16): 229376},
    },
    ("lstm", "tf32"): {
        128: {(16, 16): 49152},
        256: {(16, 16): 98304, (32, 16): 131072},
        512: {(16, 16): 163840, (32, 16): 196608},
        768: {(16, 8): 131072},
        1024: {(16, 8): 163840},
    },
    ("lstm", "ieee"): {
        128: {(16, 16): 49152},
        256: {(16, 16): 98304},
        512: {(16, 16): 163840},
    },
}

SPILLS_WITH_OPTIONS = {
    # (cell, multiplication, inner_size, tile) of the persistent design: with every option at once, 52 to 72 bytes.
    ("gru", "16-bit", 768, (16, 32)),
    ("gru", "16-bit", 1024, (16, 32)),
    ("lstm", "16-bit", 512, (32, 32)),
    ("lstm", "16-bit", 768, (16, 32)),
}

WAVEFRONT = {
    # (cell, multiplication): {inner_size: {(block_batch, block_hidden): (bytes that the larger kernel needs, layers)}}
    # As PERSISTENT, for layers in one launch, whose programs hold two sets of weights and read twice as much from each
    # other. From so many layers on, the model of ``benchmarks.model`` has them take 1.15 times as long one after the
    # other, both passes together, at every batch that fits; tiles that never gain so much by it are left out. Layers
    # of at most half the smallest size keep to themselves: one program holds the weights of each and needs no barrier.
    ("rnn", "16-bit"): {
        256: {(16, 16): (32768, 2), (16, 32): (65536, 2)},
        512: {(16, 16): (65536, 2), (16, 32): (98304, 2)},
        1024: {(16, 32): (163840, 2)},
        1536: {(16, 32): (229376, 2)},
    },
    ("rnn", "tf32"): {
        256: {(16, 16): (65536, 2)},
        512: {(16, 16): (98304, 2)},
    },
    ("rnn", "ieee"): {
        128: {(16, 16): (32768, 2)},
        256: {(16, 16): (65536, 2)},
        512: {(16, 16): (98304, 2)},
    },
    ("gru", "16-bit"): {
        128: {(16, 16): (40960, 3)},
        256: {(16, 16): (65536, 2), (16, 32): (131072, 2)},
        512: {(16, 16): (131072, 2), (16, 32): (229376, 2)},
        768: {(16, 16): (163840, 2)},
    },
    ("gru", "tf32"): {
        128: {(16, 16): (65536, 2)},
        256: {(16, 16): (131072, 2)},
        512: {(16, 16): (229376, 3)},
    },
    ("gru", "ieee"): {
        128: {(16, 16): (65536, 2)},
        256: {(16, 16): (131072, 3)},
        512: {(16, 16): (229376, 3)},
    },
    ("lstm", "16-bit"): {
        128: {(16, 16): (49152, 2)},
        256: {(16, 16): (81920, 2), (16, 32): (163840, 2)},
        512: {(16, 16): (163840, 2), (32, 16): (196608, 3)},
        768: {(16, 16): (212992, 2)},
    },
    ("lstm", "tf32"): {
        128: {(16, 16): (81920, 2)},
        256: {(16, 16): (163840, 2)},
    },
    ("lstm", "ieee"): {
        128: {(16, 16): (81920, 2)},
        256: {(16, 16): (163840, 3)},
    },
}

STEP = {
    # (cell, batch is above 64, hidden_size is a multiple of 16): tile. Every one fits the 99 KiB of the smallest GPU.
    ("rnn", False, True): Step(block_batch=16, block_hidden=32, block_inner=64, num_warps=4, num_stages=3),
    ("rnn", False, False): Step(block_batch=16, block_hidden=32, block_inner=64, num_warps=4, num_stages=3),
    ("rnn", True, True): Step(block_batch=64, block_hidden=64, block_inner=32, num_warps=4, num_stages=3),
    # States whose rows start off a 16-byte bound load element by element: a larger tile runs out of registers, and the
    # GRU with IEEE products spills thousands of bytes where its loads are pipelined.
    ("rnn", True, False): Step(block_batch=32, block_hidden=32, block_inner=32, num_warps=4, num_stages=3),
    ("gru", False, True): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=3),
    ("gru", True, True): Step(block_batch=32, block_hidden=32, block_inner=32, num_warps=4, num_stages=3),
    ("gru", False, False): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=1),
    ("gru", True, False): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=1),
    ("lstm", False, True): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=3),
    ("lstm", True, True): Step(block_batch=32, block_hidden=32, block_inner=32, num_warps=4, num_stages=2),
    ("lstm", False, False): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=1),
    ("lstm", True, False): Step(block_batch=16, block_hidden=32, block_inner=32, num_warps=4, num_stages=1),
}


LARGEST_ROW = 4096
"""Hidden units that one program can normalize: at twice as many, the LSTM spills thousands of bytes."""


def _is_on(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError(f"environment variable RNNKERNELS_COOPERATIVE: expected 'on' or 'off', got {value!r}")
    return value == "on"


COOPERATIVE = _is_on(os.environ.get("RNNKERNELS_COOPERATIVE", "on"))
"""Whether the persistent design may be chosen. The environment variable is for a GPU or a driver that can't do it."""


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; an H100's where the interpreter stands in for a GPU."""
    if device.type == "cpu":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def on_amd(device: torch.device) -> bool:
    """Whether this is one of AMD's GPUs."""
    return device.type == "cuda" and torch.version.hip is not None


@cache
def programmatic_launch(device: torch.device) -> bool:
    """Whether a launch may begin while the one before ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9,)


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that can run at once with all of a multiprocessor each; an H100's where the interpreter stands in."""
    if device.type == "cpu":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


_refused: set[torch.device] = set()


def refuse(device: torch.device) -> None:
    """Choose no design that needs a cooperative launch on this device from now on."""
    _refused.add(device)


def step_design(cell: str, hidden_size: int, batch: int) -> Step:
    """The design that needs nothing but a GPU."""
    return STEP[cell, batch > 64, hidden_size % 16 == 0]


def inner_block(inner_size: int, kind: str) -> int:
    """Units of the previous step that the persistent design takes at a time: as many as registers allow."""
    return min(inner_size & -inner_size, 512 if kind == "16-bit" else 256)


def needs_aligned_rows(cell: str, kind: str, inner_size: int, tile: tuple[int, int]) -> bool:
    """Whether a persistent tile takes multiples of 16 hidden units only.

    Rows off a 16-byte bound are read and written element by element, for which a large tile lacks registers.
    """
    return tile[0] * tile[1] > 512 or (cell, kind, inner_size, tile) == ("lstm", "16-bit", 768, (16, 32))


def _resident(cell: str, hidden_size: int, kind: str, device: torch.device, lanes: int = 1) -> Resident | None:
    block_hidden = max(16, triton.next_power_of_2(hidden_size))
    num_warps, needed = RESIDENT[cell, kind].get(block_hidden, (0, None))
    too_large = on_amd(device) and block_hidden > RESIDENT_ON_AMD[cell]
    if needed is None or too_large or needed > shared_memory(device):
        return None
    return Resident(block_batch=16, block_hidden=block_hidden, num_warps=num_warps, lanes=lanes)


def _persistent(
    cell: str,
    hidden_size: int,
    batch: int,
    kind: str,
    device: torch.device,
    lanes: int = 1,
    with_options: bool = False,
    sizes: dict[int, dict[tuple[int, int], int]] | None = None,
) -> Persistent | None:
    """The first tile that fits with so many lanes, of these rows in place of those of ``PERSISTENT``."""
    if not COOPERATIVE or on_amd(device) or device in _refused:
        return None  # AMD: the kernels compile, but the L2 caches of its chiplets do not share what is exchanged
    sizes = PERSISTENT[cell, kind] if sizes is None else sizes
    inner_size = min((size for size in sizes if size >= hidden_size), default=0)
    block_inner = inner_block(inner_size, kind)
    for (block_batch, block_hidden), needed in sizes.get(inner_size, {}).items():
        design = Persistent(block_batch, block_hidden, block_inner, inner_size // block_inner, lanes=lanes)
        if hidden_size % 16 and needs_aligned_rows(cell, kind, inner_size, (block_batch, block_hidden)):
            continue
        if with_options and (cell, kind, inner_size, (block_batch, block_hidden)) in SPILLS_WITH_OPTIONS:
            continue
        if needed <= shared_memory(device) and math.prod(design.grid(batch, hidden_size)) <= multiprocessors(device):
            return design
    return None


def designs(
    cell: str, hidden_size: int, batch: int, dtype: torch.dtype, device: torch.device, lanes: int = 1
) -> list[Design]:
    """The designs for a recurrence that fit the device, at most one of each kind, the chosen one first.

    ``lanes`` recurrences of this size share a launch, but for the last design, which takes one after another.
    """
    kind = multiplication(dtype)
    resident = _resident(cell, hidden_size, kind, device, lanes)
    persistent = _persistent(cell, hidden_size, batch, kind, device, lanes) if batch else None
    return [*filter(None, (resident, persistent)), step_design(cell, hidden_size, batch)]


def choose(cell: str, hidden_size: int, batch: int, dtype: torch.dtype, device: torch.device, lanes: int = 1) -> Design:
    """The design for a recurrence, or for as many as there are ``lanes``, forward and backward."""
    return designs(cell, hidden_size, batch, dtype, device, lanes)[0]


def persistent_design(
    cell: str, hidden_size: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Persistent | None:
    """The persistent design for a recurrence with options, if there is one that fits the device."""
    return _persistent(cell, hidden_size, batch, multiplication(dtype), device, with_options=True)


def wavefront(
    cell: str, hidden_size: int, batch: int, layers: int, dtype: torch.dtype, device: torch.device
) -> Persistent | None:
    """The design that takes neighbouring layers in one launch, as many as its ``lanes``; None where no two fit.

    All ``layers`` where they fit, else equal shares of them in as few launches as can be.
    """
    kind = multiplication(dtype)
    rows = WAVEFRONT[cell, kind]
    if batch == 0 or 2 * hidden_size <= min(rows, default=math.inf):
        return None
    for launches in range(1, (layers + 1) // 2 + 1):
        lanes = -(-layers // launches)
        gaining = {
            inner_size: {tile: needed for tile, (needed, least) in tiles.items() if least <= lanes}
            for inner_size, tiles in rows.items()
        }
        design = _persistent(cell, hidden_size, batch, kind, device, lanes, sizes=gaining)
        if design is not None:
            return design
    return None


def pointwise(size: int, whole_rows: bool) -> Pointwise:
    """The tile of a step's pointwise kernels over ``size`` units, where ``whole_rows`` for layer normalization."""
    block_hidden = max(16, triton.next_power_of_2(size))
    if not whole_rows:
        block_hidden = min(block_hidden, 256)
    elif size > LARGEST_ROW:
        raise ValueError(
            f"norm_hh, norm_cell_weight: expected at most {LARGEST_ROW} hidden units on Triton, got {size}; "
            'rnnkernels.use_backend("eager") normalizes any number'
        )
    return Pointwise(
        block_batch=max(1, 256 // block_hidden),
        block_hidden=block_hidden,
        num_warps=min(16, max(2, block_hidden // 256)),
    )
