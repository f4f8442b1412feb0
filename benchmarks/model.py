"""``python -m benchmarks.model``: how long a step of a recurrence ought to take, by arithmetic. Not a measurement.

A step multiplies the state by the recurrent weights, squashes the gates, and hands the new state on. The model counts
what that asks of a GPU, and divides by what the GPU's data sheet says:

- *product*: 2 * gates * H * H * rows floating-point operations, in tiles of 16 rows, on as many multiprocessors as the
  design puts to work;
- *weights*: their bytes, through shared memory where they stay on the chip, else out of the L2 cache or, where they
  exceed it, out of memory, once for each tile of the batch;
- *gates*: exponentials and reciprocals on the special-function units, two for a sigmoid or a tanh;
- *exchange*: the state (forward) or the gates' gradients (backward) that programs read from each other through L2;
- *traffic*: what a step reads and writes in memory, whatever the design: projected input, saved gates, states;
- *latency*: a barrier over the grid, a launch, or neither; and the chain of dependent instructions of any step.

The **floor** is the barrier or launch and the largest of the others: everything overlaps that could. The **modelled**
time adds up what depends on each other: latency, chain, product or weights, gates and exchange; the traffic hides
behind them or takes longer. The input's product and those of the weights' gradients are no part of a step.

Data-sheet figures name their source; ``BARRIER``, ``LAUNCH``, ``CHAIN`` and some cache bandwidths are assumptions until
a recorded visit replaces them.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Rows of the recurrent weights for a hidden unit."""

SAVED = {"rnn": 0, "gru": 4, "lstm": 4}
"""Numbers for a hidden unit that a forward pass writes for the backward pass, beside the states."""

ACTIVATIONS = {"rnn": (1, 0), "gru": (3, 0), "lstm": (5, 1)}
"""Sigmoids and tanhs for a hidden unit, forward and backward (which forms the LSTM's tanh of the cell state again)."""

BYTES = {"16-bit": 2, "tf32": 4, "ieee": 4}
"""Of a weight or a state, by how products are formed."""

BARRIER = 1.0e-6
"""Seconds that a barrier over the grid takes, from the last write to the first read. An assumption."""

LAUNCH = 2.2e-6
"""Seconds between the starts of two small kernels of which one waits for the other, in a CUDA graph. An assumption.
From a loop in Python it is several times that."""

CHAIN = 0.25e-6
"""Seconds of dependent instructions in a step, whatever its size: the latency of a product and of exponentials, and the
state's way through shared memory. An assumption."""

SHARED_BYTES_PER_CLOCK = 128
"""What a multiprocessor's shared memory delivers: 32 banks of 4 bytes (CUDA C++ Programming Guide, shared memory)."""

SPECIAL_PER_CLOCK = 16
"""Exponentials or reciprocals per clock and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions)."""

ROWS = 16
"""Rows of the batch that a product takes at least."""


@dataclass(frozen=True)
class Device:
    """What a GPU can do at most."""

    name: str
    """As the data sheet calls it."""
    multiprocessors: int
    """How many."""
    clock: float
    """Boost clock in hertz."""
    operations: dict[str, float]
    """Floating-point operations a second by how products are formed: ``"16-bit"``, ``"tf32"`` and ``"ieee"``."""
    memory_bandwidth: float
    """Bytes a second."""
    cache_size: int
    """Bytes of L2 cache."""
    cache_bytes_per_clock: int
    """What the L2 cache delivers."""
    shared_memory: int
    """Bytes of shared memory that a program may use."""
    source: str
    """Where the figures come from."""

    @property
    def cache_bandwidth(self) -> float:
        """Bytes a second out of L2."""
        return self.cache_bytes_per_clock * self.clock


_HOPPER = {
    "multiprocessors": 132,
    "clock": 1.83e9,
    "operations": {"16-bit": 989e12, "tf32": 494e12, "ieee": 67e12},
    "cache_size": 50 * 2**20,
    "cache_bytes_per_clock": 5120,
    "shared_memory": 227 * 2**10,
}

