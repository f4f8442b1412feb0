"""What may go wrong on a GPU alone: a barrier under load, CUDA graphs, grids that do not fit, accesses out of bounds.

``python -m benchmarks.stress`` runs every design of the kernels once, on small sizes: what compute-sanitizer watches.
"""

import itertools
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import rnnkernels
from benchmarks import designs, parity, runner
from rnnkernels import _backend
from rnnkernels.__main__ import LIMITS, OPERATORS, arithmetic, relative_error

ROOT = Path(__file__).resolve().parent.parent

STEPS = 1_000_000
"""Steps that a barrier is waited at under load, for each operator and pass."""

PASSES = ("forward", "backward")

LAYERS = 3
"""Of a stack that runs as a wavefront."""

TOOLS = ("memcheck", "racecheck")
"""Of compute-sanitizer."""

SOAK = {"hidden_size": 512, "batch": 16, "sequence_length": 4096, "dtype": "bfloat16", "precision": "highest"}
SMALL = (
    {"hidden_size": 64, "batch": 17, "sequence_length": 5, "dtype": "bfloat16", "precision": "highest"},
    {"hidden_size": 300, "batch": 17, "sequence_length": 5, "dtype": "bfloat16", "precision": "highest"},
)
TINY = {"hidden_size": 6, "batch": 2, "sequence_length": 4, "dtype": "float32", "precision": "highest"}


def name_of(design) -> str:
    """The design's kind, as in ``"resident"``."""
    return type(design).__name__.lower()


class Pass:
    """A pass of the kernels in a design on data of its own."""

    def __init__(self, case: dict, design, device: torch.device):
        self.case, self.design, self.device = case, design, device
        self.initial, self.weight_hh, self.projected, self.outer = designs.data_of(case, device)
        self.buffer = self.projected.clone()
        self.kept = None
        if case["pass"] == "backward":
            with designs.forced(case["operator"], None):
                self.kept = designs.forward(case["operator"], self.buffer, self.initial, self.weight_hh)

    @property
    def given(self) -> Tensor:
        """What the pass reads first, and what the data are drawn anew for."""
        return self.outer if self.case["pass"] == "backward" else self.buffer

    def __call__(self) -> Tensor:
        """The states, or the gates' gradients. The forward pass writes over its buffer: refill it before the next."""
        operator = self.case["operator"]
        with designs.forced(operator, self.design):
            if self.case["pass"] == "backward":
                return designs.backward(operator, self.outer, self.kept, self.initial, self.weight_hh)
            return designs.forward(operator, self.buffer, self.initial, self.weight_hh)[0]

    def again(self) -> Tensor:
        """The pass from the same data as the first."""
        if self.case["pass"] == "forward":
            self.buffer.copy_(self.projected)
        return self()