DEVICES = {
    "H100": Device(
        name="H100 SXM",
        memory_bandwidth=3.35e12,
        source="NVIDIA H100 data sheet and architecture white paper; the cache's bandwidth is assumed to be the A100's",
        **_HOPPER,
    ),
    "H200": Device(
        name="H200 SXM",
        memory_bandwidth=4.8e12,
        source="NVIDIA H200 data sheet, the rest as of the H100",
        **_HOPPER,
    ),
    "A100": Device(
        name="A100 SXM 80 GB",
        multiprocessors=108,
        clock=1.41e9,
        operations={"16-bit": 312e12, "tf32": 156e12, "ieee": 19.5e12},
        memory_bandwidth=2.039e12,
        cache_size=40 * 2**20,
        cache_bytes_per_clock=5120,
        shared_memory=163 * 2**10,
        source="NVIDIA A100 data sheet and architecture white paper",
    ),
    "L4": Device(
        name="L4",
        multiprocessors=58,
        clock=2.04e9,
        operations={"16-bit": 121e12, "tf32": 60e12, "ieee": 30.3e12},
        memory_bandwidth=0.3e12,
        cache_size=48 * 2**20,
        cache_bytes_per_clock=2048,
        shared_memory=99 * 2**10,
        source="NVIDIA L4 data sheet and Ada architecture white paper; the cache's bandwidth is an assumption",
    ),
}
"""GPUs that the model knows."""


def device_of(name: str, multiprocessors: int) -> Device | None:
    """The GPU that calls itself ``name``; None where the model does not know it, or it is another version of the chip.

    >>> device_of("NVIDIA H100 80GB HBM3", 132).name
    'H100 SXM'
    >>> device_of("NVIDIA H100 PCIe", 114) is None
    True
    """
    words = name.replace("-", " ").split()
    found = [device for key, device in DEVICES.items() if key in words and device.multiprocessors == multiprocessors]
    return found[0] if found else None


@dataclass(frozen=True)
class Step:
    """One step's time in a design."""

    design: str
    """One of ``DESIGNS``."""
    latency: float
    """Seconds for the barrier or the launch."""
    parts: dict[str, float] = field(hash=False)
    """Seconds for ``product``, ``weights``, ``gates``, ``exchange`` and ``traffic``."""
    waves: int = 1
    """How often the multiprocessors must take all steps in turn: since the batch has more tiles than there are, or for
    one direction after the other."""

    @property
    def floor(self) -> float:
        """Seconds, if all overlapped that could."""
        return self.waves * (self.latency + max(self.parts.values()))

    @property
    def modelled(self) -> float:
        """Seconds, if nothing did but the traffic."""
        parts = self.parts
        chain = CHAIN + max(parts["product"], parts["weights"]) + parts["gates"] + parts["exchange"]
        return self.waves * (self.latency + max(chain, parts["traffic"]))

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max({"latency": self.latency, **self.parts}.items(), key=lambda part: part[1])[0]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def operations(cell: str, hidden_size: int, batch: int) -> int:
    """Floating-point operations of a step's product, forward or backward.

    >>> operations("lstm", 768, 16)
    75497472
    """
    return 2 * GATES[cell] * hidden_size**2 * batch


def traffic(cell: str, hidden_size: int, batch: int, multiplication: str, direction: str) -> int:
    """Bytes that a step reads and writes in memory, whatever the design."""
    cell_state = 4 if cell == "lstm" else 0  # float32
    if direction == "forward":
        numbers = GATES[cell] + SAVED[cell] + 1
    else:
        numbers = SAVED[cell] + 2 + max(GATES[cell], SAVED[cell])
    return batch * hidden_size * (numbers * BYTES[multiplication] + cell_state)


def streamed(cell: str, hidden_size: int, batch: int, multiplication: str, direction: str) -> int:
    """Bytes of a step that keeps nothing on the chip: the traffic and all weights."""
    weights = GATES[cell] * hidden_size**2 * BYTES[multiplication]
    return weights + traffic(cell, hidden_size, batch, multiplication, direction)


@dataclass(frozen=True)
class _Problem:
    cell: str
    hidden_size: int
    batch: int
    multiplication: str
    device: Device
    direction: str
    both: int = 1
    """Directions of a layer in the launch."""
    layers: int = 1
    """Layers of a stack in the launch."""

    def parts(self, rows: int, units: int, weights: float, exchange: float) -> dict[str, float]:
        """Seconds for a multiprocessor that works on so many rows of the batch and hidden units."""
        device = self.device
        activations = ACTIVATIONS[self.cell][self.direction == "backward"]
        moved = self.layers * traffic(self.cell, self.hidden_size, self.batch, self.multiplication, self.direction)
        product = self.sets * 2 * GATES[self.cell] * units * self.hidden_size * rows
        return {
            "product": product / (device.operations[self.multiplication] / device.multiprocessors),
            "weights": weights,
            "gates": 2 * activations * rows * units / SPECIAL_PER_CLOCK / device.clock,
            "exchange": exchange,
            "traffic": self.both * moved / device.memory_bandwidth,
        }

    @property
    def sets(self) -> int:
        """Of weights that a program holds: in a wavefront, those of the layer below too."""
        return 1 if self.layers == 1 else 2

    @property
    def size(self) -> int:
        return BYTES[self.multiplication]

    @property
    def exchanged(self) -> int:
        """Numbers for a hidden unit that programs read from each other."""
        return 1 if self.direction == "forward" else GATES[self.cell]


def _resident(problem: _Problem) -> Step | None:
    """One program takes 16 rows of the batch through all steps, the weights in its shared memory."""
    device = problem.device
    width = max(ROWS, 1 << (problem.hidden_size - 1).bit_length())
    needed = (GATES[problem.cell] * width + ROWS) * width * problem.size
    if needed > device.shared_memory:
        return None
    tiles = problem.both * math.ceil(problem.batch / ROWS)
    weights = GATES[problem.cell] * width**2 * problem.size / SHARED_BYTES_PER_CLOCK / device.clock
    waves = math.ceil(tiles / device.multiprocessors)
    parts = problem.parts(ROWS, width, weights, exchange=0.0)
    parts["traffic"] /= waves  # each takes its share
    return Step("resident", 0.0, parts, waves)


def _spread(problem: _Problem, units: int, groups: int) -> Step | None:
    """Programs that each hold the weights of so many hidden units, in so many groups that share the batch."""
    device, slices = problem.device, math.ceil(problem.hidden_size / units)
    held = problem.sets * GATES[problem.cell] * units * problem.hidden_size * problem.size
    programs = problem.both * problem.layers * slices * groups
    if groups < 1 or programs > device.multiprocessors or held > device.shared_memory:
        return None
    rows = _up(math.ceil(problem.batch / groups), ROWS)
    weights = math.ceil(rows / 64) * held / SHARED_BYTES_PER_CLOCK / device.clock
    read = programs * rows * problem.sets * problem.hidden_size * problem.exchanged * problem.size
    parts = problem.parts(rows, units, weights, read / device.cache_bandwidth)
    return Step("persistent" if problem.layers == 1 else "wavefront", BARRIER, parts)


def _persistent(problem: _Problem) -> Step | None:
    """Programs that each hold the weights of some hidden units; the grid waits for all of them after every step."""
    found = []
    for units in (8, 16, 32, 64):
        together = problem.both * problem.layers * math.ceil(problem.hidden_size / units)
        at_once = problem.device.multiprocessors // together
        found.append(_spread(problem, units, min(at_once, math.ceil(problem.batch / ROWS))))
    return min(filter(None, found), key=lambda step: step.modelled, default=None)


def _step(problem: _Problem) -> Step:
    """A launch for each step, whose programs take 16 or 64 rows and 32 units and stream the weights."""
    device = problem.device
    tile = ROWS if problem.batch <= 64 else 64
    tiles, slices = math.ceil(problem.batch / tile), math.ceil(problem.hidden_size / 32)
    matrix = GATES[problem.cell] * problem.hidden_size**2 * problem.size
    read = slices * tiles * tile * problem.hidden_size * problem.exchanged * problem.size
    weights = tiles * matrix / device.cache_bandwidth
    if matrix > device.cache_size:
        weights = max(weights, matrix / device.memory_bandwidth)
    waves = math.ceil(tiles * slices / device.multiprocessors)
    parts = problem.parts(waves * tile, 32, weights, read / device.cache_bandwidth)
    parts["traffic"] /= problem.both  # one direction after the other
    return Step("step", LAUNCH, parts, problem.both)


DESIGNS = {"resident": _resident, "persistent": _persistent, "step": _step}
"""Designs of a recurrence's kernels, as ``rnnkernels.kernels.triton.dispatch`` has them."""