class Load:
    """Matrix products on a stream of their own, which take multiprocessors and bandwidth from everyone else."""

    def __init__(self, device: torch.device, size: int = 4096):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16) if self.stream else None

    def add(self, products: int = 40) -> None:
        """Queue some more."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                for _ in range(products):
                    self.matrix @ self.matrix


def soak(case: dict, design, device: torch.device, steps: int, seconds: float) -> dict:
    """Whether a pass gives the same bits every time for so many steps, while another stream loads the GPU."""
    run = Pass(case, design, device)
    with designs.without_fallback():
        first = run.again().clone()
    exact = Pass(case, designs.designs_for(case, device)[-1], device)  # one launch a step: no barrier
    error, limit = relative_error(first, exact.again()), LIMITS[arithmetic(first.dtype, device)]
    if not error <= limit:
        return {"status": "differs", "reason": f"from one launch a step by {error:.1e}, allowed {limit:.1e}"}
    return repeat(run.again, first, device, max(2, math.ceil(steps / case["sequence_length"])), seconds)


def repeat(again: Callable[[], Tensor], first: Tensor, device: torch.device, wanted: int, seconds: float) -> dict:
    """Whether so many runs under load give the bits of the first."""
    load, end, runs = Load(device), time.monotonic() + seconds, 0
    for runs in range(1, wanted + 1):
        load.add()
        if not torch.equal(again(), first):
            return {"status": "differs", "reason": f"run {runs} gave other bits than the first", "runs": runs}
        if time.monotonic() >= end and runs < wanted:
            reason = f"the time was used up after {runs} of {wanted} runs, which all agreed"
            return {"status": "skipped", "reason": reason, "runs": runs}
    return {"status": "agrees", "reason": None, "runs": runs}


def soak_layers(case: dict, design, device: torch.device, steps: int, seconds: float) -> dict:
    """The same of a wavefront: both passes of a module of several layers, beside one layer after the other."""
    from rnnkernels.kernels.triton import dispatch

    torch.manual_seed(0)
    dtype, size, kind = getattr(torch, case["dtype"]), case["hidden_size"], case["operator"].upper()
    module = getattr(rnnkernels, kind)(size, size, case["layers"], device=device, dtype=dtype)
    input = torch.randn(case["sequence_length"], case["batch"], size, device=device).to(dtype).requires_grad_()
    outer = torch.randn_like(input)

    def passes(design) -> Tensor:
        """The states and all gradients, end to end."""
        with mock.patch.object(dispatch, "wavefront", return_value=design), _backend.use_backend("triton"):
            output, _ = module(input)
            gradients = torch.autograd.grad(output, [input, *module.parameters()], outer)
        return torch.cat([tensor.flatten() for tensor in (output.detach(), *gradients)])

    with designs.without_fallback():
        first = passes(design)
    error, limit = relative_error(first, passes(None)), LIMITS[arithmetic(dtype, device)]
    if not error <= limit:
        return {"status": "differs", "reason": f"from one layer after the other by {error:.1e}, allowed {limit:.1e}"}
    wanted = max(2, math.ceil(steps / (2 * case["sequence_length"])))
    return repeat(lambda: passes(design), first, device, wanted, seconds)


def in_a_graph(case: dict, design, device: torch.device) -> dict:
    """Whether a pass that was captured gives, on other data, the bits that it gives without a graph."""
    run = Pass(case, design, device)
    with designs.without_fallback():
        run.again()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = run()
    other = torch.randn_like(run.given)
    run.given.copy_(other)
    graph.replay()
    replayed = result.clone()
    run.given.copy_(other)
    same = torch.equal(replayed, run())
    return {"status": "agrees" if same else "differs", "reason": None if same else "a graph gives other bits"}


def too_large(case: dict, design, device: torch.device) -> dict:
    """Whether a grid of more programs than can run at once, which would wait forever, is refused.

    The launch fails, or the kernels say that they go on without it.
    """
    from rnnkernels.kernels.triton import dispatch

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    case = {**case, "batch": 4 * multiprocessors * design.block_batch, "sequence_length": 2}
    refusals = []
    # What a refusal teaches the dispatch is forgotten again.
    with mock.patch.object(dispatch, "_refused", set()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            Pass(case, design, device)()
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
        torch.cuda.synchronize(device)  # raises where the GPU is not fit for more
    refusals += [str(warning.message) for warning in caught if "cooperative" in str(warning.message)]
    if refusals:
        return {"status": "agrees", "reason": f"refused: {refusals[0]}"[:300]}
    return {"status": "differs", "reason": "a grid that does not fit was not refused"}


def sanitize(tool: str, seconds: float) -> dict:
    """Whether a tool of compute-sanitizer finds nothing to complain of in any design."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"status": "skipped", "reason": "compute-sanitizer is not on the PATH"}
    command = [program, "--tool", tool, "--error-exitcode", "66", sys.executable, "-m", "benchmarks.stress"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
    try:
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"not finished after {seconds:.0f} s"}
    if finished.returncode == 0:
        return {"status": "agrees", "reason": None}
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
    return {"status": "differs", "reason": " / ".join(lines[-6:])[:600]}