def step(
    cell: str,
    hidden_size: int,
    batch: int,
    multiplication: str,
    design: str,
    device: Device,
    direction: str = "forward",
    *,
    bidirectional: bool = False,
) -> Step | None:
    """The time of one step of a layer; None where the design can't hold the weights.

    Parameters
    ----------
    cell : {"rnn", "gru", "lstm"}
        Which recurrence.
    hidden_size, batch : int
        Its size.
    multiplication : {"16-bit", "tf32", "ieee"}
        How products are formed.
    design : str
        One of ``DESIGNS``.
    device : Device
        One of ``DEVICES``.
    direction : {"forward", "backward"}
        Which pass.
    bidirectional : bool
        Whether the layer runs in both directions: at once, but for the design that is launched for each step.

    Examples
    --------
    >>> found = step("lstm", 128, 16, "16-bit", "resident", DEVICES["H100"])
    >>> found.limit, 0 < found.floor < found.modelled
    ('gates', True)
    >>> step("lstm", 256, 16, "16-bit", "resident", DEVICES["H100"]) is None
    True
    """
    for name, value, allowed in (
        ("cell", cell, GATES),
        ("multiplication", multiplication, BYTES),
        ("design", design, DESIGNS),
        ("direction", direction, ("forward", "backward")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, value in (("hidden_size", hidden_size), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return DESIGNS[design](_Problem(cell, hidden_size, batch, multiplication, device, direction, 1 + bidirectional))


def best(cell: str, hidden_size: int, batch: int, multiplication: str, device: Device, direction: str) -> Step:
    """The design of the shortest modelled time."""
    found = (step(cell, hidden_size, batch, multiplication, design, device, direction) for design in DESIGNS)
    return min((each for each in found if each is not None), key=lambda each: each.modelled)


def wavefront(
    cell: str,
    hidden_size: int,
    batch: int,
    layers: int,
    multiplication: str,
    device: Device,
    direction: str = "forward",
    tile: tuple[int, int] | None = None,
) -> Step | None:
    """The time of one step of a wavefront, in which each of so many layers takes a step; None where they don't fit.

    A sequence of T steps takes T + layers - 1 of them; one layer after the other, it takes layers * T of :func:`best`.
    ``tile`` is the rows of the batch and the hidden units of a program; by default those of the shortest time.

    >>> together = wavefront("lstm", 512, 16, 2, "16-bit", DEVICES["H100"])
    >>> alone = best("lstm", 512, 16, "16-bit", DEVICES["H100"], "forward")
    >>> alone.modelled < together.modelled < 2 * alone.modelled
    True
    >>> wavefront("lstm", 1024, 16, 2, "16-bit", DEVICES["H100"]) is None
    True
    """
    if layers < 2:
        raise ValueError(f"layers: expected at least 2, got {layers}")
    problem = _Problem(cell, hidden_size, batch, multiplication, device, direction, layers=layers)
    return _persistent(problem) if tile is None else _spread(problem, tile[1], math.ceil(batch / tile[0]))


HIDDEN_SIZES = (64, 128, 256, 512, 768, 1024, 2048)


def _print_stacks(cells: Sequence[str], batch: int, layers: int, multiplication: str, device: Device) -> None:
    print(
        f"Microseconds in which all of {layers} layers take a step: modelled, and what takes longest in a wavefront\n"
    )
    print(f"{'':24}{'one after the other':>25}{'wavefront':>25}")
    for cell, direction, size in itertools.product(cells, ("forward", "backward"), HIDDEN_SIZES):
        alone = best(cell, size, batch, multiplication, device, direction)
        together = wavefront(cell, size, batch, layers, multiplication, device, direction)
        columns = f"{layers * alone.modelled * 1e6:.2f} {alone.design:>10}", "-"
        if together:
            columns = columns[0], f"{together.modelled * 1e6:.2f} {together.limit:>9}"
        print(f"{cell:5}{direction:10}{'H=' + str(size):9}" + "".join(f"{column:>25}" for column in columns))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description="A model of the microseconds that a step takes: floor, modelled time, and what takes longest.",
        epilog="A model, not a measurement. benchmarks/model.py states what it assumes.",
    )
    parser.add_argument("--device", choices=DEVICES, default="H100", help="default: H100")
    parser.add_argument("--cell", choices=GATES, action="append", help="may be given again; default: all")
    parser.add_argument("--batch", type=int, default=16, help="default: 16")
    parser.add_argument("--multiplication", choices=BYTES, default="16-bit", help="default: 16-bit")
    parser.add_argument("--bidirectional", action="store_true", help="a step of both directions of a layer")
    parser.add_argument("--layers", type=int, default=1, help="of a stack: one after the other, and as a wavefront")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"argument --batch: expected at least 1, got {options.batch}")
    if options.layers < 1:
        parser.error(f"argument --layers: expected at least 1, got {options.layers}")
    device = DEVICES[options.device]
    print(f"A model, not a measurement: {device.name}, batch {options.batch}, {options.multiplication} products")
    if options.layers > 1:
        _print_stacks(options.cell or tuple(GATES), options.batch, options.layers, options.multiplication, device)
        return 0
    print("Microseconds a step: floor, modelled, and what takes longest; - where a design can't hold the weights\n")
    print(f"{'':24}" + "".join(f"{design:>25}" for design in DESIGNS))
    for cell in options.cell or GATES:
        for direction in ("forward", "backward"):
            for hidden_size in HIDDEN_SIZES:
                columns = []
                for design in DESIGNS:
                    size = cell, hidden_size, options.batch, options.multiplication, design, device, direction
                    found = step(*size, bidirectional=options.bidirectional)
                    text = f"{found.floor * 1e6:.2f} {found.modelled * 1e6:.2f} {found.limit:>9}" if found else "-"
                    columns.append(f"{text:>25}")
                print(f"{cell:5}{direction:10}{'H=' + str(hidden_size):9}" + "".join(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