def sizes_of(rehearsal: bool) -> tuple[dict, tuple[dict, ...]]:
    """What a barrier is stressed on, and what everything else runs on."""
    return (TINY, (TINY,)) if rehearsal else (SOAK, SMALL)


def wavefront_of(case: dict, device: torch.device):
    """The design that takes several layers of a case at once; None where none fits. A small one for a rehearsal."""
    from rnnkernels.kernels.triton import dispatch

    if device.type == "cpu":
        return dispatch.Persistent(16, 16, 128, chunks=1, lanes=2)
    operator, size, dtype = case["operator"], case["hidden_size"], getattr(torch, case["dtype"])
    return dispatch.wavefront(operator, size, case["batch"], case["layers"], dtype, device)


def passes(sizes: tuple[dict, ...], device: torch.device) -> Iterator[tuple[dict, object]]:
    """Every operator and pass, in every design that there is for it, and in every one that holds both directions."""
    for size, operator, direction in itertools.product(sizes, OPERATORS, PASSES):
        case = {**size, "operator": operator, "pass": direction}
        for design in designs.designs_for(case, device):
            yield case, design
        case = {**case, "directions": 2}
        for design in designs.designs_for(case, device):
            if design.lanes == 2:
                yield case, design


def tasks(device: torch.device) -> Iterator[tuple[dict, Callable[[float], dict]]]:
    """What is to be checked: what a result file says of it, and a function of the seconds that it may take."""
    rehearsal = device.type == "cpu"
    large, small = sizes_of(rehearsal)
    waiting = [each for each in passes((large,), device) if name_of(each[1]) == "persistent" or rehearsal]
    if not waiting:
        yield (
            {"name": "barrier", "check": "barrier"},
            lambda seconds: {
                "status": "skipped",
                "reason": "the dispatch has no persistent design for any operator: nothing waits at a barrier",
            },
        )
    steps = 2 * large["sequence_length"] if rehearsal else STEPS
    for case, design in waiting:
        yield (
            fields("barrier", case, design, steps=steps),
            lambda seconds, each=(case, design), steps=steps: soak(*each, device, steps, seconds),
        )
    for operator in OPERATORS:
        case = {**large, "operator": operator, "layers": 2 if rehearsal else LAYERS}
        design = wavefront_of(case, device)
        if design is not None:
            yield (
                fields("layers", case, design, steps=steps),
                lambda seconds, each=(case, design), steps=steps: soak_layers(*each, device, steps, seconds),
            )
    if rehearsal:
        return
    for case, design in waiting:
        yield fields("too large a grid", case, design), lambda seconds, each=(case, design): too_large(*each, device)
    for case, design in passes(small, device):
        yield fields("CUDA graph", case, design), lambda seconds, each=(case, design): in_a_graph(*each, device)
    for tool in TOOLS:
        yield {"name": f"compute-sanitizer {tool}", "check": tool}, lambda seconds, tool=tool: sanitize(tool, seconds)


def fields(check: str, case: dict, design, **more) -> dict:
    """What a result file says of a check on a pass."""
    what = case["pass"] if "pass" in case else f"{case['layers']} layers"
    name = f"{check}: {case['operator']} {what} H={case['hidden_size']} B={case['batch']} {design}"
    return {"name": name, "check": check, "design": str(design), **case, **more}


def main() -> int:
    """Run every design once, on small sizes, without options and with them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, sizes = sizes_of(device.type == "cpu")
    for case, design in passes(sizes, device):
        with runner.precision(case["precision"]):
            Pass(case, design, device)()
    with_options = {"option": "all that ride along", "nonlinearity": None, "reverse": True, "lengths": True}
    for size, operator in itertools.product(sizes, OPERATORS):
        case = {**size, **with_options, "operator": operator}
        for design in designs.designs_for(case, device):
            with runner.precision(case["precision"]):
                parity.compare(case, design, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
